"""Metrics equal NumPy and SciPy; the bootstrap equals manual resampling."""

import time

import numpy as np
import pytest
import torch
from scipy import stats

from vaflow.errors import UsageError
from vaflow.train.losses import ccc, hard_labels
from vaflow.train.metrics import (
    bootstrap_interval,
    concordance,
    concordance_of_moments,
    mean_over_dimensions,
    pearson,
    region_occupancy,
    region_of,
    rmse,
    smoothness,
    video_moments,
    within_video_ccc,
)

Video = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def videos() -> list[Video]:
    """Videos of different lengths and label levels; unlabelled entries are NaN."""
    rng = np.random.default_rng(5)
    out = []
    for length in (40, 75, 10, 120, 33, 61):
        target = np.clip(rng.normal(size=2) * 0.4 + 0.2 * rng.normal(size=(length, 2)), -1, 1)
        prediction = np.clip(0.6 * target + 0.15 * rng.normal(size=(length, 2)) + 0.1, -1, 1)
        mask = rng.random((length, 2)) < 0.8
        target[~mask] = np.nan
        out.append((prediction, target, mask))
    return out


def joined(videos: list[Video]) -> Video:
    prediction, target, mask = (np.concatenate(parts) for parts in zip(*videos, strict=True))
    return prediction, target, mask


def test_metric_ccc_equals_the_loss_ccc(videos):
    everything = joined(videos)
    np.testing.assert_allclose(concordance(*everything), ccc(*everything, eps=0.0), rtol=1e-12)


def test_concordance_is_the_population_formula(videos):
    x, y, mask = joined(videos)
    for k, value in enumerate(concordance(x, y, mask)):
        a, b = x[mask[:, k], k], y[mask[:, k], k]
        slope = 2 * stats.pearsonr(a, b).statistic * a.std() * b.std()  # Lin's coefficient computed from Pearson's
        assert value == pytest.approx(slope / (a.var() + b.var() + (a.mean() - b.mean()) ** 2))


def test_pearson_and_rmse(videos):
    x, y, mask = joined(videos)
    for k in range(2):
        a, b = x[mask[:, k], k], y[mask[:, k], k]
        assert pearson(x, y, mask)[k] == pytest.approx(stats.pearsonr(a, b).statistic)
        assert rmse(x, y, mask)[k] == pytest.approx(np.sqrt(((a - b) ** 2).sum() / a.size))


def test_ccc_of_constants_is_zero_and_of_no_values_is_none():
    x, constant = np.random.default_rng(0).uniform(-1, 1, (9, 2)), np.full((9, 2), 0.1)
    for metric in (concordance, pearson):
        assert (metric(x, constant) == 0).all()
        assert (metric(constant, x) == 0).all()
        assert (metric(constant, constant) == 0).all()
    for measure in (concordance, pearson, rmse):
        assert np.isnan(measure(x, x, np.zeros(9, bool))).all()
        assert np.isnan(measure(x, x, np.array([[True, False]] * 9))).tolist() == [False, True]


def test_masks_can_be_shared_or_per_dimension():
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 3, 9, 2))
    mask = np.random.default_rng(1).random((3, 9)) < 0.5
    np.testing.assert_array_equal(concordance(x, y, mask), concordance(x, y, np.stack([mask, mask], -1)))
    np.testing.assert_array_equal(concordance(x, y, mask), concordance(x[mask], y[mask]))


def test_mismatched_shapes_are_reported():
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[5, 2\]"):
        concordance(np.zeros((4, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"\[4, 2\]; got \[5\]"):
        rmse(np.zeros((4, 2)), np.zeros((4, 2)), np.ones(5, bool))
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[5\]"):
        smoothness(np.zeros((4, 2)), np.zeros(5))


def test_the_mean_covers_available_dimensions():
    values = [[0.2, 0.4], [0.2, np.nan], [np.nan, np.nan]]
    np.testing.assert_allclose(mean_over_dimensions(values), [0.3, 0.2, np.nan])


def test_within_video_ccc_excludes_and_counts_constant_videos(videos):
    constant, unlabelled = [tuple(part.copy() for part in videos[0]) for _ in range(2)]
    constant[1][:, 1] = 0.1
    unlabelled[2][:, 0] = False
    mean, excluded = within_video_ccc([*videos, constant, unlabelled])
    kept = [[*videos, constant], [*videos, unlabelled]]
    expected = [np.mean([concordance(*video)[k] for video in kept[k]]) for k in range(2)]
    np.testing.assert_allclose(mean, expected)
    assert excluded.tolist() == [1, 1]


def test_within_video_ccc_without_usable_videos_is_none():
    mean, excluded = within_video_ccc([(np.eye(2), np.zeros((2, 2)), None)])
    assert np.isnan(mean).all()
    assert excluded.tolist() == [1, 1]


def test_moments_of_videos_are_additive(videos):
    total = np.sum([video_moments(*video) for video in videos], axis=0)
    np.testing.assert_allclose(concordance_of_moments(total), concordance(*joined(videos)), rtol=1e-10)


def test_moments_of_constants_and_empty_videos():
    rng = np.random.default_rng(0)
    same = video_moments(np.full((1000, 2), 0.1), np.full((1000, 2), 0.1))
    assert (concordance_of_moments(same) == 0).all()
    still = video_moments(rng.uniform(-1, 1, (1000, 2)), np.full((1000, 2), 0.1))
    np.testing.assert_allclose(concordance_of_moments(still), 0, atol=1e-12)
    assert np.isnan(concordance_of_moments(np.zeros((6, 2)))).all()


def test_bootstrap_equals_concatenating_drawn_videos(videos):
    rng = np.random.default_rng(11)
    scores = []
    for drawn in rng.integers(len(videos), size=(300, len(videos))):
        valence, arousal = concordance(*joined([videos[i] for i in drawn]))
        scores.append((valence, arousal, (valence + arousal) / 2))
    expected = np.percentile(scores, [2.5, 97.5], axis=0).T
    interval = bootstrap_interval([video_moments(*video) for video in videos], resamples=300, seed=11)
    np.testing.assert_allclose(interval, expected, rtol=1e-9)


def test_bootstrap_interval_contains_the_estimate_and_is_deterministic(videos):
    moments = [video_moments(*video) for video in videos]
    first, again = (bootstrap_interval(moments, resamples=2000, seed=1) for _ in range(2))
    assert np.array_equal(first, again)
    valence, arousal = concordance(*joined(videos))
    assert first[0, 0] < valence < first[0, 1]
    assert first[1, 0] < arousal < first[1, 1]
    narrow = bootstrap_interval(moments, resamples=2000, seed=1, level=0.5)
    assert first[2, 0] < narrow[2, 0] < narrow[2, 1] < first[2, 1]


def test_bootstrap_of_one_video_is_degenerate(videos):
    interval = bootstrap_interval([video_moments(*videos[0])], resamples=20)
    value = concordance(*videos[0])
    np.testing.assert_allclose(interval[:2], np.stack([value, value], -1))


def test_bootstrap_without_labels_in_one_dimension(videos):
    moments = np.stack([video_moments(*video) for video in videos])
    moments[..., 1] = 0
    interval = bootstrap_interval(moments, resamples=50)
    assert np.isnan(interval[1]).all()
    assert np.array_equal(interval[2], interval[0])


def test_bootstrap_runs_within_its_time_budget():
    moments = np.random.default_rng(0).uniform(1, 2, (76, 6, 2))
    start = time.process_time()
    bootstrap_interval(moments, resamples=10_000)
    assert time.process_time() - start < 1


def test_bootstrap_rejects_invalid_arguments():
    with pytest.raises(UsageError, match="0 videos"):
        bootstrap_interval([])
    with pytest.raises(UsageError, match=r"level 1\.5"):
        bootstrap_interval(np.ones((3, 6, 2)), level=1.5)
    with pytest.raises(ValueError, match=r"\[3, 5, 2\]"):
        bootstrap_interval(np.ones((3, 5, 2)))


def test_smoothness_is_change_per_second():
    seconds = np.linspace(0, 4, 41)
    trace = np.stack([0.1 * seconds, np.abs((seconds % 2) - 1)], axis=-1)  # a ramp, and a zigzag of slope 1
    np.testing.assert_allclose(smoothness(trace, seconds), [0.1, 1.0])
    uneven = np.delete(np.arange(41), [3, 4, 17])
    np.testing.assert_allclose(smoothness(trace[uneven], seconds[uneven]), [0.1, 1.0])
    assert np.isnan(smoothness(trace[:1], seconds[:1])).all()
    assert np.isnan(smoothness(np.zeros((0, 2)), np.zeros(0))).all()


@pytest.mark.parametrize("centers", [0.66, 1.0])
def test_region_occupancy_counts_nearest_centres(centers):
    rng = np.random.default_rng(2)
    target, mask = rng.uniform(-1, 1, (500, 2)), rng.random((500, 2)) < 0.8
    expected = hard_labels(torch.from_numpy(target[mask.all(-1)]), centers).mean(0)
    np.testing.assert_allclose(region_occupancy(target, mask, centers), expected)
    assert region_occupancy([[1.0, -1.0]], centers=centers).argmax() == 6
    assert np.isnan(region_occupancy(target, np.zeros(500, bool))).all()
    with pytest.raises(UsageError, match="positive"):
        region_occupancy(target, centers=0)


@pytest.mark.parametrize("centers", [0.66, 0.7])
def test_labels_on_a_border_are_in_the_region_of_their_hard_label(centers):
    stored = np.array([[centers / 2, 0], [-centers / 2, 0], [0, centers / 2], [0, -centers / 2]], np.float32)
    expected = hard_labels(torch.from_numpy(stored), centers).argmax(-1)
    np.testing.assert_array_equal(region_of(stored.astype(np.float64), centers), expected)
