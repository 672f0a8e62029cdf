"""Intervals and paired tests equal loops that resample frames."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vaflow.errors import CorruptError
from vaflow.train.ablate.workers import read_moments, write_moments
from vaflow.train.metrics import (
    bootstrap_interval,
    paired_difference,
    percentile_interval,
    resampled_ccc,
    shared_draws,
    video_moments,
)

Floats = NDArray[np.float64]
SEEDS, VIDEOS, RESAMPLES = 3, 7, 200


def plain_ccc(x: Floats, y: Floats) -> float:
    """Lin's concordance of two vectors, population variance."""
    return float(2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


@pytest.fixture(scope="module")
def labels() -> list[Floats]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, size=(int(rng.integers(20, 90)), 2)) for _ in range(VIDEOS)]


def predictions(labels: list[Floats], noise: float, seed: int) -> list[list[Floats]]:
    """[S][V] [N, 2]."""
    rng = np.random.default_rng(seed)
    return [[y + rng.normal(scale=noise, size=y.shape) for y in labels] for _ in range(SEEDS)]


def moments(predicted: list[list[Floats]], labels: list[Floats]) -> Floats:
    return np.array([[video_moments(x, y) for x, y in zip(run, labels, strict=True)] for run in predicted])


def brute(predicted: list[list[Floats]], labels: list[Floats], draws: Floats) -> Floats:
    """Concatenate the frames of every resample, score each seed, then average."""
    out = []
    for times in draws.astype(int):
        chosen = np.repeat(np.arange(VIDEOS), times)
        target = np.concatenate([labels[v] for v in chosen])
        scores = []
        for run in predicted:
            guess = np.concatenate([run[v] for v in chosen])
            both = [plain_ccc(guess[:, k], target[:, k]) for k in range(2)]
            scores.append([*both, sum(both) / 2])
        out.append(np.mean(scores, axis=0))
    return np.array(out)


def test_resamples_equal_concatenated_frames(labels: list[Floats]) -> None:
    predicted = predictions(labels, 0.4, 1)
    draws = shared_draws(VIDEOS, RESAMPLES, seed=3)
    assert draws.shape == (RESAMPLES, VIDEOS)
    assert (draws.sum(axis=1) == VIDEOS).all()
    np.testing.assert_allclose(
        resampled_ccc(moments(predicted, labels), draws), brute(predicted, labels, draws), atol=1e-10
    )


def test_paired_comparison_equals_a_loop(labels: list[Floats]) -> None:
    one, other = predictions(labels, 0.40, 1), predictions(labels, 0.43, 2)
    draws = shared_draws(VIDEOS, RESAMPLES, seed=3)
    resampled = [resampled_ccc(moments(predicted, labels), draws) for predicted in (one, other)]
    observed = np.array([0.1, 0.2, 0.3])
    comparison = paired_difference(resampled[0], resampled[1], observed, VIDEOS)
    difference = brute(one, labels, draws) - brute(other, labels, draws)
    np.testing.assert_array_equal(comparison.difference, observed)
    np.testing.assert_allclose(comparison.low, np.percentile(difference, 2.5, axis=0), atol=1e-10)
    np.testing.assert_allclose(comparison.high, np.percentile(difference, 97.5, axis=0), atol=1e-10)
    for k in range(3):
        below, above = sum(d <= 0 for d in difference[:, k]), sum(d >= 0 for d in difference[:, k])
        expected = min(1, 2 * (min(below, above) + 1) / (RESAMPLES + 1))
        assert comparison.p[k] == pytest.approx(max(expected, 2 ** (1 - VIDEOS)))


def test_pairing_detects_a_small_constant_gain(labels: list[Floats]) -> None:
    predicted = predictions(labels, 0.4, 1)
    better = [[x + 0.02 * (y - x) for x, y in zip(run, labels, strict=True)] for run in predicted]
    draws = shared_draws(VIDEOS, 2000)
    here, baseline = (resampled_ccc(moments(p, labels), draws) for p in (better, predicted))
    paired = paired_difference(here, baseline, np.zeros(3), VIDEOS)
    assert (paired.low > 0).all()
    assert percentile_interval(here)[-1, 0] < percentile_interval(baseline)[-1, 1], "the two intervals overlap"


def test_equal_runs_have_zero_difference(labels: list[Floats]) -> None:
    resampled = resampled_ccc(moments(predictions(labels, 0.4, 1), labels), shared_draws(VIDEOS, 50))
    same = paired_difference(resampled, resampled, np.zeros(3), VIDEOS)
    assert (same.low == 0).all()
    assert (same.high == 0).all()
    assert (same.p == 1).all()


def test_few_videos_never_yield_a_small_p_value(labels: list[Floats]) -> None:
    table = moments(predictions(labels, 0.4, 1), labels)[:, :3]
    worse = moments(predictions(labels, 2.0, 2), labels)[:, :3]
    draws = shared_draws(3, 1000)
    comparison = paired_difference(resampled_ccc(table, draws), resampled_ccc(worse, draws), np.zeros(3), 3)
    assert (comparison.low > 0).all()
    assert (comparison.p >= 0.25).all(), "three videos agree by chance in one of four cases"


def test_one_seed_has_the_interval_of_evaluate(labels: list[Floats]) -> None:
    table = moments(predictions(labels, 0.4, 1), labels)[:1]
    expected = bootstrap_interval(table[0], resamples=4000, seed=5)
    interval = percentile_interval(resampled_ccc(table, shared_draws(VIDEOS, 4000, seed=9)))
    np.testing.assert_allclose(interval, expected, atol=0.15 * float((expected[:, 1] - expected[:, 0]).min()))


def test_a_dimension_without_labels_has_no_interval(labels: list[Floats]) -> None:
    masks = [np.repeat([[True, False]], len(y), axis=0) for y in labels]
    table = np.array([[video_moments(y + 0.1, y, mask) for y, mask in zip(labels, masks, strict=True)]])
    resampled = resampled_ccc(table, shared_draws(VIDEOS, 100))
    assert np.isnan(resampled[:, 1]).all()
    np.testing.assert_array_equal(resampled[:, 2], resampled[:, 0])
    edges = percentile_interval(resampled)
    assert np.isfinite(edges[[0, 2]]).all()
    assert np.isnan(edges[1]).all()
    assert np.isnan(paired_difference(resampled, resampled, np.zeros(3), VIDEOS).p[1])


def test_moments_round_trip_exactly(tmp_path: Path, labels: list[Floats]) -> None:
    table = {f"v{i}": video_moments(y * 0.9, y) for i, y in enumerate(labels)}
    write_moments(tmp_path, table)
    back = read_moments(tmp_path)
    assert back.keys() == table.keys()
    for name, numbers in table.items():
        np.testing.assert_array_equal(back[name], numbers)
    (tmp_path / "moments.json").write_text('{"v0": [1, 2]}')
    with pytest.raises(CorruptError, match="damaged"):
        read_moments(tmp_path)
