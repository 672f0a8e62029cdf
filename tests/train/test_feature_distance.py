"""Distances to the training features: NumPy's Mahalanobis distance, and the frames that are marked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import VISUAL, Toy, make_cache

from vaflow.errors import CorruptError
from vaflow.files import write_tensors
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_windows
from vaflow.train.inputs import resolve
from vaflow.train.prediction_files import prediction_csv
from vaflow.train.traces import Trace
from vaflow.train.uncertainty import AXES, FeatureGaussian, TrainingFeatures, read_training_features


@pytest.mark.parametrize("dim", [5, AXES + 9])
def test_the_distance_equals_mahalanobis(dim: int) -> None:
    rng = np.random.default_rng(dim)
    rows = rng.normal(size=(400, dim)) @ rng.normal(size=(dim, dim)) + 3
    mean, covariance = rows.mean(axis=0), np.cov(rows.T)
    values, vectors = np.linalg.eigh(covariance)
    if dim > AXES:
        values[:-AXES] = values[:-AXES].mean()
    inverse = vectors @ np.diag(1 / values) @ vectors.T
    points = rng.normal(size=(7, dim)) * 5
    expected = np.sqrt(np.einsum("nd,de,ne->n", points - mean, inverse, points - mean) / dim)
    got = FeatureGaussian.fit(torch.from_numpy(rows)).distance(torch.from_numpy(points))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingFeatures]:
    """A cache whose clip test0 has foreign visual features from the middle on, and the fit of its training split."""
    root = tmp_path_factory.mktemp("far")
    cache = make_cache(root / "cache", Toy(splits={"train": 4, "val": 4, "test": 1}, invalid=0.0, logmel=True))
    data = cache.read(VISUAL, "test0")
    rows = data.arrays["embedding"].copy()
    rows[len(rows) // 2 :] += 40
    cache.write(VISUAL, "test0", {**data.arrays, "embedding": rows})
    config, inputs = resolve(cache, TrainConfig(audio=("logmel",)))
    train, val = (load_windows(cache, cache.items(split), inputs.streams, config) for split in ("train", "val"))
    return cache.path, TrainingFeatures.fit(train, val)


def marked(cache_path: Path, features: TrainingFeatures, split: str) -> list[Trace]:
    from vaflow.cache import open_cache

    cache = open_cache(cache_path)
    config, inputs = resolve(cache, TrainConfig(audio=("logmel",)))
    windows = load_windows(cache, cache.items(split), inputs.streams, config)
    return list(features.mark(windows, [Trace(clip, np.zeros((len(clip.time), 2)), None) for clip in windows.clips]))


def test_frames_with_unfamiliar_features_are_marked_far(fitted: tuple[Path, TrainingFeatures]) -> None:
    path, features = fitted
    (trace,) = marked(path, TrainingFeatures({VISUAL: features.streams[VISUAL]}), "test")
    assert trace.far is not None
    middle = trace.clip.duration / 2
    assert trace.far[trace.clip.time > middle + 1].all()
    assert trace.far[trace.clip.time < middle - 1].mean() < 0.1
    assert ",far_from_training" in prediction_csv(trace).splitlines()[0]


def test_about_one_percent_of_validation_frames_are_far(
    fitted: tuple[Path, TrainingFeatures],
) -> None:
    shares = np.concatenate([trace.far for trace in marked(*fitted, "val") if trace.far is not None])
    assert 0 < shares.mean() < 0.05


def test_stored_statistics_give_the_same_distances(fitted: tuple[Path, TrainingFeatures], tmp_path: Path) -> None:
    fitted[1].write(tmp_path)
    again = read_training_features(tmp_path)
    assert again is not None and again.streams.keys() == fitted[1].streams.keys() == {VISUAL, "logmel"}
    for name, gaussian in again.streams.items():
        rows = torch.randn(3, len(gaussian.mean))
        assert torch.equal(gaussian.distance(rows), fitted[1].streams[name].distance(rows))
    assert read_training_features(tmp_path / "elsewhere") is None


def test_a_damaged_file_is_rejected(tmp_path: Path) -> None:
    write_tensors(tmp_path / "training_features.safetensors", {"a/mean": torch.zeros(3), "a/axes": torch.zeros(4, 2)})
    with pytest.raises(CorruptError, match="training features"):
        read_training_features(tmp_path)
