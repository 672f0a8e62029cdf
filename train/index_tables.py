"""Which cached row each sample of each training window reads: pure functions on the times of one clip.

A table holds row numbers of a stream's embedding, or `NO_ROW`: the clip has ended, the input is missing, or the stream
has no sample close enough. Source: docs/choices.md, "Sampling grid", "Labels at sampled times" and "Nearest sample".
"""

from dataclasses import dataclass

import numpy as np

from vaflow.timeline import Bools, Floats, Grid, Ints, median_interval, nearest

NO_ROW = -1
_SLACK = 1e-6  # seconds: two writers' roundings of one instant


@dataclass(frozen=True)
class WindowTimes:
    """The windows of one clip.

    Attributes:
        grid, duration: that the windows were laid out with.
        start: [W] seconds.
        sample: [W, F] seconds of every output frame; equal instants are equal numbers.
        inside: [W, F] False beyond the clip's end; the first of each window is always True.
    """

    grid: Grid
    duration: float
    start: Floats
    sample: Floats
    inside: Bools


def window_times(grid: Grid, duration: float) -> WindowTimes:
    """Lay the grid's windows over a clip of `duration` seconds.

    Raises:
        UsageError: the duration is negative or not finite.
    """
    sample = grid.seconds(grid.window_ticks(duration))
    inside = sample < duration
    inside[:, 0] = True
    return WindowTimes(grid, duration, grid.seconds(grid.starts(duration)), sample, inside)


@dataclass(frozen=True)
class FrameTimes:
    """Times of one clip's visual rows.

    Attributes:
        time: [T] seconds.
        valid: [T] a face is visible.
        interval: seconds between two rows; None: their median.
    """

    time: Floats
    valid: Bools
    interval: float | None = None


@dataclass(frozen=True)
class AudioTimes:
    """Times of one clip's audio rows.

    Attributes:
        start: [V] seconds at which the stream's windows begin.
        time: [V, S] seconds of every step.
        valid: [V, S] the step has audio samples.
        length: seconds of a window; None: not stated by the stream.
        interval: seconds between two steps.
    """

    start: Floats
    time: Floats
    valid: Bools
    length: float | None
    interval: float


# The arrays of a stream without this clip.
NO_FRAMES = FrameTimes(np.zeros(0), np.zeros(0, bool))
NO_AUDIO = AudioTimes(np.zeros(0), np.zeros((0, 1)), np.zeros((0, 1), bool), None, 1.0)


@dataclass(frozen=True)
class StepTable:
    """What the windows of one clip read of one stream.

    Attributes:
        row: [W, S] row of the stream's embedding, its leading axes flattened; `NO_ROW` where missing or outside.
        inside: [W, S] within the clip.
        time: [W, S] seconds after the window's start, of the row, or of the step itself where no row is read.
    """

    row: Ints
    inside: Bools
    time: Floats


def frame_table(windows: WindowTimes, frames: FrameTimes) -> StepTable:
    """Visual streams: each output frame reads the nearest row within half an interval."""
    interval = frames.interval or median_interval(frames.time, windows.grid.step)
    row = _nearest_row(frames.time, frames.valid, windows.sample, interval)
    after = np.broadcast_to(windows.sample - windows.start[:, None], row.shape)
    return StepTable(np.where(windows.inside, row, NO_ROW), windows.inside, after)


def step_table(windows: WindowTimes, steps: int, audio: AudioTimes) -> StepTable:
    """Audio streams: each of a window's `steps` equal parts reads one row.

    A window that the stream has exactly is read step by step. Otherwise a part reads from the stream's window whose
    centre is nearest to the middle of the part, at the step nearest to that middle and within half an interval.
    """
    window = windows.grid.window
    begin = windows.start[:, None] + np.arange(steps) * (window / steps)
    inside = begin < windows.duration
    inside[:, 0] = True
    row, time = _steps_by_centre(audio, begin + window / steps / 2)
    same_layout = audio.length is not None and abs(audio.length - window) <= _SLACK and audio.time.shape[1] == steps
    if same_layout and audio.start.size:
        same = nearest(audio.start, windows.start)
        exact = np.flatnonzero(np.abs(audio.start[same] - windows.start) <= _SLACK)
        same = same[exact]
        row[exact] = np.where(audio.valid[same], same[:, None] * steps + np.arange(steps), NO_ROW)
        time[exact] = audio.time[same]
    return StepTable(np.where(inside, row, NO_ROW), inside, time - windows.start[:, None])


def _steps_by_centre(audio: AudioTimes, query: Floats) -> tuple[Ints, Floats]:
    """Row and time of the step to read at each `query` second, [W, S] each."""
    if audio.time.size == 0:
        return np.full(query.shape, NO_ROW, np.int64), query.copy()
    centre = audio.start + audio.length / 2 if audio.length else audio.time.mean(axis=1)
    chosen = nearest(centre, query)
    # One search for all: the times of each window are shifted into a separate range, far from the others.
    apart = 10 * (float(max(np.abs(audio.time).max(), np.abs(query).max())) + 1)
    count, steps = audio.time.shape
    line = (audio.time + apart * np.arange(count)[:, None]).ravel()
    row = _nearest_row(line, audio.valid.ravel(), query + apart * chosen, audio.interval)
    read = np.clip(row, 0, count * steps - 1)
    return row, np.where(row == NO_ROW, query, audio.time.ravel()[read])


def _nearest_row(time: Floats, valid: Bools, query: Floats, interval: float) -> Ints:
    """The row nearest in time to each query; `NO_ROW` beyond half an interval or where the input is missing."""
    if time.size == 0:
        return np.full(query.shape, NO_ROW, np.int64)
    # A step's middle often lies exactly between two rows: rounding must not choose now one, now the other.
    row = nearest(time, query - _SLACK)
    near = np.abs(time[row] - query) <= interval / 2 + _SLACK
    return np.where(near & valid[row], row, NO_ROW)


@dataclass(frozen=True)
class Targets:
    """Labels at the output frames of one clip's windows: value [W, F, K] (0 if not annotated), labelled likewise."""

    value: Floats
    labelled: Bools


def nearest_targets(windows: WindowTimes, time: Floats, value: Floats, valid: Bools) -> Targets:
    """The annotation nearest to each output frame, within half a step or half an annotation interval.

    Args:
        time: [R] seconds of the annotation rows.
        value: [R, K]; valid: [R, K] which values are annotated; K is 2, or the width of further targets.
    """
    if time.size == 0:
        return _no_targets(windows, value.shape[1])
    row = nearest(time, windows.sample)
    reach = max(median_interval(time), windows.grid.step) / 2 + _SLACK
    near = np.abs(time[row] - windows.sample) <= reach
    labelled = valid[row] & (near & windows.inside)[..., None]
    return Targets(np.where(labelled, value[row], 0.0), labelled)


def mean_targets(windows: WindowTimes, time: Floats, value: Floats, valid: Bools) -> Targets:
    """The mean of all annotations within half a step of each output frame; arguments as of `nearest_targets`."""
    if time.size == 0:
        return _no_targets(windows, value.shape[1])
    half = windows.grid.step / 2
    first = np.searchsorted(time, windows.sample - half - _SLACK)
    last = np.searchsorted(time, windows.sample + half - _SLACK)
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
