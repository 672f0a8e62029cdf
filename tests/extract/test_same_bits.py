"""For one batch size, results are bit-identical for any workers, order, engine and store.

Another batch size means other bits, within the tolerance that docs/clusters.md states.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_media import AudioTrack, VideoTrack, tones, write_media
from test_pipeline import CONFIG, run, same_arrays

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset, open_dataset

STREAMS = ["labels", "logmel", "clip-tiny", "ast-tiny"]
WHOLE = replace(CONFIG, face_source="none")
FLOAT16_STEP = 2.0**-10  # relative, between neighbours; at most


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven clips of one to eleven seconds, so that batches are filled across them and the last ones are padded."""
    root = tmp_path_factory.mktemp("same")
    for number, seconds in enumerate((11.0, 1.0, 4.6, 2.2, 7.4, 1.6, 3.0)):
        times = tuple(range(0, round(seconds * 1000), 200))
        audio_track = AudioTrack(tones(seconds, 16000) * (number + 1) / 8, 16000)
        write_media(root / f"clip{number}.mp4", VideoTrack(times, noise=30), audio_track)
    return open_dataset(root, "videos")


@pytest.fixture(scope="module")
def reference(dataset: Dataset, tiny_pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("reference") / "cache"
    assert run(dataset, out, tiny_pair, replace(WHOLE, workers=1)).extracted == 7
    return open_cache(out)


@pytest.mark.parametrize(("workers", "store"), [(1, "hdf5"), (2, "zarr"), (4, "zarr"), (4, "hdf5")])
def test_results_do_not_depend_on_workers_and_stores(
    workers: int, store: str, dataset: Dataset, reference: Cache, tiny_pair: tuple, tmp_path: Path
) -> None:
    run(dataset, tmp_path / "cache", tiny_pair, replace(WHOLE, workers=workers), store=store)
    same_arrays(reference, open_cache(tmp_path / "cache"), STREAMS)


@pytest.mark.parametrize("seed", [0, 1])
def test_results_do_not_depend_on_the_item_order(
    seed: int,
    dataset: Dataset,
    reference: Cache,
    tiny_pair: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shuffle the plan, so that batches contain other rows."""
    order: list[str] = []

    def shuffled(tasks: Iterable, seconds: object) -> list:
        ordered = list(tasks)
        mixed = [ordered[k] for k in np.random.default_rng(seed).permutation(len(ordered))]
        order.extend(task.clip.id for task in mixed)
        return mixed

    monkeypatch.setattr("vaflow.extract.plan.longest_first", shuffled)
    run(dataset, tmp_path / "cache", tiny_pair, WHOLE)
    assert order != reference.items()
    same_arrays(reference, open_cache(tmp_path / "cache"), STREAMS)


def test_results_do_not_depend_on_resuming(
    dataset: Dataset, reference: Cache, tiny_pair: tuple, tmp_path: Path
) -> None:
    run(replace(dataset, clips=dataset.clips[3:5]), tmp_path / "cache", tiny_pair, WHOLE)
    run(dataset, tmp_path / "cache", tiny_pair, WHOLE)
    same_arrays(reference, open_cache(tmp_path / "cache"), STREAMS)


@pytest.mark.parametrize(("images", "windows"), [(1, 1), (5, 3), (64, 8)])
def test_other_batch_sizes_stay_within_the_stated_tolerance(
    images: int, windows: int, dataset: Dataset, reference: Cache, tiny_pair: tuple, tmp_path: Path
) -> None:
    """One float16 step of each value, or of 1/16 of the largest one of its row where that is more."""
    run(dataset, tmp_path / "cache", tiny_pair, replace(WHOLE, image_batch=images, window_batch=windows))
    other = open_cache(tmp_path / "cache")
    same_arrays(reference, other, ["labels", "logmel"])
    for stream in ("clip-tiny", "ast-tiny"):
        for item in reference.items():
            a, b = (cache.read(stream, item).embedding.astype(np.float64) for cache in (reference, other))
            scale = np.maximum(np.abs(a), np.abs(a).max(axis=-1, keepdims=True) / 16)
            assert (np.abs(a - b) <= FLOAT16_STEP * scale).all(), (stream, item, np.abs(a - b).max())


def test_the_record_stores_the_batch_size(dataset: Dataset, reference: Cache, tiny_pair: tuple, tmp_path: Path) -> None:
    run(dataset, tmp_path / "cache", tiny_pair, replace(WHOLE, image_batch=5, window_batch=3))
    other = open_cache(tmp_path / "cache")
    for item in other.items():
        assert other.record("clip-tiny", item).meta["batch"] == [5]
        assert other.record("ast-tiny", item).meta["batch"] == [3]
        assert reference.record("clip-tiny", item).meta["batch"] == [16]
        assert reference.record("clip-tiny", item).meta["device"] == "cpu"
        assert "batch" not in other.record("logmel", item).meta
