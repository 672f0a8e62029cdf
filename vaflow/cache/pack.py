"""Pack a cache: write the rows of all clips of each stream into a few large sharded Zarr v3 arrays.

The packed cache is written in a temporary folder beside its place and moved there whole, so a killed command leaves no
packed cache; the same command begins again.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from vaflow import files
from vaflow.cache import costs
from vaflow.cache.cache import Cache
from vaflow.cache.copy import refuse_inside
from vaflow.cache.documents import (
    canonical,
    crc32c,
    file_facts,
    manifest_document,
    record_document,
    seal,
    stream_document,
)
from vaflow.cache.layout import Layout
from vaflow.cache.opening import PathLike, layout_of
from vaflow.cache.packed import PackedArray
from vaflow.cache.schema import PACKED, Array, Record
from vaflow.errors import CacheError, UsageError, command, explain
from vaflow.failures import LISTS

CHUNK = 2**20  # bytes at most, and one row at least: what zarr reads at a time
SHARD = 2**29  # bytes at most, and one chunk at least: a file
NO_CHUNK = 2**64 - 1  # offset and length of a chunk beyond the end of the array


@dataclass(frozen=True)
class PackSummary:
    """Counts of a finished pack: items, arrays, files and bytes of the packed cache at `out`."""

    out: str
    items: int
    arrays: int
    files: int
    bytes: int


def pack(
    source: Cache, out: PathLike, *, shard_bytes: int = SHARD, on_item: Callable[[], object] | None = None
) -> PackSummary:
    """Write a packed copy of a cache, with the same streams, records and failure lists.

    Args:
        source: every item is read and compared with its checksum.
        out: a folder that is missing or empty.
        shard_bytes: largest size of a file of arrays, unless a row is larger.
        on_item: called after each item, for a progress bar.

    Raises:
        UsageError: `out` is not empty, is inside `source`, or is on an object store; or another process packs there.
        CorruptError: an item of `source` is damaged.
        CacheError: the disk refuses.
    """
    refuse_inside(source, out)
    target = layout_of(out)
    if target.remote is not None:
        remedy = "Pack into a local folder, then upload the folder"
        raise UsageError(explain(f"{out} is on an object store", expected="a local folder", remedy=remedy))
    if target.root.exists() and not (target.root.is_dir() and not any(target.root.iterdir())):
        remedy = "Choose another folder, or remove this one"
        raise UsageError(explain(f"{out} is not empty", expected="an empty or missing folder", remedy=remedy))
    work = Layout(target.root.parent / f"{files.TEMPORARY}{target.root.name[:100]}")
    with files.lock_folder(work.root, "vaflow cache pack"):
        try:
            for path in work.root.iterdir():  # of a pack that was killed
                if path.name != files.LOCK:
                    files.remove(path)
            summary = _write(source, work, target, shard_bytes, on_item)
            (work.root / files.LOCK).unlink()
            work.root.rename(target.root)
            files.sync(target.root.parent)
        except OSError as error:
            remedy = "Free disk space or grant write access, then run the command again"
            raise CacheError(explain(f"Cannot write the packed cache {out}: {error}", remedy=remedy)) from error
        finally:
            shutil.rmtree(work.root, ignore_errors=True)
    return summary


def _write(
    source: Cache, work: Layout, target: Layout, shard_bytes: int, on_item: Callable[[], object] | None
) -> PackSummary:
    files.make_folder(work.all_streams)
    files.make_folder(work.all_records)
    items = 0
    for stream, info in source.streams().items():
        work.stream(stream).write_bytes(seal(stream_document(info)))
        records = _records(source, stream)
        _pack_stream(source, work, stream, records, shard_bytes, on_item)
        items += len(records)
    names = sorted(path.relative_to(work.root).as_posix() for path in work.root.rglob("*") if path.is_file())
    names.remove(files.LOCK)
    facts = {name: file_facts(work.root / name) for name in names}
    for path in (*source.path.glob(LISTS), *source.path.glob(costs.LISTS)):
        shutil.copyfile(path, work.root / path.name)
        names.append(path.name)
    files.sync_all(work.root, names)
    files.replace_file(work.manifest, seal({**manifest_document(PACKED), "files": facts}))
    arrays = sum(name.endswith("/zarr.json") and name.count("/") > 1 for name in facts)
    nbytes = sum(file["size"] for file in facts.values())
    return PackSummary(target.place, items, arrays, len(facts) + 1, nbytes)


def _records(source: Cache, stream: str) -> list[Record]:
    """The stream's records, sorted by item. Raises CorruptError."""
    items = sorted(source.source_stamps(stream))
    if source.has_damage(stream):
        problem = f"Stream {stream!r} of {source.place} has damaged records"
        raise CacheError(explain(problem, remedy=command("cache", "repair", source.place)))
    return [source.record(stream, item) for item in items]


def _pack_stream(
    source: Cache,
    work: Layout,
    stream: str,
    records: Sequence[Record],
    shard_bytes: int,
    on_item: Callable[[], object] | None,
) -> None:
    """Write one stream: its arrays, and a line per record."""
    import zarr

    folder = work.attempts(stream)
    zarr.create_group(store=folder, zarr_format=3, overwrite=True)
    names = sorted({name for record in records for name in record.arrays})
    writers = {name: ArrayWriter(_geometry(folder / name, name, records, shard_bytes)) for name in names}
    with (work.all_records / f"{work.stream(stream).name}l").open("wb") as lines:
        for record in records:
            again, arrays = source.committed(stream, record.item)
            if again.arrays != record.arrays:
                problem = f"{record.item!r} of stream {stream!r} was replaced while it was packed"
                raise CacheError(explain(problem, remedy="Run the command again when nothing writes into the cache"))
            rows = {name: writers[name].append(array) for name, array in arrays.items()}
            lines.write(canonical({**record_document(again), "rows": rows}) + b"\n")
            if on_item is not None:
                on_item()
    for writer in writers.values():
        writer.close()


def _geometry(path: Path, name: str, records: Sequence[Record], shard_bytes: int) -> PackedArray:
    """Create the array's `zarr.json`: rows of the items' shape, or single numbers where items disagree about it."""
    import zarr

    facts = [record.arrays[name] for record in records if name in record.arrays]
    row_shapes = {tuple(fact["shape"][1:]) for fact in facts}
    row_shape = row_shapes.pop() if len(row_shapes) == 1 else ()
    rows = sum(fact["shape"][0] if len(fact["shape"]) == len(row_shape) + 1 else prod(fact["shape"]) for fact in facts)
    dtype = np.dtype(facts[0]["dtype"])
    row_bytes = max(1, prod(row_shape) * dtype.itemsize)
    chunk_rows = max(1, min(CHUNK // row_bytes, rows, shard_bytes // row_bytes))
    chunks = max(1, min(shard_bytes // (chunk_rows * row_bytes), -(-rows // chunk_rows)))
    padded = tuple(max(1, length) for length in row_shape)
    zarr.create_array(
        store=path,
        shape=(rows, *row_shape),
        dtype=dtype,
        zarr_format=3,
        overwrite=True,
        chunks=(chunk_rows, *padded),
        shards=(chunk_rows * chunks, *padded),
        filters=None,
        compressors=None,
    )
    return PackedArray.from_metadata(path, json.loads((path / "zarr.json").read_bytes()))


class ArrayWriter:
    """Appends the rows of item after item to the shards of one array.

    Shards are written here and not by zarr: rows follow each other in a shard without gaps, whatever the version of
    zarr, and memory does not depend on the size of a shard.
    """

    def __init__(self, array: PackedArray) -> None:
        self.array = array
        self._rows = 0
        self._file: BinaryIO | None = None

    def append(self, rows: Array) -> Mapping[str, int]:
        """Write an item's array; returns its first and last row (exclusive) and the CRC-32C of its bytes."""
        data = rows.astype(self.array.dtype, copy=False).tobytes()
        start, written = self._rows, 0
        stop = start + (len(rows) if rows.shape[1:] == self.array.shape[1:] else rows.size)
        for path, _, size in self.array.ranges(start, stop):
            if self._file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("xb")
            self._file.write(data[written : written + size])
            written += size
            if self._file.tell() == self.array.shard_rows * self.array.row_bytes:
                self._finish()
        self._rows = stop
        return {"start": start, "stop": stop, "crc32c": crc32c(data)}

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._finish()

    def _finish(self) -> None:
        """Fill up the last chunk, and write the shard's index."""
        assert self._file is not None
        array = self.array
        chunk = array.chunk_rows * array.row_bytes
        written = -(-self._file.tell() // chunk)
        self._file.write(b"\0" * (written * chunk - self._file.tell()))
        index = np.full((array.shard_rows // array.chunk_rows, 2), NO_CHUNK, "<u8")
        index[:written, 0] = np.arange(written) * chunk
        index[:written, 1] = chunk
        self._file.write(index.tobytes())
        self._file.write(google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
        self._file.close()
        self._file = None
