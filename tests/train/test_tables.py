"""Index tables against loops that look at every sample."""

import numpy as np
import pytest

from vaflow.timeline import Grid, median_interval
from vaflow.train.index_tables import (
    NOTHING,
    SILENCE,
    SoundTimes,
    frame_table,
    mean_targets,
    nearest_targets,
    step_table,
    window_times,
)

GRIDS = [Grid(), Grid(4, 1.5, 8), Grid(6, 2, 10), Grid(3, 3, 5)]
DURATIONS = [0.3, 3.99, 10.0, 27.31]


def closest(time, t):
    """Index of the nearest time, the earlier of two: by looking at all."""
    best = 0
    for i in range(len(time)):
        if abs(time[i] - t) < abs(time[best] - t) - 1e-12:
            best = i
    return best


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("duration", DURATIONS)
def test_first_sample_is_inside_and_outside_is_a_suffix(grid: Grid, duration: float) -> None:
    windows = window_times(grid, duration)
    assert windows.inside[:, 0].all()
    assert (np.diff(windows.inside.astype(int), axis=1) <= 0).all()
    assert (windows.inside == (windows.sample < duration)).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("interval", [0.5, 0.2, 1.0])
def test_frames_read_the_nearest_sample_or_nothing(grid: Grid, interval: float) -> None:
    rng = np.random.default_rng(1)
    duration = 23.7
    time = np.arange(0, duration, interval)
    time = time[(time < 8) | (time > 13)]  # a stretch that was never sampled
    valid = rng.random(len(time)) > 0.2
    windows = window_times(grid, duration)
    table = frame_table(windows, time, valid, interval)
    for w, row in enumerate(windows.sample):
        for k, t in enumerate(row):
            i = closest(time, t)
            reads = t < duration and valid[i] and abs(time[i] - t) <= interval / 2 + 1e-6
            assert table.row[w, k] == (i if reads else NOTHING)
    assert (table.row == NOTHING).any() and (table.row != NOTHING).any()


def test_frames_of_the_extraction_grid_are_read_exactly() -> None:
    grid, duration = Grid(), 41.3
    time = grid.sample_times(duration)
    windows = window_times(grid, duration)
    table = frame_table(windows, time, np.ones(len(time), bool), grid.step)
    assert (time[table.row[windows.inside]] == windows.sample[windows.inside]).all()
    assert (table.row[~windows.inside] == NOTHING).all()


def sound_of(grid: Grid, steps: int, duration: float, rng: np.random.Generator) -> SoundTimes:
    start = grid.seconds(grid.starts(duration))
    time = start[:, None] + (np.arange(steps) + 0.58) * grid.window / steps
    return SoundTimes(start, time, rng.random(time.shape) > 0.15, grid.window, grid.window / steps)


def test_same_windows_are_read_step_by_step() -> None:
    grid, duration, steps = Grid(), 44.6, 20
    sound = sound_of(grid, steps, duration, np.random.default_rng(0))
    windows = window_times(grid, duration)
    table = step_table(windows, duration, grid.window, steps, sound)
    begin = windows.start[:, None] + np.arange(steps) * 0.5
    reads = (begin < duration) & sound.valid
    expected = np.arange(sound.time.size).reshape(sound.time.shape)
    assert (table.row == np.where(reads, expected, NOTHING)).all()
    np.testing.assert_allclose(table.time, np.broadcast_to(0.5 * np.arange(steps) + 0.29, table.time.shape), atol=1e-9)


@pytest.mark.parametrize("other", [Grid(6, 2, 12), Grid(15, 4, 30), Grid(10, 5, 20)])
def test_other_windows_read_the_window_whose_centre_is_nearest(other: Grid) -> None:
    grid, duration = Grid(), 44.6
    sound = sound_of(grid, 20, duration, np.random.default_rng(0))
    windows = window_times(other, duration)
    steps = round(other.window / 0.5)
    table = step_table(windows, duration, other.window, steps, sound)
    centre = sound.start + 5
    same = {round(s, 6): v for v, s in enumerate(sound.start)} if other.window == grid.window else {}
    for w, start in enumerate(windows.start):
        for k in range(steps):
            t = start + (k + 0.5) * 0.5
            exact = round(start, 6) in same
            v = same[round(start, 6)] if exact else closest(centre, t)
            j = k if exact else closest(sound.time[v], t)
            near = exact or abs(sound.time[v, j] - t) <= 0.25 + 1e-6
            reads = start + k * 0.5 < duration and sound.valid[v, j] and near
            assert table.row[w, k] == (v * 20 + j if reads else NOTHING)
            if reads:
                assert table.time[w, k] == pytest.approx(sound.time[v, j] - start)


def test_one_long_sequence_is_sliced() -> None:
    """Features made elsewhere: one 'window' over the whole clip, at 25 Hz."""
    duration = 33.0
    time = np.arange(0.02, duration, 0.04)
    sound = SoundTimes(time[:1], time[None], np.ones((1, len(time)), bool), None, 0.04)
    grid = Grid()
    table = step_table(window_times(grid, duration), duration, 10.0, 250, sound)
    for w, start in enumerate(window_times(grid, duration).start):
        first = round(start / 0.04)
        expected = np.arange(first, first + 250)
        assert (table.row[w] == np.where(expected < len(time), expected, NOTHING)).all()


def test_a_stream_without_the_clip_is_missing_not_outside() -> None:
    windows = window_times(Grid(), 12.0)
    table = step_table(windows, 12.0, 10.0, 20, SILENCE)
    assert (table.row == NOTHING).all()
    assert (table.inside == windows.inside).all()
    assert (frame_table(windows, np.zeros(0), np.zeros(0, bool), 0.5).row == NOTHING).all()


def annotation(rng: np.random.Generator, rate: float, duration: float):
    time = np.sort(rng.uniform(0, duration, int(rate * duration)))  # a variable frame rate
    valid = np.repeat(rng.random((len(time) // 10 + 1, 2)) > 0.3, 10, axis=0)[: len(time)]
    return time, np.where(valid, rng.uniform(-1, 1, (len(time), 2)), np.nan), valid


@pytest.mark.parametrize("rate", [1.0, 7.0, 30.0])
def test_targets_are_those_of_the_nearest_frame(rate: float) -> None:
    grid, duration = Grid(4, 1.5, 8), 19.3
    time, value, valid = annotation(np.random.default_rng(3), rate, duration)
    windows = window_times(grid, duration)
    targets = nearest_targets(windows, time, value, valid, grid.step)
    reach = max(median_interval(time), grid.step) / 2 + 1e-6
    for w, k in np.ndindex(windows.sample.shape):
        t = windows.sample[w, k]
        i = closest(time, t)
        for d in range(2):
            there = t < duration and valid[i, d] and abs(time[i] - t) <= reach
            assert targets.labelled[w, k, d] == there
            assert targets.value[w, k, d] == (value[i, d] if there else 0)


def test_mean_targets_average_their_bin() -> None:
    grid, duration = Grid(4, 1.5, 8), 19.3
    time, value, valid = annotation(np.random.default_rng(4), 12.0, duration)
    windows = window_times(grid, duration)
    targets = mean_targets(windows, time, value, valid, grid.step)
    for w, k in np.ndindex(windows.sample.shape):
        t = windows.sample[w, k]
        bin_ = (time >= t - grid.step / 2) & (time < t + grid.step / 2)
        for d in range(2):
            own = value[bin_ & valid[:, d], d]
            there = bool(len(own)) and t < duration
            assert targets.labelled[w, k, d] == there
            assert targets.value[w, k, d] == pytest.approx(own.mean() if there else 0)


@pytest.mark.parametrize("reduce", [nearest_targets, mean_targets])
def test_no_annotation_no_targets(reduce) -> None:
    windows = window_times(Grid(), 12.0)
    targets = reduce(windows, np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2), bool), 0.5)
    assert not targets.labelled.any() and targets.value.shape == (*windows.sample.shape, 2)
