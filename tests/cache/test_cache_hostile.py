"""Malicious caches with valid seals are rejected by readers, verify and repair.

Every case puts a file beside the cache that must be there, unchanged, at the end.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from cache_toys import arrays, small_cache, stream

from vaflow.cache import Cache, open_cache
from vaflow.cache.copy import convert, merge
from vaflow.cache.layout import crc32c, seal
from vaflow.cache.maintenance import repair, verify
from vaflow.errors import CacheError, CorruptError, VaflowError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(params=["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """Documents are checked before either store is opened; arrays have tests of their own below."""
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path, store: str) -> Iterator[Path]:
    """A cache of two clips; files next to it are compared at the end."""
    outside = tmp_path / "precious" / "attempt"
    outside.mkdir(parents=True)
    (outside / "data.h5").write_bytes(b"precious")
    (tmp_path / "precious" / "notes.json").write_text("{}")
    yield small_cache(tmp_path / "cache", store, ("one", "two")).path
    assert (outside / "data.h5").read_bytes() == b"precious"
    assert (tmp_path / "precious" / "notes.json").read_text() == "{}"


def rewrite(file: Path, change: Change) -> None:
    """Change a document and update its seal, as an attacker who knows the format could."""
    document = json.loads(file.read_bytes())
    del document["crc32c"]
    changed = change(document)
    file.write_bytes(seal(changed if isinstance(changed, dict) else document))


def record_of(path: Path) -> Path:
    return path / "records" / "visual" / "one.json"


def assert_refused(path: Path) -> None:
    """Assert that reading and verify report the damage and that repair removes only that item."""
    with pytest.raises(CorruptError):
        open_cache(path).read("visual", "one")
    problems = verify(open_cache(path))
    assert any("one" in problem.path for problem in problems)
    repair(open_cache(path, writable=True))
    assert verify(open_cache(path)) == []
    assert open_cache(path).read("visual", "two").embedding.shape == (5, 6)


def nested(depth: int) -> dict[str, Any]:
    """An object that JSON holds but that functions which call themselves cannot visit."""
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


OUTSIDE = ["../../../precious/attempt", "..", ".", "", "/etc", "a/b", "a\\b", "a\0b", "precious\n", ".tmp-1", 7, None]


@pytest.mark.parametrize("attempt", OUTSIDE)
def test_an_attempt_must_be_a_plain_directory_name(path: Path, attempt: object) -> None:
    rewrite(record_of(path), lambda document: document.update(attempt=attempt, files={}))
    assert_refused(path)


@pytest.mark.parametrize("name", ["../../precious/notes.json", "/etc/passwd", "", "..", "x/../../y", "x\0", "x//y"])
def test_record_files_must_lie_below_the_attempt(path: Path, name: str) -> None:
    def point_outside(document: dict[str, Any]) -> None:
        attempt = document["attempt"]
        document["files"] = {f"{attempt}/{name}" if "x" in name else name: {"size": 2, "crc32c": crc32c(b"{}")}}

    rewrite(record_of(path), point_outside)
    assert_refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"stream": "../precious"},
        {"item": "../../precious"},
        {"item": ["one"]},
        {"arrays": []},
        {"files": "abc"},
        {"files": {"a": None}},
        {"meta": 3},
        {"meta": {"split": ["train"]}},
        {"meta": {"duration": 1e300}},
        {"meta": {"duration": "long"}},
        {"meta": {"person": "x"}},
        {"meta": {"notable": [2]}},
        {"meta": {"clip": 5}},
        {"meta": {"seconds": [None]}},
        {"meta": {"seconds": 4.5}},
        {"source": None},
        {"source": {"prompts": 5}},
        {"source": {"prompts": {"descriptions": -1}}},
        {"schema_version": 2},
        {"arrays": {"embedding": {"shape": [-1, 6], "dtype": "float16"}}},
        {"arrays": {"embedding": {"shape": [2**62, 2**62], "dtype": "float16"}}},
        {"arrays": {"embedding": {"shape": [5, 6], "dtype": "object"}}},
        {"arrays": {"embedding": {"shape": [5.0, 6], "dtype": "float16"}}},
        {"arrays": {"embedding": {"shape": "56", "dtype": "float16"}}},
        {"arrays": {"/etc/passwd": {"shape": [1], "dtype": "uint8"}}},
        {"source": nested(500)},
        {"meta": nested(500)},
    ],
    ids=lambda change: str(change)[:60],
)
def test_record_members_of_wrong_type_or_size_are_rejected(path: Path, change: dict[str, Any]) -> None:
    rewrite(record_of(path), lambda document: document.update(change))
    assert_refused(path)


def test_a_file_of_unexpected_size_is_not_read(path: Path) -> None:
    """A sparse terabyte file uses no disk space but would exhaust memory."""
    file = next(p for p in (path / "visual" / "one").rglob("*") if p.is_file())
    os.truncate(file, 2**40)
    assert_refused(path)


def test_an_oversized_document_is_not_read(path: Path) -> None:
    os.truncate(record_of(path), 2**40)
    assert_refused(path)
    os.truncate(path / "manifest.json", 2**40)
    with pytest.raises(CorruptError, match="such a file has at most"):
        open_cache(path)


def test_a_named_pipe_does_not_block_reading(path: Path) -> None:
    file = next(p for p in (path / "visual" / "one").rglob("*") if p.is_file())
    file.unlink()
    os.mkfifo(file)
    assert_refused(path)


def test_deeply_nested_documents_are_rejected(path: Path) -> None:
    record_of(path).write_bytes(b"[" * 200_000)
    assert_refused(path)
    (path / "manifest.json").write_bytes(b"[" * 200_000)
    with pytest.raises(CorruptError):
        open_cache(path)


# --- links


def test_a_symlinked_array_is_not_followed(path: Path) -> None:
    attempt = next((path / "visual" / "one").iterdir())
    moved = path.parent / "elsewhere"
    attempt.rename(moved)
    attempt.symlink_to(moved)
    with pytest.raises(CorruptError, match="link"):
        open_cache(path).read("visual", "one")
    repair(open_cache(path, writable=True))
    assert moved.exists()
    assert verify(open_cache(path)) == []


def test_a_symlinked_stream_directory_is_not_followed(path: Path) -> None:
    """Its record names an attempt that lies outside; dropping the item must not remove it there."""
    precious = path.parent / "precious"
    (path / "visual").rename(path.parent / "moved")
    (path / "visual").symlink_to(precious)
    (precious / "one").mkdir()
    (precious / "one" / "attempt").write_text("kept")
    rewrite(record_of(path), lambda document: document.update(attempt="attempt", files={}))
    cache = open_cache(path, writable=True)
    with pytest.raises(CorruptError):
        cache.read("visual", "one")
    cache.drop("visual", "one")
    with pytest.raises(CacheError, match="link"):
        cache.write("visual", "one", arrays(stream("visual")))
    repair(cache)
    assert (precious / "one" / "attempt").read_text() == "kept"
    assert not (precious / "two").exists()


@pytest.mark.parametrize("where", ["records/visual", "records/other"])
def test_repair_removes_nothing_behind_a_symlink(path: Path, where: str) -> None:
    folder = path / where
    if folder.exists():
        folder.rename(path.parent / "moved")
    folder.symlink_to(path.parent / "precious")
    problems = repair(open_cache(path, writable=True))
    assert any("link" in problem.message for problem in problems)


def test_a_symlinked_streams_directory_is_rejected(path: Path) -> None:
    (path / "streams").rename(path.parent / "moved")
    (path / "streams").symlink_to(path.parent / "precious")
    with pytest.raises(CorruptError, match="link"):
        repair(open_cache(path, writable=True))


def test_repair_unlinks_a_symlinked_record_and_keeps_its_target(path: Path) -> None:
    record_of(path).unlink()
    record_of(path).symlink_to(path.parent / "precious" / "notes.json")
    assert_refused(path)


def test_a_cache_can_be_opened_through_a_symlink(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    assert open_cache(link).read("visual", "one").embedding.shape == (5, 6)


# --- arrays larger than their files


def commit_files(cache: Cache, make: Callable[[Path], None]) -> None:
    """Replace the files of an item by what `make` writes into an attempt, with right sizes and checksums."""
    record = json.loads(record_of(cache.path).read_bytes())
    folder, attempt = cache.path / "visual" / "one", record["attempt"]
    make(folder / attempt)
    files = [p for p in folder.rglob("*") if p.is_file()]
    contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
    facts = {name: {"size": len(data), "crc32c": crc32c(data)} for name, data in contents.items()}
    rewrite(record_of(cache.path), lambda document: document.update(files=facts))


def claim(path: Path, shape: list[int]) -> None:
    rewrite(record_of(path), lambda document: document["arrays"]["embedding"].update(shape=shape, dtype="float16"))


@pytest.mark.parametrize("store", ["zarr"], indirect=True)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_zarr_header_claiming_a_terabyte_is_rejected(path: Path, compressed: bool) -> None:
    """Missing chunks read as zeros, and compressed zeros expand to any size."""

    def bomb(attempt: Path) -> None:
        metadata = attempt / "embedding" / "zarr.json"
        document = json.loads(metadata.read_text())
        document["shape"] = [2**36, 6]
        if compressed:
            document["codecs"].append({"name": "zstd", "configuration": {"level": 0, "checksum": False}})
            document["chunk_grid"]["configuration"]["chunk_shape"] = [2**36, 6]
        metadata.write_text(json.dumps(document))

    commit_files(open_cache(path), bomb)
    claim(path, [2**36, 6])
    assert_refused(path)


@pytest.mark.parametrize("store", ["zarr"], indirect=True)
def test_a_small_zarr_array_with_codecs_is_rejected(path: Path) -> None:
    def pack(attempt: Path) -> None:
        zarr.create_array(attempt / "embedding", data=np.zeros((5, 6), np.float16), overwrite=True, chunks=(5, 6))

    commit_files(open_cache(path), pack)
    assert_refused(path)


@pytest.mark.parametrize("store", ["zarr"], indirect=True)
def test_the_default_chunk_keys_need_no_configuration(path: Path) -> None:
    """As TensorStore writes them."""

    def shorten(attempt: Path) -> None:
        metadata = attempt / "embedding" / "zarr.json"
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"chunk_key_encoding": {"name": "default"}}))

    commit_files(open_cache(path), shorten)
    assert open_cache(path).read("visual", "one").embedding.shape == (5, 6)


@pytest.mark.parametrize("store", ["hdf5"], indirect=True)
@pytest.mark.parametrize("how", ["external file", "external link", "soft link", "virtual", "packed", "references"])
def test_an_external_hdf5_dataset_is_rejected(path: Path, how: str) -> None:
    precious = path.parent / "precious" / "attempt" / "data.h5"

    def bomb(attempt: Path) -> None:
        with h5py.File(f"{attempt}.h5", "a") as file:
            del file["embedding"]
            if how == "external file":
                file.create_dataset("embedding", (4,), np.float16, external=[(str(precious), 0, 8)])
            elif how == "external link":
                file["embedding"] = h5py.ExternalLink(str(precious), "x")
            elif how == "soft link":
                file["embedding"] = h5py.SoftLink("/time")
            elif how == "virtual":
                layout = h5py.VirtualLayout((4,), np.float16)
                layout[:] = h5py.VirtualSource(str(precious), "x", (4,))
                file.create_virtual_dataset("embedding", layout)
            elif how == "packed":
                file.create_dataset("embedding", (2**30, 6), np.float16, chunks=(2**20, 6), compression="gzip")
            else:
                file.create_dataset("embedding", (5, 6), h5py.ref_dtype)

    commit_files(open_cache(path), bomb)
    assert_refused(path)


# --- the other commands that read records


def test_convert_and_merge_list_hostile_items_and_copy_the_rest(path: Path, store: str) -> None:
    rewrite(record_of(path), lambda document: document.update(attempt="../../../precious/attempt"))
    other = "hdf5" if store == "zarr" else "zarr"
    copied = convert(open_cache(path), path.parent / "copy", other)
    joined = merge(path.parent / "joined", [open_cache(path)])
    for summary in (copied, joined):
        assert [failure.item for failure in summary.failures] == ["one"]
        assert open_cache(summary.out).read("visual", "two").embedding.shape == (5, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "virus"},
        {"kind": ["visual"]},
        {"dim": -1},
        {"dim": 2**70},
        {"dim": 6.0},
        {"identity": []},
        {"identity": nested(500)},
        {"name": 1},
    ],
    ids=lambda change: str(change)[:60],
)
def test_stream_files_with_wrong_types_are_rejected(path: Path, change: dict[str, Any]) -> None:
    from hashlib import blake2b

    from vaflow.cache.layout import canonical

    def mark(document: dict[str, Any]) -> None:
        document.update(change)
        fields = {key: document[key] for key in ("name", "kind", "dim", "dtype", "identity")}
        document["fingerprint"] = blake2b(canonical(fields), digest_size=16).hexdigest()

    rewrite(path / "streams" / "visual.json", mark)
    with pytest.raises(VaflowError):
        open_cache(path).read("visual", "one")
    assert any(problem.path == "streams/visual.json" for problem in verify(open_cache(path)))


@pytest.mark.parametrize("row", [[], [1] * 6, ["one", 1, 1, 1, 1, ["train"]], None, "abcdef", {"a": 1}], ids=str)
def test_a_hostile_index_is_rebuilt(path: Path, row: object) -> None:
    from vaflow.cache.commit import HEAD, MIDDLE, TAIL
    from vaflow.cache.layout import canonical

    table = {"stamp": [0, 0], "settled": True, "rows": {"x.json": row}}
    body = canonical({"schema_version": 1, "streams": {"labels": table}})
    (path / "index.json").write_bytes(HEAD + str(crc32c(body)).encode() + MIDDLE + body + TAIL)
    assert open_cache(path).items() == ["one", "two"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda index: index.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_an_index_that_never_ends_is_not_read(path: Path, make: Callable[[Path], None]) -> None:
    index = path / "index.json"
    index.unlink(missing_ok=True)
    make(index)
    cache = open_cache(path, writable=True)
    assert cache.items() == ["one", "two"]
    cache.refresh_index()
    assert index.is_file() and not index.is_symlink()
