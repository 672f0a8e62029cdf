"""Costs of encoding beside a cache: summed over runs, carried by copies, never part of the format."""

from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.copy import convert, merge
from vaflow.cache.costs import Cost, append_costs, stream_costs
from vaflow.cache.export import pack
from vaflow.cache.maintenance import verify
from vaflow.cache.schema import LABELS, StreamInfo

FAST = Cost("gpu", "float32", 86_000_000, 3.0, 60.0)


def make(path: Path | str, item: str, width: int = 4) -> Cache:
    """A cache with one clip."""
    cache = create_cache(path)
    cache.declare(StreamInfo("face", "visual", width, "float32", {"encoder": "toy"}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    time, valid = np.arange(3.0), np.ones(3, bool)
    cache.write("face", item, {"embedding": np.zeros((3, width), np.float32), "time": time, "valid": valid})
    labels = {"time": time, "value": np.zeros((3, 2), np.float32), "valid": np.ones((3, 2), bool)}
    cache.write(LABELS, item, labels, meta={"split": "train", "group": item, "duration": 3.0})
    return cache


def test_costs_of_runs_and_shards_are_summed(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", "a")
    assert stream_costs(cache) == {}, "caches of earlier versions have none"
    append_costs(cache, {"face": FAST})
    append_costs(cache, {"face": FAST}, suffix="-2-of-3")
    append_costs(cache, {"face": Cost("cpu", "float32", 86_000_000, 50.0, 10.0)})
    append_costs(cache, {"face": Cost("tpu", "float32", 1, 0.0, 0.0)})
    cost = stream_costs(cache)["face"]
    assert cost == Cost("gpu", "float32", 86_000_000, 6.0, 120.0), "of the device that encoded most"
    assert cost.seconds_per_minute == 3.0


def test_cost_lines_of_other_settings_and_damaged_lines_are_skipped(tmp_path: Path) -> None:
    other, cache = make(tmp_path / "o", "a", width=5), make(tmp_path / "c", "a")
    append_costs(other, {"face": FAST})
    stale = (other.path / "costs.jsonl").read_text()
    valid = stale.replace(other.fingerprint("face"), cache.fingerprint("face"))
    lines = [stale, "{", "[]", valid.replace("3.0", "NaN"), valid.replace("3.0", '"fast"'), valid[:40]]
    (cache.path / "costs.jsonl").write_text("\n".join(lines))
    assert stream_costs(cache) == {}
    (tmp_path / "costs.jsonl").write_text(valid)
    (cache.path / "costs-1-of-2.jsonl").symlink_to(tmp_path / "costs.jsonl")
    assert stream_costs(cache) == {}, "links are not followed"


def test_copies_contain_the_cost_lines_of_their_sources_once(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", "a"), make(tmp_path / "two", "b")
    for cache in (one, other):
        append_costs(cache, {"face": FAST})
    for _ in range(2):  # a merge that is run again adds nothing
        merge(tmp_path / "both", [one, other])
    both = open_cache(tmp_path / "both")
    assert stream_costs(both)["face"].media_seconds == 120.0
    convert(both, tmp_path / "hdf5", "hdf5")
    assert stream_costs(open_cache(tmp_path / "hdf5")) == stream_costs(both)
    pack(both, tmp_path / "packed")
    packed = open_cache(tmp_path / "packed")
    assert stream_costs(packed) == stream_costs(both) and verify(packed) == []


def test_costs_do_not_change_fingerprints_and_checksums(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", "a")
    before = {path: path.read_bytes() for path in cache.path.rglob("*") if path.is_file()}
    append_costs(cache, {"face": FAST})
    after = {path: path.read_bytes() for path in cache.path.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"costs.jsonl"}
    assert all(after[path] == content for path, content in before.items()) and verify(cache) == []


def test_cost_files_are_uploaded_to_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"memory://{tmp_path.name}/cache"
    monkeypatch.setenv("VAFLOW_CACHE_DIR", str(tmp_path / "near"))
    cache = make(path, "a")
    append_costs(cache, {"face": FAST})
    cache.refresh_index()
    monkeypatch.setenv("VAFLOW_CACHE_DIR", str(tmp_path / "far"))
    assert stream_costs(open_cache(path))["face"] == FAST
