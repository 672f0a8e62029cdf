"""Merging caches: every item once, one identity per stream, no silent choice between versions."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.copy import merge
from vaflow.cache.export import pack
from vaflow.cache.maintenance import leftovers, verify
from vaflow.cache.schema import STORES, StreamInfo
from vaflow.cli import main
from vaflow.errors import FingerprintError, UsageError
from vaflow.train.scores import failed_items


def make(path: Path, store: str, clips: Mapping[str, int], *, extra: str | None = None) -> Cache:
    """A cache with a visual stream, labels and, with `extra`, a stream of that name; clip -> version of its video."""
    cache = create_cache(path, store=store)
    for kind in ("visual", "labels"):
        cache.declare(stream(kind))
    if extra is not None:
        cache.declare(stream("audio", name=extra))
    for item, version in clips.items():
        write(cache, "visual", item, version)
        write(cache, "labels", item, version, meta={"split": "train"})
        if extra is not None:
            write(cache, extra, item, version)
    return cache


def write(cache: Cache, name: str, item: str, version: int, meta: dict[str, Any] | None = None) -> None:
    source = {"video": {"name": f"{item}.mp4", "size": 5, "mtime_ns": id(cache), "blake2b": f"{version:02x}"}}
    made = arrays(cache.streams()[name], 4 + version, seed=version)
    cache.write(name, item, made, source=source, meta=meta)


@pytest.fixture(params=["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """Merging compares records; the first test below merges every mix of stores."""
    return str(request.param)


def age(cache: Cache, created: str, names: tuple[str, ...] = ("visual", "labels")) -> None:
    """Set another creation time for the items of some streams."""
    for name in names:
        for item in [json.loads(p.read_bytes())["item"] for p in cache.layout.records(name).glob("*.json")]:
            record, made = cache.committed(name, item)
            cache.adopt(replace(record, created=created), made)


def versions(cache: Cache, name: str) -> dict[str, int]:
    """Map item to version, by its source and by its arrays."""
    versions_found = {}
    for path in cache.layout.records(name).glob("*.json"):
        item = json.loads(path.read_bytes())["item"]
        version = int(cache.record(name, item).source["video"]["blake2b"], 16)
        assert_same(dict(cache.read(name, item).arrays), arrays(cache.streams()[name], 4 + version, seed=version))
        versions_found[item] = version
    return versions_found


@pytest.mark.parametrize("stores", [("zarr", "zarr", "hdf5"), ("hdf5", "zarr", "zarr"), ("zarr", "hdf5", None)])
def test_shards_are_merged_into_one_cache(tmp_path, stores):
    first, second, expected = stores
    parts = [make(tmp_path / "1", first, {"a": 1, "b/c": 1}), make(tmp_path / "2", second, {"d": 1, "b/c": 1})]
    done = merge(tmp_path / "out", parts, store=expected)
    out = open_cache(tmp_path / "out")
    assert out.store == (expected or first)
    assert (done.copied, done.there, done.replaced, done.failures) == (6, 0, 0, ())
    assert versions(out, "visual") == versions(out, "labels") == {"a": 1, "b/c": 1, "d": 1}
    assert out.meta("d") == {"split": "train"}
    assert verify(out) == []
    assert leftovers(out) == []


def test_merged_items_are_not_written_again(tmp_path, store):
    parts = [make(tmp_path / "1", store, {"a": 1, "b": 1}), make(tmp_path / "2", store, {"c": 1})]
    merge(tmp_path / "out", parts[:1])
    before = {path.name: path.read_bytes() for path in open_cache(tmp_path / "out").record_files()}
    done = merge(tmp_path / "out", parts)
    assert (done.copied, done.there) == (2, 4)
    after = {path.name: path.read_bytes() for path in open_cache(tmp_path / "out").record_files()}
    assert before.items() <= after.items()
    assert merge(tmp_path / "out", parts).copied == 0


def test_an_interrupted_merge_resumes(tmp_path, store, monkeypatch):
    parts = [make(tmp_path / "1", store, {"a": 1, "b": 1}), make(tmp_path / "2", store, {"c": 1})]
    real = Cache.adopt
    done: list[int] = []
    monkeypatch.setattr("vaflow.cache.copy.THREADS", 1)

    def few(self, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cache, "adopt", few)
        merge(tmp_path / "out", parts)
    summary = merge(tmp_path / "out", parts)
    assert (summary.there, summary.copied) == (2, 4)
    assert versions(open_cache(tmp_path / "out"), "labels") == {"a": 1, "b": 1, "c": 1}


def test_streams_of_both_caches_are_kept(tmp_path, store):
    parts = [make(tmp_path / "1", store, {"a": 1}), make(tmp_path / "2", store, {"a": 1, "b": 1}, extra="ast")]
    merge(tmp_path / "out", parts)
    out = open_cache(tmp_path / "out")
    assert sorted(out.streams()) == ["ast", "labels", "visual"]
    assert out.items(stream="ast") == ["a", "b"]


def test_streams_with_different_settings_are_rejected_by_name(tmp_path, store):
    one, two = make(tmp_path / "1", store, {"a": 1}), create_cache(tmp_path / "2", store=store)
    two.declare(StreamInfo("visual", "visual", 6, "float32", {"encoder": "toy-visual", "sampling": {"stride": 2.0}}))
    for caches in ((one, two), (two, one)):
        with pytest.raises(FingerprintError) as caught:
            merge(tmp_path / "out", caches)
        for part in ("stream 'visual'", "dtype", "'float16'", "'float32'", "identity.sampling.stride", "nothing"):
            assert part in str(caught.value)
        assert str(one.path) in str(caught.value)
        assert str(two.path) in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert main(["cache", "merge", str(tmp_path / "out"), str(one.path), str(two.path)]) == 2
    merge(tmp_path / "out", [one])
    with pytest.raises(FingerprintError, match="dtype"):
        merge(tmp_path / "out", [two])


def test_different_versions_of_an_item_are_an_error_that_lists_them(tmp_path, store, capsys):
    parts = [make(tmp_path / "1", store, {"a": 1, "b": 1}), make(tmp_path / "2", store, {"a": 2, "b": 1, "c": 1})]
    with pytest.raises(UsageError) as caught:
        merge(tmp_path / "out", parts)
    for part in ("(2)", "'a' of stream 'labels'", "'a' of stream 'visual'", "video", "'01'", "'02'", "--prefer"):
        assert part in str(caught.value)
    assert "'b'" not in str(caught.value)
    assert "mtime" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert main(["cache", "merge", str(tmp_path / "out"), str(parts[0].path), str(parts[1].path)]) == 2
    assert "'a' of stream 'visual'" in capsys.readouterr().err


def test_every_conflict_is_in_the_log(tmp_path, store, caplog):
    clips = [f"clip{n}" for n in range(7)]
    parts = [make(tmp_path / str(v), store, dict.fromkeys(clips, v)) for v in (1, 2)]
    with caplog.at_level("DEBUG", "vaflow"), pytest.raises(UsageError, match=r"\(14\).* and 4 more"):
        merge(tmp_path / "out", parts)
    assert all(f"{clip!r} of stream {name!r}" in caplog.text for clip in clips for name in ("visual", "labels"))


@pytest.mark.parametrize(("prefer", "expected"), [("first", {"a": 1, "b": 2}), ("newest", {"a": 2, "b": 2})])
def test_prefer_selects_the_version_of_a_conflicting_item(tmp_path, store, prefer, expected):
    parts = [make(tmp_path / "1", store, {"a": 1, "b": 2}), make(tmp_path / "2", store, {"a": 2, "b": 2})]
    age(parts[0], "2026-01-01T00:00:00+00:00")
    age(parts[1], "2026-01-02T00:00:00+00:00")
    for _ in range(2):
        done = merge(tmp_path / "out", parts, prefer=prefer)
        out = open_cache(tmp_path / "out")
        assert versions(out, "visual") == versions(out, "labels") == expected
        assert verify(out) == []
        assert leftovers(out) == []
    assert (done.copied, done.there) == (0, 4)


def test_newer_items_replace_older_ones(tmp_path, store):
    old, new = make(tmp_path / "1", store, {"a": 1}), make(tmp_path / "2", store, {"a": 2})
    age(old, "2026-01-01T00:00:00+00:00")
    merge(tmp_path / "out", [old])
    done = merge(tmp_path / "out", [new], prefer="newest")
    assert (done.copied, done.replaced) == (2, 2)
    assert versions(open_cache(tmp_path / "out"), "visual") == {"a": 2}
    done = merge(tmp_path / "out", [old], prefer="newest")
    assert (done.copied, done.there) == (0, 2)
    assert leftovers(open_cache(tmp_path / "out")) == []


def test_streams_of_one_clip_come_from_one_version(tmp_path, store):
    """A stream added later to the older version does not mix versions."""
    parts = [
        make(tmp_path / "1", store, {"a": 1}, extra="ast"),
        make(tmp_path / "2", store, {"a": 2}, extra="ast"),
    ]
    age(parts[0], "2026-01-01T00:00:00+00:00")
    age(parts[0], "2026-01-05T00:00:00+00:00", ("ast",))
    age(parts[1], "2026-01-03T00:00:00+00:00", ("visual", "labels", "ast"))
    merge(tmp_path / "out", parts, prefer="newest")
    out = open_cache(tmp_path / "out")
    assert len({versions(out, name)["a"] for name in ("visual", "labels", "ast")}) == 1


def test_items_without_a_source_are_compared_by_arrays(tmp_path):
    caches = []
    for number, store in enumerate(STORES):
        cache = create_cache(tmp_path / store, store=store)
        cache.declare(stream("labels"))
        cache.write("labels", "same", arrays(stream("labels")))
        cache.write("labels", "other", arrays(stream("labels"), seed=number))
        caches.append(cache)
    with pytest.raises(UsageError, match=r"\(1\).*'other' of stream 'labels'"):
        merge(tmp_path / "out", caches)
    merge(tmp_path / "out", caches, prefer="first")
    got = open_cache(tmp_path / "out").read("labels", "other")
    assert_same(dict(got.arrays), arrays(stream("labels"), seed=0))


def test_damaged_items_are_copied_from_another_cache(tmp_path, store):
    parts = [make(tmp_path / str(number), store, {"a": 1, "b": 1, "c": 1}) for number in (1, 2)]
    for item in ("a", "b"):
        file = sorted(parts[0].record("visual", item).files)[0]
        (parts[0].layout.item("visual", item) / file).unlink()
    parts[0].layout.record("visual", "c").write_bytes(b"")
    file = sorted(parts[1].record("visual", "b").files)[0]
    (parts[1].layout.item("visual", "b") / file).unlink()
    done = merge(tmp_path / "out", parts)
    assert [(failure.details["stream"], failure.item) for failure in done.failures] == [("visual", "b")]
    for part in parts:
        assert str(part.path) in done.failures[0].message
    assert versions(open_cache(tmp_path / "out"), "visual") == {"a": 1, "c": 1}


def test_a_clip_that_failed_in_one_shard_only_is_not_listed_as_failed(tmp_path, store):
    parts = [make(tmp_path / "1", store, {"a": 1}), make(tmp_path / "2", store, {"b": 1})]
    for part, items in zip(parts, (("b", "x"), ("y",)), strict=True):
        lines = [{"item": item, "stage": "open", "error": "E", "message": "m", "split": "train"} for item in items]
        (part.path / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    merge(tmp_path / "out", parts[:1])
    assert failed_items(open_cache(tmp_path / "out"), "train") == ["b", "x"]
    merge(tmp_path / "out", parts)
    assert failed_items(open_cache(tmp_path / "out"), "train") == ["x", "y"]


def test_caches_that_cannot_be_merged_are_usage_errors(tmp_path, store):
    part = make(tmp_path / "1", store, {"a": 1})
    with pytest.raises(UsageError, match="Choose another folder"):
        merge(part.path, [part])
    with pytest.raises(UsageError, match=r"Got: newset.*Did you mean 'newest'"):
        merge(tmp_path / "out", [part], prefer="newset")
    other = next(name for name in STORES if name != store)
    merge(tmp_path / "out", [part])
    with pytest.raises(UsageError, match="has another store"):
        merge(tmp_path / "out", [part], store=other)
    assert main(["cache", "merge", str(tmp_path / "out"), str(tmp_path / "nowhere")]) == 2


def test_packed_caches_are_merged_and_not_merged_into(tmp_path, store):
    part = make(tmp_path / "1", store, {"a": 1})
    pack(part, tmp_path / "packed")
    summary = merge(tmp_path / "out", [open_cache(tmp_path / "packed")])
    assert (summary.copied, open_cache(tmp_path / "out").store) == (2, "zarr")
    with pytest.raises(UsageError, match="packed caches are read-only"):
        merge(tmp_path / "packed", [part])


def test_the_command_and_the_example_in_its_help(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_cache(tmp_path / "part1", "zarr", ("a", "b"))
    small_cache(tmp_path / "part2", "hdf5", ("c", "d"))
    assert main(["cache", "merge", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "vaflow cache merge whole part1 part2" in printed
    assert main(["cache", "merge", "whole", "part1", "part2"]) == 0
    assert "8 items written; 0 up to date" in capsys.readouterr().out
    assert main(["cache", "merge", "whole", "part1", "part2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["there"] == 8
