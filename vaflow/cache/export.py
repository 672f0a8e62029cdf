"""Copies of a cache in other formats: a packed cache, and Parquet files.

A packed cache holds the rows of all clips of each stream in a few large sharded Zarr v3 arrays. It is written in a
temporary folder beside its place and moved there whole, so a killed command leaves no packed cache.

The Parquet files are loaded by the Hugging Face `datasets` library, one configuration per stream:

DIR/README.md            names the configurations, their splits and files
    STREAM/SPLIT.parquet a row per clip: clip, split, and every array as a nested list, the first axis of any length
"""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c
import numpy as np

from vaflow import files
from vaflow.cache import PathLike, costs, layout_of
from vaflow.cache.cache import Cache
from vaflow.cache.copy import refuse_inside
from vaflow.cache.layout import (
    Layout,
    canonical,
    crc32c,
    file_facts,
    manifest_document,
    record_document,
    seal,
    stream_document,
)
from vaflow.cache.packed import PackedArray
from vaflow.cache.remote import url_of
from vaflow.cache.schema import KINDS, PACKED, Array, Record, StreamInfo, escape
from vaflow.errors import CacheError, UsageError, command, count, explain, visible
from vaflow.files import LISTS, write_file

log = logging.getLogger(__name__)

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
        on_item: called after each item.

    Raises:
        UsageError: `out` is not empty, is inside `source`, or is on an object store; or another process packs there.
        CorruptError: an item of `source` is damaged.
        CacheError: the disk refuses.
    """
    refuse_inside(source, out)
    target = layout_of(out)
    if target.remote is not None:
        remedy = "Pack into a local folder, then upload the folder"
        raise UsageError(explain(f"{target.place} is on an object store", expected="a local folder", remedy=remedy))
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
        try:
            lines = files.read_document(source.path, path)
        except ValueError as error:  # such as a link, whose target is not part of the cache
            log.warning("%s is not copied: %s", visible(str(path)), error)
            continue
        (work.root / path.name).write_bytes(lines)
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


if TYPE_CHECKING:
    import pyarrow

NO_SPLIT = "unsplit"  # of clips without a split, and of prompt sets
LEFT_OUT = ("pixels", "crops")  # JPEG files of faces: personal data, and large


def export_parquet(cache: Cache, out: Path, step: Callable[[], object] | None = None) -> dict[str, int]:
    """Write the streams of a cache as Parquet; returns stream -> number of clips. Face crops are left out.

    Args:
        out: a folder that is missing or empty.
        step: called after each clip of each stream.

    Raises:
        UsageError: pyarrow is missing, or `out` is not empty or is on an object store.
        CorruptError: an array is damaged.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        remedy = "From a clone: pip install -e '.[parquet]'"
        raise UsageError(explain("Parquet files require pyarrow", got=error, remedy=remedy)) from error
    if url := url_of(out):
        remedy = "Export into a local folder, then upload the folder"
        raise UsageError(explain(f"{url} is on an object store", expected="a local folder", remedy=remedy))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(explain(f"{out} is not empty", expected="a new or empty folder"))
    streams = {name: info for name, info in cache.streams().items() if info.kind not in LEFT_OUT}
    files = {name: _write_stream(cache, info, out / escape(name), step) for name, info in streams.items()}
    card = ["---", "configs:"]
    for name, splits in files.items():
        if splits:
            card += [f"- config_name: {_yaml(name)}", "  data_files:"]
            for split in map(_split_name, splits):
                path = f"{escape(name)}/{split}.parquet"
                card += [f"  - split: {_yaml(split)}", f"    path: {_yaml(path)}"]
    card += ["---", "", "# Features of a vaflow cache", ""]
    card += [
        f"- `{visible(name)}`: {info.kind}, {count(sum(files[name].values()), 'row')}" for name, info in streams.items()
    ]
    card += ["", "Times are seconds. `valid` is False where input is missing: a face, audio, or an annotation."]
    write_file(out / "README.md", "\n".join(card) + "\n")
    return {name: sum(splits.values()) for name, splits in files.items()}


def _write_stream(cache: Cache, info: StreamInfo, folder: Path, step: Callable[[], object] | None) -> dict[str, int]:
    """One file per split; returns split -> rows."""
    from pyarrow import parquet

    splits = defaultdict(list)
    for item in cache.items(stream=info.name):
        splits[(str(cache.meta(item).get("split") or "") if info.kind != "text" else "") or NO_SPLIT].append(item)
    for split, items in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{_split_name(split)}.parquet"
        writer = None
        for table in _tables(cache, info, split, items, step):
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return {split: len(items) for split, items in splits.items()}


def _tables(
    cache: Cache, info: StreamInfo, split: str, items: list[str], step: Callable[[], object] | None
) -> Iterator["pyarrow.Table"]:
    """One table of one row per clip."""
    import pyarrow

    required = [name for name, spec in KINDS[info.kind].items() if spec.required]  # columns of every table
    for item in items:
        columns: dict[str, Any] = {"clip": [visible(item)], "split": [visible(split)]}
        arrays = cache.read(info.name, item, required).arrays
        columns |= {name: _nested(arrays[name]) for name in required}
        yield pyarrow.table(columns)
        if step is not None:
            step()


def _nested(array: Array) -> "pyarrow.Array":
    """An array [N, ...] as one list of N nested lists; clips may differ in every axis."""
    import pyarrow

    values = pyarrow.array(np.ascontiguousarray(array).ravel())
    for axis in range(array.ndim - 1, -1, -1):
        number = int(np.prod(array.shape[:axis], dtype=np.int64))
        offsets = np.arange(number + 1, dtype=np.int32) * array.shape[axis]
        values = pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), values)
    return values


def _split_name(split: str) -> str:
    """A split as `datasets` allows it: letters, digits, underscores and dots."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.") else f"_{ord(c):x}_" for c in split)


def _yaml(text: str) -> str:
    return json.dumps(visible(text))  # JSON strings are YAML
