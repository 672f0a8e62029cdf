"""Smoothing of a trace in time: a moving average, or a local polynomial (Savitzky-Golay), with its width in seconds.

Frames need not be regular: both filters look at the frames whose presentation times lie within the width, and the
polynomial is fitted to those times. On regular frames they are the textbook filters.

Source: A. Savitzky, M. J. E. Golay, Analytical Chemistry 36 (1964) 1627. Ours: the papers do not smooth.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from vaflow.errors import CorruptError, UsageError, explain
from vaflow.files import write_file
from vaflow.timeline import Floats, Ints
from vaflow.train.evaluate import Trace, score

ORDER = 2  # of the polynomial; in the middle of regular frames, 3 gives the same
WIDTHS = (0.2, 0.4, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)  # seconds that are tried, beside no smoothing
FILE = "smoothing.json"
_SLACK = 1e-6  # seconds: two roundings of one instant
_CELLS = 4_000_000  # of the largest array that is made at once


def moving_average(time: Floats, value: Floats, seconds: float) -> Floats:
    """The mean of all frames within `seconds` / 2 of each frame, or as much of that as the clip has.

    Args:
        time: [N] seconds, ascending.
        value: [N, K].
        seconds: width of the window.

    Returns:
        [N, K]. On regular frames: convolution with a box, divided by how much of the box lies in the clip.

    Raises:
        ValueError: shapes disagree, or the width is negative.
    """
    time, value = _checked(time, value, seconds)
    first, last = _reach(time, time, seconds)
    middle = value.mean(axis=0) if len(value) else 0.0  # sums of small numbers keep their digits
    sums = np.concatenate([np.zeros((1, value.shape[1])), np.cumsum(value - middle, axis=0)])
    mean: Floats = (sums[last] - sums[first]) / (last - first)[:, None] + middle
    return np.where((last - first == 1)[:, None], value, mean)


def savitzky_golay(time: Floats, value: Floats, seconds: float, order: int = ORDER) -> Floats:
    """At each frame, the polynomial that fits the frames around it best (least squares), read at its time.

    Near the ends the window stays within the clip, and the frame lies off its middle. A window with few frames takes a
    polynomial of lower order.

    Args:
        time: [N] seconds, ascending.
        value: [N, K].
        seconds: width of the window.
        order: of the polynomial.

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
    out = np.empty_like(value)
    rows = max(1, _CELLS // int((last - first).max()))
    for begin in range(0, len(time), rows):
        part = slice(begin, begin + rows)
        out[part] = _fitted(time, value, first[part], last[part], time[part], half, order)
    return out


def _fitted(time: Floats, value: Floats, first: Ints, last: Ints, at: Floats, half: float, order: int) -> Floats:
    """Polynomials through frames first .. last - 1 of every row, read at `at`: [R, K]."""
    near = first[:, None] + np.arange(int((last - first).max()))
    there = near < last[:, None]
    near = np.minimum(near, len(time) - 1)
    u = np.where(there, time[near] - at[:, None], 0.0) / half  # the frame itself is at 0: read there, only the constant
    powers = u[..., None] ** np.arange(order + 1) * there[..., None]
    powers *= np.arange(order + 1) < _distinct(u, there)[:, None, None]
    gram = powers.transpose(0, 2, 1) @ powers
    weights = np.linalg.pinv(gram, rcond=1e-12, hermitian=True)[:, 0]  # of the powers in the constant
    kernel = (powers @ weights[..., None])[..., 0]
    result: Floats = np.einsum("rm,rmk->rk", kernel, value[near])
    return result


def _distinct(u: Floats, there: np.ndarray) -> Ints:
    """[R] how many different instants each row has: a polynomial may have that many terms."""
    new = np.diff(u, axis=1) > _SLACK
    return 1 + (new & there[:, 1:]).sum(axis=1)


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
    """How a run's traces are smoothed.

    Attributes:
        kind: a key of `FILTERS`.
        seconds: width; 0: not at all.
        chosen_on: the split on which the width was chosen; empty: it was given.
        scores: mean CCC on that split by width, as far as widths were tried.

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
            raise UsageError(explain("A width must be a number of seconds", expected="0 or more", got=self.seconds))

    @property
    def summary(self) -> dict[str, str | float]:
        """What metrics say of it."""
        return {"kind": self.kind, "seconds": self.seconds, "chosen_on": self.chosen_on}

    def apply(self, trace: Trace) -> Trace:
        """The trace with smoothed valence and arousal, within [-1, 1]; regions stay as they are."""
        if not self.seconds:
            return trace
        va = FILTERS[self.kind](trace.clip.time, trace.va, self.seconds)
        return replace(trace, va=np.clip(va, -1, 1))


def smoothed(traces: Iterable[Trace], smoothing: Smoothing | None) -> Iterator[Trace]:
    """Every trace, smoothed where there is a smoothing."""
    for trace in traces:
        yield trace if smoothing is None else smoothing.apply(trace)


def choose_width(traces: Sequence[Trace], kind: str, split: str, widths: Sequence[float] = WIDTHS) -> Smoothing:
    """The width, or none, with the best mean CCC on labelled traces; of equal ones, the smaller.

    Raises:
        UsageError: an unknown kind, or nothing is labelled.
    """
    scores = {seconds: float(score(smoothed(traces, Smoothing(kind, seconds)))[2]) for seconds in (0.0, *widths)}
    if not np.isfinite(list(scores.values())).all():
        raise UsageError(explain(f"No width can be chosen on split {split!r}", expected="labelled frames"))
    best = max(scores, key=lambda seconds: (scores[seconds], -seconds))
    return Smoothing(kind, best, split, {f"{seconds:g}": value for seconds, value in scores.items()})


def read_smoothing(run: Path) -> Smoothing | None:
    """The smoothing that is kept beside a run; None where there is none.

    Raises:
        CorruptError: the file is damaged.
    """
    path = run / FILE
    try:
        return Smoothing(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(explain(f"{path} cannot be read", got=error)) from error


def write_smoothing(run: Path, smoothing: Smoothing | None) -> None:
    """Keep the smoothing beside a run, for every later prediction; None: forget what is there."""
    if smoothing is None:
        (run / FILE).unlink(missing_ok=True)
    else:
        write_file(run / FILE, (json.dumps(asdict(smoothing), indent=2) + "\n"))
