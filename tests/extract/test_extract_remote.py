"""Extraction to and training from an object store give the results of a local disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import fsspec
import numpy as np
import pytest
import torch
from affwild2_tree import Tree

from vaflow.cache import Cache, open_cache
from vaflow.cache.remote import VARIABLE
from vaflow.datasets import open_dataset
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with
from vaflow.extract.plan import Summary
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.run_folder import require_record
from vaflow.train.train_run import train_run

CONFIG = ExtractConfig(visual=("clip-tiny",), audio=(), window=4.0, stride=2.0, frames=4, device="cpu", workers=1)


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A path on an object store, for machines with empty disks."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("vaflow.cache.remote.temporary_folder", lambda: tmp_path_factory.mktemp("machine"))
    yield f"memory://{token_hex(8)}/cache"
    fsspec.filesystem("memory").store.clear()


def extract(tree: Tree, pair: tuple, out: Path | str) -> Summary:
    dataset = open_dataset(tree.root)
    return extract_with(dataset, Path(out), CONFIG, [pair[0]], [], torch.device("cpu"))


def assert_same_cache(one: Cache, two: Cache) -> None:
    assert one.items() == two.items() != []
    for name in one.streams():
        assert one.fingerprint(name) == two.fingerprint(name)
        for item in one.items(stream=name):
            first, second = one.read(name, item).arrays, two.read(name, item).arrays
            assert first.keys() == second.keys()
            for key, array in first.items():
                np.testing.assert_array_equal(array, second[key])


@pytest.mark.slow  # test_clusters_page and test_s3 use object stores, too
def test_extraction_and_training(tree: Tree, tiny_pair: tuple, url: str, tmp_path: Path) -> None:
    local = extract(tree, tiny_pair, tmp_path / "cache")
    remote = extract(tree, tiny_pair, url)
    assert (remote.extracted, len(remote.failures)) == (local.extracted, len(local.failures))
    assert_same_cache(open_cache(tmp_path / "cache"), open_cache(url))
    again = extract(tree, tiny_pair, url)
    assert (again.extracted, again.done) == (0, local.extracted)
    assert str(again.failures_file) == f"{url}/failures.jsonl"
    config = TrainConfig(epochs=1, hidden=8, visual=("clip-tiny",), audio=("none",), device="cpu")
    results = []
    for number, cache in enumerate((open_cache(tmp_path / "cache"), open_cache(url))):
        run = tmp_path / f"run{number}"
        result = train_run(cache, config, run, allow_missing=True, tensorboard=False, figures=False)
        results.append(json.dumps(result.metrics["ccc"]))
    assert results[0] == results[1]
    assert require_record(tmp_path / "run1").cache == url
    report = evaluate_run(tmp_path / "run1", open_cache(url), device="cpu", allow_missing=True)
    assert json.dumps(report["ccc"]) == results[0]
