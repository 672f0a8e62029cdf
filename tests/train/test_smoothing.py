"""Filters equal NumPy's convolution, SciPy's Savitzky-Golay and a polynomial fit per frame."""

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from scipy.signal import savgol_filter

from vaflow.errors import CorruptError, UsageError
from vaflow.train.scores import score
from vaflow.train.smoothing import (
    FILTERS,
    Smoothing,
    candidate_widths,
    choose_width,
    moving_average,
    read_smoothing,
    savitzky_golay,
    write_smoothing,
)
from vaflow.train.traces import Trace
from vaflow.train.windows import ClipRows

FPS = 25.0


def noise(frames: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(frames, 2))


def irregular(frames: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).uniform(0.005, 0.12, frames))


@pytest.mark.parametrize("width", [1, 5, 31, 301])
def test_moving_average_on_regular_frames_equals_a_box_convolution(width: int) -> None:
    value, time = noise(120), 3.0 + np.arange(120) / FPS
    box = np.ones(width)
    count = np.convolve(np.ones(120), box, "full")[width // 2 :][:120]
    expected = np.stack([np.convolve(x, box, "full")[width // 2 :][:120] / count for x in value.T], axis=1)
    np.testing.assert_allclose(moving_average(time, value, (width - 1) / FPS), expected, atol=1e-12)


@pytest.mark.parametrize("width", [5, 11, 51, 119])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_savitzky_golay_on_regular_frames_equals_scipy(width: int, order: int) -> None:
    value, time = noise(120, width), 3.0 + np.arange(120) / FPS
    expected = savgol_filter(value, width, order, axis=0, mode="interp")
    np.testing.assert_allclose(savitzky_golay(time, value, (width - 1) / FPS, order), expected, atol=1e-8)


def test_savitzky_golay_on_irregular_frames_equals_a_fit_per_frame() -> None:
    time, value, seconds = irregular(90), noise(90), 0.9
    smooth = savitzky_golay(time, value, seconds)
    for i, t in enumerate(time):
        middle = min(max(t, time[0] + seconds / 2), time[-1] - seconds / 2)
        near = np.abs(time - middle) <= seconds / 2 + 1e-6
        expected = [np.polyval(np.polyfit(time[near] - t, column[near], 2), 0) for column in value.T]
        np.testing.assert_allclose(smooth[i], expected, atol=1e-7)


def test_moving_average_on_irregular_frames_is_the_mean_of_near_frames() -> None:
    time, value = irregular(90), noise(90)
    expected = [value[np.abs(time - t) <= 0.35 + 1e-6].mean(axis=0) for t in time]
    np.testing.assert_allclose(moving_average(time, value, 0.7), expected, atol=1e-12)


def test_savitzky_golay_reproduces_parabolas() -> None:
    time = irregular(200, 3) + 900.0  # far from 0, where powers of the time lose precision
    value = np.stack([0.3 - 0.2 * (time - 905) + 0.05 * (time - 905) ** 2, np.full(200, 0.7)], axis=1)
    np.testing.assert_allclose(savitzky_golay(time, value, 1.0), value, atol=1e-9)
    np.testing.assert_allclose(moving_average(time, value[:, 1:], 1.0), value[:, 1:], atol=1e-12)


@pytest.mark.parametrize("kind", list(FILTERS))
def test_few_frames_and_zero_width_are_supported(kind: str) -> None:
    smooth = FILTERS[kind]
    for frames in (0, 1, 2, 3):
        value = noise(frames)
        assert smooth(np.arange(frames) / FPS, value, 10.0).shape == (frames, 2)
        np.testing.assert_array_equal(smooth(np.arange(frames) / FPS, value, 0.0), value)
    sparse: np.ndarray = np.arange(8) * 5.0  # a frame every five seconds: no neighbours in reach
    np.testing.assert_allclose(smooth(sparse, noise(8), 1.0), noise(8), atol=1e-12)
    same = np.repeat([0.0, 1.0], 4)  # two instants only: the best polynomial is a line, or the means
    assert np.isfinite(smooth(same, noise(8), 4.0)).all()
    with pytest.raises(ValueError, match="expected time"):
        smooth(np.arange(3.0), noise(4), 1.0)
    with pytest.raises(ValueError, match="width"):
        smooth(np.arange(4.0), noise(4), -1.0)


def traces(scale: float, clips: int = 3) -> list[Trace]:
    """Labels plus independent noise per frame."""
    made = []
    for k in range(clips):
        time = irregular(400, k)
        label = np.stack([np.sin(0.5 * time + k), np.cos(0.4 * time)], axis=1) * 0.8
        clip = ClipRows(f"c{k}", f"c{k}", float(time[-1]) + 0.1, time, label, np.ones(label.shape, bool), k, k + 1)
        made.append(Trace(clip, np.clip(label + scale * noise(400, k), -1, 1), None))
    return made


@pytest.mark.parametrize("kind", list(FILTERS))
def test_the_width_with_the_best_score_is_chosen(kind: str) -> None:
    noisy = traces(0.4)
    widths = (0.3, 1.0, 3.0, 12.0)
    chosen = choose_width(noisy, kind, "val", widths)
    scores = {0.0: score(noisy)[2]}
    for seconds in widths:
        changed = [Trace(t.clip, np.clip(FILTERS[kind](t.clip.time, t.va, seconds), -1, 1), None) for t in noisy]
        scores[seconds] = score(changed)[2]
    assert chosen.seconds == max(scores, key=lambda s: scores[s]) > 0
    assert chosen.chosen_on == "val"
    assert chosen.scores == pytest.approx({f"{s:g}": value for s, value in scores.items()})
    assert choose_width(traces(0.0), kind, "val", (3.0, 12.0)).seconds == 0  # no noise to remove


def test_smoothing_is_stored_with_a_run(tmp_path: Path) -> None:
    assert read_smoothing(tmp_path) is None
    smoothing = Smoothing("savgol", 1.5, "val", {"0": 0.1, "1.5": 0.2})
    write_smoothing(tmp_path, smoothing)
    assert read_smoothing(tmp_path) == smoothing
    (tmp_path / "smoothing.json").write_text(json.dumps({"kind": "median", "seconds": 1}))
    with pytest.raises(CorruptError, match=r"smoothing\.json"):
        read_smoothing(tmp_path)
    write_smoothing(tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_unknown_kinds_and_widths_are_rejected() -> None:
    with pytest.raises(UsageError, match="Did you mean 'savgol'"):
        Smoothing("savgoll", 1.0)
    with pytest.raises(UsageError, match="width"):
        Smoothing("mean", float("nan"))


def test_widths_are_multiples_of_the_sampling_interval() -> None:
    some = traces(0.4)
    assert candidate_widths(some, 0.5)[:3] == [0.5, 1.0, 1.5]
    slow = [replace(t, clip=replace(t.clip, time=5.0 * np.arange(400, dtype=np.float64))) for t in some]
    assert candidate_widths(slow, 0.5)[:2] == [5.0, 10.0]  # a label every five seconds


def test_a_width_with_a_negligible_gain_is_not_chosen() -> None:
    constant = [replace(t, va=np.full_like(t.va, 0.25)) for t in traces(0.0)]
    assert choose_width(constant, "mean", "val", (0.5, 1.0)).seconds == 0


def test_polynomial_smoothing_time_does_not_depend_on_the_width() -> None:
    time, value = np.arange(60_000) / 30 + np.tile([0, 1e-4], 30_000), noise(60_000)
    begun = perf_counter()
    savitzky_golay(time, value, 20.0)
    assert perf_counter() - begun < 3  # took 40 s when each frame fitted its 600 neighbours
