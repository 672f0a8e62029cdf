"""Which cached row every sample of every training window reads: pure functions on the times of one clip.

A table holds row numbers of a stream's embedding; `NOTHING` stands where there is none to read: the clip has ended,
the input is missing, or the stream has no sample near enough. Source: docs/choices.md, "Sampling grid",
"Labels at sampled times" and "Nearest sample".
"""

from dataclasses import dataclass

import numpy as np

from vaflow.timeline import Bools, Floats, Grid, Ints, median_interval, nearest

NOTHING = -1
_SLACK = 1e-6  # seconds: two writers' roundings of one instant


@dataclass(frozen=True)
class WindowTimes:
    """The windows of one clip.

    Attributes:
        start: [W] seconds.
        sample: [W, F] seconds of every output frame; equal instants are equal numbers.
        inside: [W, F] False beyond the clip's end; the first of each window is always True.
    """

    start: Floats
    sample: Floats
    inside: Bools


def window_times(grid: Grid, duration: float) -> WindowTimes:
    """Lay the grid's windows over a clip of `duration` seconds.

    Raises:
        UsageError: the duration is negative or not finite.
    """
    start = grid.seconds(grid.starts(duration))
    sample = grid.seconds(grid.window_ticks(duration))
    inside = sample < duration
    inside[:, 0] = True
    return WindowTimes(start, sample, inside)


@dataclass(frozen=True)
class StepTable:
    """What the windows of one clip read of one stream.

    Attributes:
        row: [W, S] row of the stream's embedding, its leading axes flattened; `NOTHING` where missing or outside.
        inside: [W, S] within the clip.
        time: [W, S] seconds after the window's start; where nothing is read, when it would have been.
    """

    row: Ints
    inside: Bools
    time: Floats


def frame_table(windows: WindowTimes, time: Floats, valid: Bools, interval: float) -> StepTable:
    """Visual streams: the sample nearest to every output frame, if it is within half an interval.

    Args:
        windows: of the clip.
        time: [T] seconds of the stream's samples.
        valid: [T] the input is there.
        interval: seconds between its samples.
    """
    row = _nearest_row(time, valid, windows.sample, interval)
    after = np.broadcast_to(windows.sample - windows.start[:, None], row.shape)
    return StepTable(np.where(windows.inside, row, NOTHING), windows.inside, after)


@dataclass(frozen=True)
class SoundTimes:
    """Where the rows of one clip's audio stream lie.

    Attributes:
        start: [V] seconds at which its windows begin.
        time: [V, S] seconds of every step.
        valid: [V, S] there was sound under the step.
        length: seconds of a window, or None where the stream does not say.
        interval: seconds between two steps.
    """

    start: Floats
    time: Floats
    valid: Bools
    length: float | None
    interval: float

    @property
    def centre(self) -> Floats:
        """[V] seconds: the middle of every window."""
        return self.start + self.length / 2 if self.length else self.time.mean(axis=1)


SILENCE = SoundTimes(np.zeros(0), np.zeros((0, 1)), np.zeros((0, 1), bool), None, 1.0)  # a stream without this clip


def step_table(windows: WindowTimes, duration: float, window: float, steps: int, sound: SoundTimes) -> StepTable:
    """Audio streams: step k of a window stands for its k-th part of `window / steps` seconds.

    A window that the stream has exactly is read as it is. Otherwise, at time t, the stream's window whose centre is
    nearest is read, at its step nearest to t, if that is within half an interval.
    """
    part = window / steps
    begin = windows.start[:, None] + np.arange(steps) * part
    inside = begin < duration
    inside[:, 0] = True
    middle = begin + part / 2
    row, time = _steps_by_centre(sound, middle)
    same = _same_window(sound, windows.start, window, steps)
    exact = np.flatnonzero(same >= 0)
    if exact.size:
        row[exact] = same[exact, None] * steps + np.arange(steps)
        time[exact] = sound.time[same[exact]]
        row[exact] = np.where(sound.valid[same[exact]], row[exact], NOTHING)
    return StepTable(np.where(inside, row, NOTHING), inside, time - windows.start[:, None])


def _same_window(sound: SoundTimes, start: Floats, window: float, steps: int) -> Ints:
    """[W] the stream's window that is exactly this training window; `NOTHING` where it has none."""
    other = sound.length is None or abs(sound.length - window) > _SLACK or sound.time.shape[1] != steps
    if other or not sound.start.size:
        return np.full(start.shape, NOTHING, np.int64)
    found = nearest(sound.start, start)
    return np.where(np.abs(sound.start[found] - start) <= _SLACK, found, NOTHING)


def _steps_by_centre(sound: SoundTimes, query: Floats) -> tuple[Ints, Floats]:
    """Row and time of the step to read at each `query` second, [W, S] each."""
    if sound.time.size == 0:
        return np.full(query.shape, NOTHING, np.int64), query.copy()
    chosen = nearest(sound.centre, query)
    # One search for all: every window's times are moved into a range of their own, far from the others'.
    apart = 10 * (float(max(np.abs(sound.time).max(), np.abs(query).max())) + 1)
    count, steps = sound.time.shape
    line = (sound.time + apart * np.arange(count)[:, None]).ravel()
    row = _nearest_row(line, sound.valid.ravel(), query + apart * chosen, sound.interval)
    read = np.clip(row, 0, count * steps - 1)
    return row, np.where(row == NOTHING, query, sound.time.ravel()[read])


def _nearest_row(time: Floats, valid: Bools, query: Floats, interval: float) -> Ints:
    """The row nearest in time to each query; `NOTHING` beyond half an interval or where the input is missing."""
    if time.size == 0:
        return np.full(query.shape, NOTHING, np.int64)
    # A step's middle often lies exactly between two rows: rounding must not choose now one, now the other.
    row = nearest(time, query - _SLACK)
    near = np.abs(time[row] - query) <= interval / 2 + _SLACK
    return np.where(near & valid[row], row, NOTHING)


@dataclass(frozen=True)
class Targets:
    """Labels at the output frames of one clip's windows: value [W, F, 2] (0 where there is none), labelled likewise."""

    value: Floats
    labelled: Bools


def nearest_targets(windows: WindowTimes, time: Floats, value: Floats, valid: Bools, step: float) -> Targets:
    """The annotation of the frame nearest by presentation time, if there is one about as near as samples are apart.

    Args:
        windows: of the clip.
        time: [R] seconds of the annotation rows.
        value: [R, K]; valid: [R, K] which of it is annotated; K is 2, or the width of further targets.
        step: seconds between output frames.
    """
    if time.size == 0:
        return _no_targets(windows, value.shape[1])
    row = nearest(time, windows.sample)
    near = np.abs(time[row] - windows.sample) <= max(median_interval(time), step) / 2 + _SLACK
    labelled = valid[row] & (near & windows.inside)[..., None]
    return Targets(np.where(labelled, value[row], 0.0), labelled)


def mean_targets(windows: WindowTimes, time: Floats, value: Floats, valid: Bools, step: float) -> Targets:
    """The mean of all annotations within half a step of the output frame; arguments as of `nearest_targets`."""
    if time.size == 0:
        return _no_targets(windows, value.shape[1])
    first = np.searchsorted(time, windows.sample - step / 2 - _SLACK)
    last = np.searchsorted(time, windows.sample + step / 2 - _SLACK)
    zero = np.zeros((1, 2))
    sums = np.concatenate([zero, np.cumsum(np.where(valid, value, 0.0), axis=0)])
    counts = np.concatenate([zero, np.cumsum(valid, axis=0)])
    count = counts[last] - counts[first]
    labelled = (count > 0) & windows.inside[..., None]
    mean = (sums[last] - sums[first]) / np.maximum(count, 1)
    return Targets(np.where(labelled, np.clip(mean, -1, 1), 0.0), labelled)


def _no_targets(windows: WindowTimes, width: int) -> Targets:
    shape = (*windows.sample.shape, width)
    return Targets(np.zeros(shape), np.zeros(shape, bool))
