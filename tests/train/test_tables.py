"""Index tables equal loops over all samples."""

import numpy as np
import pytest

from vaflow.timeline import Grid, median_interval
from vaflow.train.index_tables import (
    NO_AUDIO,
    NO_FRAMES,
    NO_ROW,
    AudioTimes,
    FrameTimes,
    frame_table,
    mean_targets,
    nearest_targets,
    step_table,
    window_times,
)

GRIDS = [Grid(), Grid(4, 1.5, 8), Grid(6, 2, 10), Grid(3, 3, 5)]
DURATIONS = [0.3, 3.99, 10.0, 27.31]


def closest(time, t):
    """Index of the nearest time, the earlier of two, by exhaustive search."""
    best = 0
    for i in range(len(time)):
        if abs(time[i] - t) < abs(time[best] - t) - 1e-12:
            best = i
    return best


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("duration", DURATIONS)
def test_windows_start_inside_the_clip_and_padding_is_a_suffix(grid: Grid, duration: float) -> None:
    windows = window_times(grid, duration)
    assert windows.inside[:, 0].all()
    assert (np.diff(windows.inside.astype(int), axis=1) <= 0).all()
    assert (windows.inside == (windows.sample < duration)).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("interval", [0.5, 0.2, 1.0])
def test_frames_read_the_nearest_sample_within_tolerance(grid: Grid, interval: float) -> None:
    rng = np.random.default_rng(1)
    duration = 23.7
    time = np.arange(0, duration, interval)
    time = time[(time < 8) | (time > 13)]  # an interval without samples
    valid = rng.random(len(time)) > 0.2
    windows = window_times(grid, duration)
    table = frame_table(windows, FrameTimes(time, valid, interval))
    for w, row in enumerate(windows.sample):
        for k, t in enumerate(row):
            i = closest(time, t)
            reads = t < duration and valid[i] and abs(time[i] - t) <= interval / 2 + 1e-6
            assert table.row[w, k] == (i if reads else NO_ROW)
    assert (table.row == NO_ROW).any() and (table.row != NO_ROW).any()


def test_frames_of_the_extraction_grid_are_read_exactly() -> None:
    grid, duration = Grid(), 41.3
    time = grid.sample_times(duration)
    windows = window_times(grid, duration)
    table = frame_table(windows, FrameTimes(time, np.ones(len(time), bool), grid.step))
    assert (time[table.row[windows.inside]] == windows.sample[windows.inside]).all()
    assert (table.row[~windows.inside] == NO_ROW).all()


def audio_times(grid: Grid, steps: int, duration: float, rng: np.random.Generator) -> AudioTimes:
    start = grid.seconds(grid.starts(duration))
    time = start[:, None] + (np.arange(steps) + 0.58) * grid.window / steps
    return AudioTimes(start, time, rng.random(time.shape) > 0.15, grid.window, grid.window / steps)


def test_same_windows_are_read_step_by_step() -> None:
    grid, duration, steps = Grid(), 44.6, 20
    audio = audio_times(grid, steps, duration, np.random.default_rng(0))
    windows = window_times(grid, duration)
    table = step_table(windows, steps, audio)
    begin = windows.start[:, None] + np.arange(steps) * 0.5
    reads = (begin < duration) & audio.valid
    expected = np.arange(audio.time.size).reshape(audio.time.shape)
    assert (table.row == np.where(reads, expected, NO_ROW)).all()
    np.testing.assert_allclose(table.time, np.broadcast_to(0.5 * np.arange(steps) + 0.29, table.time.shape), atol=1e-9)


@pytest.mark.parametrize("other", [Grid(6, 2, 12), Grid(15, 4, 30), Grid(10, 5, 20)])
def test_other_windows_read_the_nearest_window_centre(other: Grid) -> None:
    grid, duration = Grid(), 44.6
    audio = audio_times(grid, 20, duration, np.random.default_rng(0))
    windows = window_times(other, duration)
    steps = round(other.window / 0.5)
    table = step_table(windows, steps, audio)
    centre = audio.start + 5
    same = {round(s, 6): v for v, s in enumerate(audio.start)} if other.window == grid.window else {}
    for w, start in enumerate(windows.start):
        for k in range(steps):
            t = start + (k + 0.5) * 0.5
            exact = round(start, 6) in same
            v = same[round(start, 6)] if exact else closest(centre, t)
            j = k if exact else closest(audio.time[v], t)
            near = exact or abs(audio.time[v, j] - t) <= 0.25 + 1e-6
            reads = start + k * 0.5 < duration and audio.valid[v, j] and near
            assert table.row[w, k] == (v * 20 + j if reads else NO_ROW)
            if reads:
                assert table.time[w, k] == pytest.approx(audio.time[v, j] - start)


def test_one_long_sequence_is_sliced() -> None:
    """Imported features: one "window" over the whole clip, at 25 Hz."""
    duration = 33.0
    time = np.arange(0.02, duration, 0.04)
    audio = AudioTimes(time[:1], time[None], np.ones((1, len(time)), bool), None, 0.04)
    grid = Grid()
    table = step_table(window_times(grid, duration), 250, audio)
    for w, start in enumerate(window_times(grid, duration).start):
        first = round(start / 0.04)
        expected = np.arange(first, first + 250)
        assert (table.row[w] == np.where(expected < len(time), expected, NO_ROW)).all()


def test_a_clip_missing_from_a_stream_is_marked_missing() -> None:
    windows = window_times(Grid(), 12.0)
    table = step_table(windows, 20, NO_AUDIO)
    assert (table.row == NO_ROW).all()
    assert (table.inside == windows.inside).all()
    assert (frame_table(windows, NO_FRAMES).row == NO_ROW).all()


def annotation(rng: np.random.Generator, rate: float, duration: float):
    time = np.sort(rng.uniform(0, duration, int(rate * duration)))  # a variable frame rate
    valid = np.repeat(rng.random((len(time) // 10 + 1, 2)) > 0.3, 10, axis=0)[: len(time)]
    return time, np.where(valid, rng.uniform(-1, 1, (len(time), 2)), np.nan), valid


@pytest.mark.parametrize("rate", [1.0, 7.0, 30.0])
def test_targets_come_from_the_nearest_frame(rate: float) -> None:
    grid, duration = Grid(4, 1.5, 8), 19.3
    time, value, valid = annotation(np.random.default_rng(3), rate, duration)
    windows = window_times(grid, duration)
    targets = nearest_targets(windows, time, value, valid)
    reach = max(median_interval(time), grid.step) / 2 + 1e-6
    for w, k in np.ndindex(windows.sample.shape):
        t = windows.sample[w, k]
        i = closest(time, t)
        for d in range(2):
            labelled = t < duration and valid[i, d] and abs(time[i] - t) <= reach
            assert targets.labelled[w, k, d] == labelled
            assert targets.value[w, k, d] == (value[i, d] if labelled else 0)


def test_mean_targets_average_their_bin() -> None:
    grid, duration = Grid(4, 1.5, 8), 19.3
    time, value, valid = annotation(np.random.default_rng(4), 12.0, duration)
    windows = window_times(grid, duration)
    targets = mean_targets(windows, time, value, valid)
    for w, k in np.ndindex(windows.sample.shape):
        t = windows.sample[w, k]
        bin_ = (time >= t - grid.step / 2) & (time < t + grid.step / 2)
        for d in range(2):
            values = value[bin_ & valid[:, d], d]
            labelled = bool(len(values)) and t < duration
            assert targets.labelled[w, k, d] == labelled
            assert targets.value[w, k, d] == pytest.approx(values.mean() if labelled else 0)


@pytest.mark.parametrize("reduce", [nearest_targets, mean_targets])
def test_clips_without_annotation_have_no_targets(reduce) -> None:
    windows = window_times(Grid(), 12.0)
    targets = reduce(windows, np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2), bool))
    assert not targets.labelled.any() and targets.value.shape == (*windows.sample.shape, 2)
