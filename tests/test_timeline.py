"""The sampling grid, window plan and stitching against brute-force loops on exact fractions."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaflow.errors import UsageError
from vaflow.timeline import Grid, extend, median_interval, nearest
from vaflow.train.traces import stitch

GRIDS = [Grid(), Grid(10, 3, 16), Grid(10, 10, 20), Grid(4, 1.5, 7), Grid(12, 5, 300), Grid(0.7, 0.3, 3), Grid(2, 2, 1)]
DURATIONS = [0.0, 0.2, 0.5, 3.0, 9.5, 9.99, 10.0, 10.001, 10.5, 13.0, 13.2, 61.7, 599.96]


def brute_force_starts(grid: Grid, duration: float) -> list[Fraction]:
    """The sampling grid as a loop: multiples of the stride below the last start, then the last start."""
    window, stride = Fraction(str(grid.window)), Fraction(str(grid.stride))
    step = window / grid.frames
    last = max(Fraction(0), ceil((Fraction(duration) - window) / step - Fraction(1, 10**6)) * step)
    starts, at = [], Fraction(0)
    while at < last:
        starts.append(at)
        at += stride
    return [*starts, last]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("duration", DURATIONS)
def test_windows_equal_a_brute_force_loop(grid: Grid, duration: float) -> None:
    starts = brute_force_starts(grid, duration)
    step = Fraction(str(grid.window)) / grid.frames
    samples = [[start + k * step for k in range(grid.frames)] for start in starts]

    assert grid.seconds(grid.starts(duration)).tolist() == [float(s) for s in starts]
    assert grid.seconds(grid.window_ticks(duration)).tolist() == [[float(t) for t in row] for row in samples]
    union = sorted({t for row in samples for t in row if float(t) < duration or (duration == 0 and t == 0)})
    assert grid.sample_times(duration).tolist() == [float(t) for t in union]


@given(duration=st.floats(0, 2000), grid=st.sampled_from(GRIDS))
def test_every_time_of_a_clip_is_close_to_a_sample(duration: float, grid: Grid) -> None:
    times = grid.sample_times(duration)
    assert times[0] == 0
    assert (np.diff(times) > 0).all()
    assert (np.diff(times) <= grid.step + 1e-9).all()
    assert duration - times[-1] <= grid.step * (1 + 1e-5)
    assert times[-1] < max(duration, 1e-300)


def test_default_windows_share_one_half_second_grid() -> None:
    """Every frame is encoded once, instead of 3.3 times."""
    grid = Grid()
    duration = 600.0
    times = grid.sample_times(duration)
    assert times.tolist() == [k / 2 for k in range(1200)]
    assert grid.window_ticks(duration).size > 3 * times.size


@pytest.mark.parametrize(
    "values", [(0, 3, 20), (10, 0, 20), (10, 3, 0), (10, float("nan"), 20), (10, 11, 20), (10, 3, 2.5)]
)
def test_invalid_grids_are_rejected(values: tuple[float, float, int]) -> None:
    with pytest.raises(UsageError):
        Grid(*values)


def test_negative_duration_is_rejected() -> None:
    with pytest.raises(UsageError, match="duration"):
        Grid().starts(-1.0)


@given(
    times=st.lists(st.floats(0, 100), min_size=1, max_size=30, unique=True).map(sorted),
    queries=st.lists(st.floats(-10, 110), max_size=10),
)
def test_nearest_equals_argmin(times: list[float], queries: list[float]) -> None:
    expected = [int(np.argmin(np.abs(np.array(times) - q))) for q in queries]
    got = nearest(np.array(times), np.array(queries))
    distance = np.abs(np.array(times)[got] - queries)
    assert distance.tolist() == np.abs(np.array(times)[expected] - queries).tolist()


def test_nearest_of_no_times_is_an_error() -> None:
    with pytest.raises(ValueError, match="times is empty"):
        nearest(np.array([]), np.array([1.0]))


def test_extra_rows_continue_at_the_median_interval() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.4, 0.5])
    assert median_interval(times) == pytest.approx(0.1)
    np.testing.assert_allclose(extend(times, 7), [0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7])
    assert extend(times, 3) is times


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("duration", [0.2, 9.99, 13.2, 61.7])
def test_stitching_reproduces_constants_and_lines(grid: Grid, duration: float) -> None:
    """Stitching reproduces a constant exactly, and a line between the first and the last sample."""
    time = grid.seconds(grid.window_ticks(duration))
    valid = time < duration
    query = np.linspace(0, duration, 501)
    constant = stitch(time, np.full((*time.shape, 2), 0.25), valid, query)
    assert (constant == 0.25).all()

    line = np.stack([0.3 - 0.01 * time, 0.02 * time], axis=-1)
    line[~valid] = 1e6  # padding must not matter
    last = time[valid].max()
    held = np.clip(query, 0, last)
    np.testing.assert_allclose(
        stitch(time, line, valid, query), np.stack([0.3 - 0.01 * held, 0.02 * held], -1), atol=1e-12
    )


def test_stitching_averages_overlapping_windows() -> None:
    rng = np.random.default_rng(0)
    grid, duration = Grid(), 31.0
    time = grid.seconds(grid.window_ticks(duration))
    value, valid = rng.normal(size=(*time.shape, 2)), time < duration
    query = grid.sample_times(duration)
    expected = [value[valid & (time == t)].mean(axis=0) for t in query]
    np.testing.assert_allclose(stitch(time, value, valid, query), expected)


def test_stitching_rejects_invalid_input() -> None:
    time = np.zeros((1, 2))
    with pytest.raises(ValueError, match="no valid"):
        stitch(time, np.zeros((1, 2, 2)), np.zeros((1, 2), bool), np.zeros(1))
    with pytest.raises(ValueError, match="shapes disagree"):
        stitch(time, np.zeros((1, 3, 2)), np.ones((1, 2), bool), np.zeros(1))
