"""For one batch size, results are bit-identical for any workers, order, engine and store.

Another batch size means other bits, within the tolerance that docs/clusters.md states.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_extraction import STREAMS, WHOLE, assert_same_arrays, run

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset

FLOAT16_STEP = 2.0**-10  # relative, between neighbours; at most


@pytest.mark.parametrize(("workers", "store"), [(4, "hdf5"), pytest.param(4, "zarr", marks=pytest.mark.slow)])
def test_results_do_not_depend_on_workers_and_stores(
    workers: int, store: str, seven_clips: Dataset, seven_clips_cache: Cache, tiny_pair: tuple, tmp_path: Path
) -> None:
    run(seven_clips, tmp_path / "cache", tiny_pair, replace(WHOLE, workers=workers), store=store)
    assert_same_arrays(seven_clips_cache, open_cache(tmp_path / "cache"), STREAMS)


def test_results_do_not_depend_on_the_item_order(
    seven_clips: Dataset,
    seven_clips_cache: Cache,
    tiny_pair: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shuffle the plan, so that batches contain other rows."""
    order: list[str] = []

    def shuffled(tasks: Iterable, seconds: object) -> list:
        ordered = list(tasks)
        mixed = [ordered[k] for k in np.random.default_rng(0).permutation(len(ordered))]
        order.extend(task.clip.id for task in mixed)
        return mixed

    monkeypatch.setattr("vaflow.extract.plan.longest_first", shuffled)
    run(seven_clips, tmp_path / "cache", tiny_pair, WHOLE)
    assert order != seven_clips_cache.items()
    assert_same_arrays(seven_clips_cache, open_cache(tmp_path / "cache"), STREAMS)


@pytest.mark.slow  # the fault tests compare resumed caches
def test_results_do_not_depend_on_resuming(
    seven_clips: Dataset, seven_clips_cache: Cache, tiny_pair: tuple, tmp_path: Path
) -> None:
    run(replace(seven_clips, clips=seven_clips.clips[3:5]), tmp_path / "cache", tiny_pair, WHOLE)
    run(seven_clips, tmp_path / "cache", tiny_pair, WHOLE)
    assert_same_arrays(seven_clips_cache, open_cache(tmp_path / "cache"), STREAMS)


@pytest.fixture(scope="module")
def odd_batches(seven_clips: Dataset, tiny_pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """What batches of five images and three windows extract."""
    out = tmp_path_factory.mktemp("odd") / "cache"
    run(seven_clips, out, tiny_pair, replace(WHOLE, image_batch=5, window_batch=3))
    return open_cache(out)


def assert_close(one: Cache, other: Cache) -> None:
    """One float16 step of each value, or of 1/16 of the largest one of its row where that is more."""
    assert_same_arrays(one, other, ["labels", "logmel"])
    for stream in ("clip-tiny", "ast-tiny"):
        for item in one.items():
            a, b = (cache.read(stream, item).embedding.astype(np.float64) for cache in (one, other))
            scale = np.maximum(np.abs(a), np.abs(a).max(axis=-1, keepdims=True) / 16)
            assert (np.abs(a - b) <= FLOAT16_STEP * scale).all(), (stream, item, np.abs(a - b).max())


def test_smaller_batches_stay_within_the_stated_tolerance(odd_batches: Cache, seven_clips_cache: Cache) -> None:
    assert_close(seven_clips_cache, odd_batches)


@pytest.mark.slow  # like smaller ones
def test_larger_batches_stay_within_the_stated_tolerance(
    seven_clips: Dataset, seven_clips_cache: Cache, tiny_pair: tuple, tmp_path: Path
) -> None:
    run(seven_clips, tmp_path / "cache", tiny_pair, replace(WHOLE, image_batch=64, window_batch=8))
    assert_close(seven_clips_cache, open_cache(tmp_path / "cache"))


def test_the_record_stores_the_batch_size(odd_batches: Cache, seven_clips_cache: Cache) -> None:
    for item in odd_batches.items():
        assert odd_batches.record("clip-tiny", item).meta["batch"] == [5]
        assert odd_batches.record("ast-tiny", item).meta["batch"] == [3]
        assert seven_clips_cache.record("clip-tiny", item).meta["batch"] == [16]
        assert seven_clips_cache.record("clip-tiny", item).meta["device"] == "cpu"
        assert "batch" not in odd_batches.record("logmel", item).meta
