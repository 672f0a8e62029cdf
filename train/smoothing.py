"""Smoothing of a trace in time by a moving average or a local polynomial (Savitzky-Golay), with its width in seconds.

Frames need not be regular: both filters use the frames whose presentation times lie within the width, and the
polynomial is fitted to those times. On regular frames they equal the textbook filters. The time that both take is
proportional to the number of frames, whatever the width.

Source: A. Savitzky, M. J. E. Golay, Analytical Chemistry 36 (1964) 1627. Ours: the papers do not smooth.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb
from pathlib import Path

import numpy as np

from vaflow.errors import CorruptError, UsageError, explain
from vaflow.files import read_text, write_file
from vaflow.timeline import Floats, Ints, median_interval
from vaflow.train.scores import score
from vaflow.train.traces import Trace

ORDER = 2  # of the polynomial; in the middle of regular frames, 3 gives the same
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 20)  # widths that `auto` tries, in sampling intervals
LEAST_GAIN = 1e-4  # of the mean CCC for a wider filter: smaller differences are rounding
FILE = "smoothing.json"
_SLACK = 1e-6  # seconds; tolerance for two roundings of one time
_CHUNK = 4  # widths per chunk; powers of the time stay small, so their sums keep their digits


def moving_average(time: Floats, value: Floats, seconds: float) -> Floats:
    """Return the mean of the frames within `seconds` / 2 of each frame, cut at the ends of the clip.

    Args:
        time: [N] seconds, ascending.
        value: [N, K].

    Returns:
        [N, K]. On regular frames: convolution with a box, divided by the part of the box inside the clip.

    Raises:
        ValueError: shapes disagree, or the width is negative.
    """
    time, value = _checked(time, value, seconds)
    first, last = _reach(time, time, seconds)
    middle = value.mean(axis=0) if len(value) else 0.0  # sums of small numbers keep their digits
    sums = _prefix(value - middle)
    mean: Floats = (sums[last] - sums[first]) / (last - first)[:, None] + middle
    return np.where((last - first == 1)[:, None], value, mean)


def savitzky_golay(time: Floats, value: Floats, seconds: float, order: int = ORDER) -> Floats:
    """Value at each frame of the least-squares polynomial through the frames around it.

    Near the ends the window stays within the clip, and the frame lies off its middle. A window with few frames has a
    polynomial of lower order.

    Args:
        time: [N] seconds, ascending.
        value: [N, K].

    Returns:
        [N, K]. On regular frames: `scipy.signal.savgol_filter` with mode "interp".

    Raises:
        ValueError: shapes disagree, or the width is negative.
    """
    time, value = _checked(time, value, seconds)
    if not len(time) or not seconds:
        return value.copy()
    half = seconds / 2
    middle = (time[0] + time[-1]) / 2
    first, last = _reach(time, np.clip(time, min(time[0] + half, middle), max(time[-1] - half, middle)), seconds)
    steps = np.concatenate([[0], np.cumsum(np.diff(time) > _SLACK)])
    terms = 1 + np.minimum(steps[last - 1] - steps[first], order)  # no more than there are different instants
    out = np.empty_like(value)
    begin = 0
    while begin < len(time):
        end = max(begin + 1, int(np.searchsorted(time, time[begin] + _CHUNK * seconds)))
        rows = slice(begin, end)
        near = slice(int(first[rows].min()), int(last[rows].max()))
        origin = (time[begin] + time[end - 1]) / 2
        u, at = ((time[part] - origin) / half for part in (near, rows))
        edges = first[rows] - near.start, last[rows] - near.start
        out[rows] = _fit(u, value[near], *edges, at, terms[rows], order)
        begin = end
    return out


def _fit(u: Floats, value: Floats, first: Ints, last: Ints, at: Floats, terms: Ints, order: int) -> Floats:
    """Polynomials of `terms` terms through rows first .. last - 1 of (u, value), read at `at`: [R, K].

    The normal equations follow from sums of powers, which differences of running sums give for every window.
    """
    mean = value.mean(axis=0)
    powers = u[:, None] ** np.arange(2 * order + 1)
    products = powers[:, : order + 1, None] * (value - mean)[:, None, :]
    moments, sides = (sums[last] - sums[first] for sums in (_prefix(powers), _prefix(products)))
    # Powers of u - at, by the binomial theorem: the polynomial's value at `at` is then its constant.
    size = 2 * order + 1
    binomial = np.array([[comb(n, k) for k in range(size)] for n in range(size)], np.float64)
    exponent = np.maximum(np.arange(size)[:, None] - np.arange(size), 0)
    shift = binomial * (-at[:, None, None]) ** exponent
    moments = (shift @ moments[..., None])[..., 0]
    sides = shift[:, : order + 1, : order + 1] @ sides
    index = np.arange(order + 1)
    used = index < terms[:, None]
    gram = moments[:, index[:, None] + index] * (used[:, :, None] & used[:, None, :])
    gram += np.eye(order + 1) * np.where(used, 1e-13 * moments[:, :1], 1.0)[:, None, :]
    solution: Floats = np.linalg.solve(gram, sides * used[..., None])[:, 0] + mean
    return solution


def _prefix(rows: Floats) -> Floats:
    """Running sums of [N, ...] along the first axis, [N + 1, ...]."""
    return np.concatenate([np.zeros((1, *rows.shape[1:])), np.cumsum(rows, axis=0)])


def _reach(time: Floats, centre: Floats, seconds: float) -> tuple[Ints, Ints]:
    """Frames within half the width of each centre: first .. last - 1."""
    first = np.searchsorted(time, centre - seconds / 2 - _SLACK)
    last = np.searchsorted(time, centre + seconds / 2 + _SLACK, side="right")
    return first, last


def _checked(time: Floats, value: Floats, seconds: float) -> tuple[Floats, Floats]:
    time, value = np.asarray(time, np.float64), np.asarray(value, np.float64)
    if value.ndim != 2 or time.shape != value.shape[:1]:
        raise ValueError(f"smoothing: expected time [N] and value [N, K]; got {[*time.shape]} and {[*value.shape]}")
    if not 0 <= seconds < np.inf:
        raise ValueError(f"smoothing: the width must be a number of seconds, 0 or more; got {seconds}")
    return time, value


FILTERS: Mapping[str, Callable[[Floats, Floats, float], Floats]] = {"mean": moving_average, "savgol": savitzky_golay}


@dataclass(frozen=True)
class Smoothing:
    """Smoothing of a run's traces.

    Attributes:
        kind: a key of `FILTERS`.
        seconds: width; 0: none.
        chosen_on: split that the width was chosen on; empty: it was given.
        scores: mean CCC on that split by width.

    Raises:
        UsageError: an unknown kind, or a width that is not a number of seconds.
    """

    kind: str
    seconds: float
    chosen_on: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in FILTERS:
            raise UsageError(explain("Unknown smoothing", got=self.kind, choices=FILTERS))
        if not 0 <= float(self.seconds) < np.inf:
            raise UsageError(explain("The smoothing width must be >= 0 seconds", got=self.seconds))

    @property
    def summary(self) -> dict[str, str | float]:
        """The entry of `metrics.json`."""
        return {"kind": self.kind, "seconds": self.seconds, "chosen_on": self.chosen_on}

    def apply(self, trace: Trace) -> Trace:
        """The trace with smoothed valence and arousal, within [-1, 1]; regions stay as they are.

        Variances are averaged over the same width; their calibration belongs to the smoothed trace.
        """
        if not self.seconds:
            return trace
        va = FILTERS[self.kind](trace.clip.time, trace.va, self.seconds)
        std = trace.std
        if std is not None:
            std = np.sqrt(moving_average(trace.clip.time, np.square(std), self.seconds).clip(min=0))
        return replace(trace, va=np.clip(va, -1, 1), std=std)


def smoothed(traces: Iterable[Trace], smoothing: Smoothing | None) -> Iterator[Trace]:
    """Every trace, smoothed where there is a smoothing."""
    for trace in traces:
        yield trace if smoothing is None else smoothing.apply(trace)


def candidate_widths(traces: Sequence[Trace], step: float) -> list[float]:
    """Widths to try, in seconds: multiples of the interval between samples, or between frames if that is longer.

    Args:
        step: seconds between samples of the run's windows.
    """
    frames = float(np.median([median_interval(trace.clip.time, step) for trace in traces])) if traces else step
    return [max(step, frames) * multiple for multiple in MULTIPLES]


def choose_width(traces: Sequence[Trace], kind: str, split: str, widths: Sequence[float]) -> Smoothing:
    """The width with the best mean CCC on labelled traces, or none; a wider one must gain at least `LEAST_GAIN`.

    Raises:
        UsageError: an unknown kind, or nothing is labelled.
    """
    options = [Smoothing(kind, seconds) for seconds in (0.0, *sorted(widths))]
    scores = {option.seconds: float(score(smoothed(traces, option))[2]) for option in options}
    if not np.isfinite(list(scores.values())).all():
        raise UsageError(explain(f"Cannot choose a width: split {split!r} has no labelled frame"))
    best = 0.0
    for seconds, value in scores.items():
        if value > scores[best] + LEAST_GAIN:
            best = seconds
    return Smoothing(kind, best, split, {f"{seconds:g}": value for seconds, value in scores.items()})


def read_smoothing(run: Path) -> Smoothing | None:
    """The smoothing stored with a run; None where there is none.

    Raises:
        CorruptError: the file is damaged.
    """
    path = run / FILE
    try:
        return Smoothing(**json.loads(read_text(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(explain(f"{path} cannot be read", got=error)) from error


def write_smoothing(run: Path, smoothing: Smoothing | None) -> None:
    """Store the smoothing with a run, for every later prediction; None removes it."""
    if smoothing is None:
        (run / FILE).unlink(missing_ok=True)
    else:
        write_file(run / FILE, (json.dumps(asdict(smoothing), indent=2) + "\n"))
