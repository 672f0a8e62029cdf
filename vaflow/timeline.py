"""The sampling grid of a clip: times of its windows and samples.

Pure functions on seconds from the start of a clip. Window and grid positions are whole numbers of *ticks* (the greatest
common divisor of stride and step), so that a time that two windows share has exactly one value and every frame is
encoded once. Source: arXiv 2603.13415, section 3 (10-s windows, stride 3 s, 20 frames).
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, gcd

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import UsageError, explain

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """Windows of `window` seconds every `stride` seconds, each with `frames` samples `window / frames` seconds apart.

    Window starts are multiples of the stride; the last one starts at ceil((D - window) / step) * step for a clip of
    D seconds, so that it stays on the grid and its last sample lies less than one step before the end. A clip shorter
    than one window is one padded window.

    Raises:
        UsageError: a value is not positive, or the stride exceeds the window (some frames would be in no window).
    """

    window: float = 10.0
    stride: float = 3.0
    frames: int = 20

    def __post_init__(self) -> None:
        for name in ("window", "stride", "frames"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise UsageError(explain(f"{name} must be positive", expected="a number above 0", got=value))
        if self.frames != int(self.frames):
            raise UsageError(explain("frames must be whole", expected="a whole number of frames", got=self.frames))
        if self.stride > self.window:
            problem = "The stride is longer than the window, so some frames would be in no window"
            expected = f"a stride of at most {self.window:g} s"
            raise UsageError(explain(problem, expected=expected, got=f"{self.stride:g} s"))

    @cached_property
    def _exact(self) -> tuple[Fraction, Fraction, Fraction]:
        """(window, stride, step) as exact decimals, as given by the user."""
        window = Fraction(str(self.window))
        return window, Fraction(str(self.stride)), window / int(self.frames)

    @cached_property
    def tick(self) -> Fraction:
        """Seconds per tick: the greatest common divisor of stride and step."""
        _, stride, step = self._exact
        return Fraction(
            gcd(stride.numerator * step.denominator, step.numerator * stride.denominator),
            stride.denominator * step.denominator,
        )

    @property
    def step(self) -> float:
        """Seconds between two samples of a window."""
        return float(self._exact[2])

    def seconds(self, ticks: Ints) -> Floats:
        """Convert ticks to seconds, correctly rounded (one division, no accumulated error)."""
        return np.asarray(ticks, np.float64) * self.tick.numerator / self.tick.denominator

    def starts(self, duration: float) -> Ints:
        """Return window starts in ticks, [W], ascending, for a clip of `duration` seconds.

        Raises:
            UsageError: the duration is negative or not finite.
        """
        if not (np.isfinite(duration) and duration >= 0):
            raise UsageError(explain("A clip's duration must be finite", expected="seconds >= 0", got=duration))
        window, stride, step = self._exact
        # A duration of 9.999999999 s is 10 s with rounding error: it does not add a window.
        last = max(Fraction(0), ceil((Fraction(duration) - window) / step - Fraction(1, 10**6)) * step)
        last_tick, stride_ticks = int(last / self.tick), int(stride / self.tick)
        regular = np.arange(0, last_tick, stride_ticks, dtype=np.int64)
        return np.append(regular, last_tick).astype(np.int64)

    def window_ticks(self, duration: float) -> Ints:
        """Return sample positions of every window in ticks, [W, frames]; those at or after `duration` are padding."""
        offsets = np.arange(int(self.frames), dtype=np.int64) * int(self._exact[2] / self.tick)
        return self.starts(duration)[:, None] + offsets

    def sample_ticks(self, duration: float) -> Ints:
        """Return the ticks of all samples within the clip, [T], ascending and unique: the frames to encode."""
        ticks = np.unique(self.window_ticks(duration))
        inside = self.seconds(ticks) < max(duration, np.finfo(np.float64).tiny)
        return ticks[inside]

    def sample_times(self, duration: float) -> Floats:
        """`sample_ticks` in seconds, [T]."""
        return self.seconds(self.sample_ticks(duration))


def nearest(times: Floats, queries: Floats) -> Ints:
    """Return the index of the time nearest to each query; of two equally near ones, the earlier.

    Args:
        times: [N] seconds, ascending, N >= 1.
        queries: [...] seconds.

    Returns:
        [...] indices into `times`.

    Raises:
        ValueError: `times` is empty.
    """
    times = np.asarray(times, np.float64)
    queries = np.asarray(queries, np.float64)
    if times.size == 0:
        raise ValueError("nearest: times is empty")
    after = np.clip(np.searchsorted(times, queries), 0, times.size - 1)
    before = np.clip(after - 1, 0, None)
    return np.where(queries - times[before] <= times[after] - queries, before, after)


def isolated_rows(values: Floats) -> list[int]:
    """Rows of a trace [N] with a value between rows without one (NaN): no line leads to them."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return [int(row) for row in np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])]


def median_interval(times: Floats, default: float = 1 / 30) -> float:
    """Return the median seconds between successive times; `default` if there are fewer than two."""
    gaps = np.diff(np.asarray(times, np.float64))
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) if gaps.size else default


def extend(times: Floats, count: int) -> Floats:
    """Continue `times` [N] at the median interval to `count` entries, for annotation rows beyond the last frame."""
    times = np.asarray(times, np.float64)
    extra = count - times.size
    if extra <= 0:
        return times
    start = times[-1] if times.size else -median_interval(times)
    return np.concatenate([times, start + median_interval(times) * np.arange(1, extra + 1)])
