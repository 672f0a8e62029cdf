"""Packed caches: equal items in few files, read-only and verified."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.copy import convert
from vaflow.cache.export import pack
from vaflow.cache.layout import canonical, file_facts, seal, unseal
from vaflow.cache.maintenance import leftovers, verify
from vaflow.cache.schema import KINDS, Kind
from vaflow.cli import main
from vaflow.errors import CorruptError, MissingError, UsageError
from vaflow.files import Failure, read_failures, write_failures

PAGE = (Path(__file__).parents[2] / "cache_schema.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Packed caches")[1].split("\n## ")[0]
LENGTHS = {"a/b": 5, "c": 0, "d": 40, "é": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Every kind of stream, with clips of several lengths; audio of one clip has other steps than that of the rest."""
    cache = create_cache(tmp_path_factory.mktemp("source") / "cache")
    for kind in get_args(Kind):
        cache.declare(stream(kind))
        for seed, (item, length) in enumerate(LENGTHS.items()):
            cache.write(kind, item, arrays(stream(kind), length, seed), meta={"split": "val"}, source={"size": seed})
    cache.declare(stream("audio", name="ragged"))
    for item, steps in (("a/b", 4), ("d", 7)):
        made = arrays(stream("audio"), 3)
        made |= {
            name: np.resize(made[name], (3, steps, *made[name].shape[2:])) for name in ("embedding", "time", "valid")
        }
        cache.write("ragged", item, made)
    cache.declare(stream("visual", name="empty"))
    write_failures(cache.path / "failures.jsonl", [Failure("lost", "decode", "DataError", "no video", {})])
    return cache


def everything(cache: Cache) -> Iterator[tuple[str, str]]:
    for name in cache.streams():
        for row in cache.source_stamps(name):
            yield name, row


@pytest.mark.parametrize("shard_bytes", [100, pytest.param(2**29, marks=pytest.mark.slow)])
def test_every_packed_item_keeps_its_record(source, tmp_path, shard_bytes):
    summary = pack(source, tmp_path / "packed", shard_bytes=shard_bytes)
    packed = open_cache(tmp_path / "packed")
    assert sorted(everything(packed)) == sorted(everything(source))
    assert summary.items == len(list(everything(source)))
    for name, item in everything(source):
        assert_same(packed.committed(name, item)[1], source.committed(name, item)[1])
        assert packed.record(name, item) == source.record(name, item)
    packed.read("visual", "d").valid[...] = True  # arrays can be changed
    assert packed.items(split="val") == source.items(split="val")
    assert packed.streams() == source.streams()
    assert {**packed.info(), "path": 0, "store": 0} == {**source.info(), "path": 0, "store": 0}
    assert verify(packed) == []
    assert leftovers(packed) == []
    assert read_failures(packed.path) == read_failures(source.path)


def test_an_hdf5_cache_is_packed_too(tmp_path):
    cache = small_cache(tmp_path / "cache", "hdf5")
    pack(cache, tmp_path / "packed")
    packed = open_cache(tmp_path / "packed")
    for name, item in everything(cache):
        assert_same(packed.committed(name, item)[1], cache.committed(name, item)[1])


def test_a_packed_cache_has_few_files(tmp_path):
    cache = small_cache(tmp_path / "cache", "zarr", tuple(f"clip{n}" for n in range(30)))
    pack(cache, tmp_path / "packed")
    files = [path for path in (tmp_path / "packed").rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 * (2 + 1) + 2 * (4 + 3)  # manifest; stream, records, group; metadata and shard of arrays


@pytest.mark.parametrize("shard_bytes", [100, pytest.param(2**29, marks=pytest.mark.slow)])
def test_the_documented_reader_reads_a_packed_cache_with_zarr(source, tmp_path, shard_bytes):
    pack(source, tmp_path / "packed", shard_bytes=shard_bytes)
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.S)
    space: dict[str, Any] = {}
    exec(code, space)
    read = {(record["stream"], record["item"]): got for record, got in space["items"](tmp_path / "packed")}
    assert read.keys() == set(everything(source))
    for (name, item), got in read.items():
        assert_same(got, source.committed(name, item)[1])


def test_the_documentation_lists_every_packed_member(tmp_path):
    small_cache(tmp_path / "cache", "zarr")
    pack(open_cache(tmp_path / "cache"), tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_bytes())
    line = json.loads((tmp_path / "packed/records/visual.jsonl").read_bytes().splitlines()[0])
    assert set(re.findall(r"^\| `(\w+)` \|", SECTION, flags=re.M)) == {"store", "files", "rows"}
    assert manifest["store"] == "packed"
    on_disk = {
        path.relative_to(tmp_path / "packed").as_posix()
        for path in (tmp_path / "packed").rglob("*.*")
        if path.is_file()
    }
    assert manifest["files"].keys() >= on_disk - {"manifest.json"}
    assert set(line["rows"]) == set(line["arrays"])


def test_a_packed_cache_rejects_writes(tmp_path):
    pack(small_cache(tmp_path / "cache", "zarr"), tmp_path / "packed")
    remedy = rf"packed caches are read-only.*vaflow cache convert {tmp_path}/packed --out"
    for opening in (lambda path: open_cache(path, writable=True), create_cache):
        with pytest.raises(UsageError, match=remedy):
            opening(tmp_path / "packed")
    packed = open_cache(tmp_path / "packed")
    with pytest.raises(UsageError, match="opened for reading"):
        packed.drop("visual", "c")
    packed.refresh_index()
    with pytest.raises(MissingError, match="Similar names: c"):
        packed.read("visual", "cc")
    assert not packed.has("visual", "cc")


def test_a_packed_cache_round_trips_through_convert(source, tmp_path):
    pack(source, tmp_path / "packed")
    convert(open_cache(tmp_path / "packed"), tmp_path / "copy", "zarr")
    copy = open_cache(tmp_path / "copy")
    for name, item in everything(source):
        assert_same(copy.committed(name, item)[1], source.committed(name, item)[1])
    pack(open_cache(tmp_path / "packed"), tmp_path / "again")
    for path in (tmp_path / "packed").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "packed")).read_bytes()


def test_verify_detects_damage_in_every_packed_file(tmp_path):
    pack(small_cache(tmp_path / "cache", "zarr"), tmp_path / "packed")
    for path in sorted(p for p in (tmp_path / "packed").rglob("*") if p.is_file() and p.name != "manifest.json"):
        whole = path.read_bytes()
        for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            problems = verify(open_cache(tmp_path / "packed"))
            assert path.relative_to(tmp_path / "packed").as_posix() in {problem.path for problem in problems}, path
        path.write_bytes(whole)
    (tmp_path / "packed/visual/embedding/c/0/0").unlink()
    assert verify(open_cache(tmp_path / "packed"))


@pytest.mark.parametrize("name", ["visual/embedding/c/0/0", "visual/embedding/zarr.json", "records/visual.jsonl"])
def test_reading_detects_damage(tmp_path, name):
    pack(small_cache(tmp_path / "cache", "zarr"), tmp_path / "packed")
    path = tmp_path / "packed" / name
    whole = path.read_bytes()
    for damaged in (bytes([whole[3] ^ 1]).join([whole[:3], whole[4:]]), whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"is damaged.*vaflow cache pack CACHE"):
            open_cache(tmp_path / "packed").read("visual", "a/b")
    path.unlink()
    with pytest.raises(CorruptError, match="is damaged"):
        open_cache(tmp_path / "packed").read("visual", "a/b")


def test_damage_to_one_clip_does_not_affect_the_others(tmp_path):
    pack(small_cache(tmp_path / "cache", "zarr"), tmp_path / "packed")
    path = tmp_path / "packed/visual/embedding/c/0/0"
    whole = bytearray(path.read_bytes())
    whole[0] ^= 1  # of the first clip
    path.write_bytes(whole)
    packed = open_cache(tmp_path / "packed")
    assert packed.read("visual", "c").embedding.shape == (5, 6)
    with pytest.raises(CorruptError, match="item 'a/b'"):
        packed.read("visual", "a/b")
    assert ("visual", "a/b") in {(problem.stream, problem.item) for problem in verify(packed)}


def test_array_names_of_packed_records_cannot_lead_outside(tmp_path):
    pack(small_cache(tmp_path / "cache", "zarr"), tmp_path / "packed")
    records, manifest = tmp_path / "packed/records/visual.jsonl", tmp_path / "packed/manifest.json"
    lines = [json.loads(line) for line in records.read_bytes().splitlines()]
    lines[0]["arrays"]["/etc"] = {"shape": [1], "dtype": "uint8"}
    lines[0]["rows"]["/etc"] = {"start": 0, "stop": 1, "crc32c": 0}
    records.write_bytes(b"".join(canonical(line) + b"\n" for line in lines))
    document = unseal(manifest.read_bytes())
    document["files"]["records/visual.jsonl"] = file_facts(records)
    manifest.write_bytes(seal(document))
    assert any("'/etc'" in problem.message for problem in verify(open_cache(tmp_path / "packed")))


def test_links_and_pipes_of_a_cache_are_not_packed(tmp_path):
    cache = small_cache(tmp_path / "cache", "zarr")
    (tmp_path / "secret").write_text("secret")
    (cache.path / "failures.jsonl").symlink_to(tmp_path / "secret")
    os.mkfifo(cache.path / "costs.jsonl")
    pack(cache, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.jsonl"))
    chunk = tmp_path / "packed/visual/embedding/c/0/0"
    chunk.unlink()
    os.mkfifo(chunk)
    assert any("not a regular file" in problem.message for problem in verify(open_cache(tmp_path / "packed")))


def test_a_damaged_cache_is_not_packed(tmp_path):
    cache = small_cache(tmp_path / "cache", "zarr")
    chunk = next(path for path in (cache.path / "visual").rglob("*") if path.name == "0")
    chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
    with pytest.raises(CorruptError):
        pack(cache, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_pack_requires_a_new_directory_outside_the_cache(tmp_path):
    cache = small_cache(tmp_path / "cache", "zarr")
    with pytest.raises(UsageError, match="is the cache to read, or inside it"):
        pack(cache, cache.path / "packed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        pack(cache, tmp_path / "full")
    with pytest.raises(UsageError, match="object store"):
        pack(cache, "memory://bucket/packed")
    killed = tmp_path / ".tmp-packed"
    killed.mkdir()
    (killed / "half").write_text("of a killed command")
    (tmp_path / "packed").mkdir()
    pack(cache, tmp_path / "packed")
    assert not killed.exists()
    assert verify(open_cache(tmp_path / "packed")) == []


def test_an_object_store_is_read_with_range_requests(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("VAFLOW_CACHE_DIR", str(tmp_path / "local"))
    cache = small_cache(tmp_path / "cache", "zarr")
    pack(cache, tmp_path / "packed")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "packed"), "/bucket/packed", recursive=True)
    try:
        packed = open_cache("memory://bucket/packed")
        ranges: list[tuple[int, int]] = []
        whole = type(memory).cat_file

        def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **rest: Any) -> Any:
            if start is not None and end is not None:
                ranges.append((start, end))
            return whole(self, path, start, end, **rest)

        monkeypatch.setattr(type(memory), "cat_file", counted)
        assert_same(packed.committed("visual", "c")[1], cache.committed("visual", "c")[1])
        assert len(ranges) == len(KINDS["visual"])
        assert not list((tmp_path / "local").rglob("c/0*"))
        assert verify(packed) == []
    finally:
        memory.rm("/bucket", recursive=True)


def test_the_command_and_its_example(tmp_path, monkeypatch, capsys):
    small_cache(tmp_path / "cache", "zarr")
    assert main(["cache", "pack", "--help"]) == 0
    example = re.search(r"Example: vaflow ([^\n]+)", capsys.readouterr().out)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    assert main(example[1].split()) == 0
    assert "4 items in 21 files" in capsys.readouterr().out
    assert main(["cache", "info", "cache.packed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"] == "packed"
    assert main(["cache", "verify", "cache.packed"]) == 0
    for arguments in (["drop", "cache.packed", "c"], ["repair", "cache.packed"]):
        capsys.readouterr()
        assert main(["cache", *arguments]) == 2
        assert "packed caches are read-only" in capsys.readouterr().err
    (tmp_path / "cache.packed/records/visual.jsonl").write_text("")
    assert main(["cache", "verify", "cache.packed"]) == 1
    assert "Pack again: vaflow cache pack CACHE cache.packed" in capsys.readouterr().err
