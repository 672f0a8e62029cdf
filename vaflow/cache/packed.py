"""Packed caches: the rows of all clips of a stream in a few large sharded Zarr v3 arrays. They are read-only.

`cache_schema.md`, section "Packed caches", defines the files; `vaflow.cache.export` writes them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vaflow import files
from vaflow.cache.cache import Cache
from vaflow.cache.commit import Folder, Row, load_stream
from vaflow.cache.layout import Layout, crc32c, file_facts, fingerprint, record_from, source_stamp, unseal
from vaflow.cache.schema import DTYPES, PACKED, Array, Blob, Json, Record, StreamInfo, array_problems, escape
from vaflow.cache.stores import RAW_CODECS, known_arrays, size_problem
from vaflow.errors import CorruptError, UsageError, command, explain

_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class PackedArray:
    """Geometry of one sharded array: rows follow each other within a shard, chunk by chunk.

    Attributes:
        path: its folder.
        shape: of all rows of all items.
        dtype: little-endian.
        chunk_rows: rows of a chunk, the unit that zarr reads.
        shard_rows: rows of a shard, which is one file.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    shard_rows: int

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, Any]) -> "PackedArray":
        """The array that a `zarr.json` describes.

        Raises:
            ValueError: it is not stored as packed caches store arrays.
        """
        try:
            shape, grid = tuple(metadata["shape"]), tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            (sharding,) = metadata["codecs"]
            chunk = tuple(sharding["configuration"]["chunk_shape"])
            codecs, dtype = sharding["configuration"]["codecs"], metadata["data_type"]
        except _MALFORMED as error:
            raise ValueError(f"it does not describe a sharded array ({error!r})") from error
        lengths_fit = all(type(n) is int and n >= 0 for n in (*shape, *grid, *chunk)) and 0 < len(shape) == len(grid)
        whole_rows = lengths_fit and grid[1:] == chunk[1:] == tuple(max(1, n) for n in shape[1:])
        if not whole_rows or not 0 < chunk[0] <= grid[0] or grid[0] % chunk[0]:
            raise ValueError("its chunks are not whole rows")
        if sharding["name"] != "sharding_indexed" or codecs not in RAW_CODECS or dtype not in DTYPES:
            raise ValueError("its chunks are not raw bytes of a known type")
        return cls(path, shape, np.dtype(dtype).newbyteorder("<"), chunk[0], grid[0])

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.path / "c" / "/".join([str(number), *["0"] * (len(self.shape) - 1)])

    def ranges(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        """Return the location of the rows [start, stop): shard file, first byte, number of bytes."""
        while start < stop and self.row_bytes:
            number, first = divmod(start, self.shard_rows)
            rows = min(stop - start, self.shard_rows - first)
            yield self.shard(number), first * self.row_bytes, rows * self.row_bytes
            start += rows


class PackedCache(Cache):
    """A packed cache: the interface of a cache, read-only."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, "zarr", writable=False)
        self.store = PACKED
        self._files = manifest_files(layout)
        self._arrays: dict[Path, PackedArray] = {}
        self._records: dict[str, tuple[Folder, dict[str, bytes]]] = {}  # stream -> rows and lines; they never change

    def _corrupt(self, path: Path, problem: str, item: str | None = None) -> CorruptError:
        where = f", item {item!r}" if item is not None else ""
        problem = f"{self.layout.shown(path)} of the packed cache {self.place} is damaged{where}: {problem}"
        pack = command("cache", "pack", "CACHE", self.place)
        return CorruptError(explain(problem, remedy=f"Copy it again, or pack again: {pack}"))

    def _load_stream(self, file_name: str) -> StreamInfo:
        try:
            return load_stream(self.layout, file_name)
        except (OSError, ValueError) as error:
            raise self._corrupt(self.layout.all_streams / file_name, str(error)) from error

    def _folder(self, stream: str) -> Folder:
        return self._read_records(stream)[0]

    def _record_file(self, stream: str) -> Path:
        """The file of a stream's records, a line per item."""
        return self.layout.all_records / f"{escape(stream)}.jsonl"

    def _read_records(self, stream: str) -> tuple[Folder, dict[str, bytes]]:
        if stream in self._records:
            return self._records[stream]
        path = self._record_file(stream)
        facts = self._files.get(self.layout.shown(path))
        rows, lines = {}, {}
        for line in self._read_whole(path, facts).splitlines() if facts is not None else ():
            try:
                record = json.loads(line)
                name = f"{escape(record['item'])}.json"
                nbytes = sum(file["size"] for file in record["files"].values())
                split, source = record["meta"].get("split"), source_stamp(record["source"])
                rows[name] = Row(record["item"], 0, 0, 0, nbytes, split, source)
                lines[name] = line
            except (*_MALFORMED, UsageError) as error:
                raise self._corrupt(path, f"line {len(rows) + 1} is not a record ({error})") from error
        self._records[stream] = Folder((0, 0), True, rows), lines
        return self._records[stream]

    def _read_whole(self, path: Path, facts: Json) -> bytes:
        """All bytes of a file, checked against the manifest. Raises CorruptError."""
        try:
            self.layout.fill([path])
            files.refuse_links(self.layout.root, path)
            problem = size_problem(path, facts)
            data = b"" if problem else path.read_bytes()
        except OSError as error:
            raise self._corrupt(path, str(error)) from error
        if problem or crc32c(data) != facts["crc32c"]:
            raise self._corrupt(path, problem or "its bytes do not match their checksum")
        return data

    def has(self, stream: str, item: str) -> bool:
        return f"{escape(item)}.json" in self._folder(stream).rows

    def record_files(self) -> list[Path]:
        """As for any cache, but the paths are names only: a record is a line of a file."""
        return sorted(
            self.layout.records(stream) / name for stream in self.streams() for name in self._folder(stream).rows
        )

    def record_at(self, path: Path) -> Record:
        stream = next(name for name in self.streams() if escape(name) == path.parent.name)
        return self._record(stream, path.name)[0]

    def record(self, stream: str, item: str) -> Record:
        return self._item(stream, item)[0]

    def _item(self, stream: str, item: str) -> tuple[Record, Json]:
        self._stream(stream)
        if not self.has(stream, item):
            raise self._missing(stream, item)
        return self._record(stream, f"{escape(item)}.json")

    def _record(self, stream: str, file_name: str) -> tuple[Record, Json]:
        """The record, and the rows of its arrays: name -> start, stop and CRC32C."""
        path = self._record_file(stream)
        try:
            document = json.loads(self._read_records(stream)[1].get(file_name, b""))
            record, rows = record_from(document), document["rows"]
            spans = [(rows[name]["start"], rows[name]["stop"], rows[name]["crc32c"]) for name in record.arrays]
            if not all(type(n) is int for span in spans for n in span) or not all(0 <= a <= b for a, b, _ in spans):
                raise ValueError("its rows are not numbers")
        except _MALFORMED as error:
            raise self._corrupt(path, f"it has a record that cannot be used ({error!r})") from error
        if record.stream != stream or record.fingerprint != fingerprint(self._stream(stream)):
            raise self._corrupt(path, "it was made with other settings than its stream", record.item)
        return record, rows

    def _fetch(
        self, stream: str, item: str, names: Sequence[str] | None, *, verify: bool
    ) -> tuple[Record, dict[str, Array]]:
        record, rows = self._item(stream, item)
        array_names = known_arrays(record, names)
        return record, {name: self._rows_of(record, name, rows[name], verify=verify) for name in array_names}

    def _rows_of(self, record: Record, name: str, rows: Json, *, verify: bool) -> Array:
        """An item's rows of a packed array, copied, in the item's shape."""
        packed = self.packed_array(record.stream, name)
        shape, start, stop = tuple(record.arrays[name]["shape"]), rows["start"], rows["stop"]
        size = prod(shape) * packed.dtype.itemsize
        if (
            stop > packed.shape[0]
            or (stop - start) * packed.row_bytes != size
            or record.arrays[name]["dtype"] != packed.dtype.name
        ):
            raise self._corrupt(packed.path, "it does not hold the rows of the record", record.item)
        blobs = [self._bytes(*where, record.item) for where in packed.ranges(start, stop)]
        data = blobs[0] if len(blobs) == 1 else np.concatenate([*blobs, np.zeros(0, np.uint8)])
        if verify and crc32c(data) != rows["crc32c"]:
            raise self._corrupt(packed.path, "the bytes of its rows do not match their checksum", record.item)
        return data.view(packed.dtype).reshape(shape)

    def _bytes(self, path: Path, start: int, size: int, item: str) -> Blob:
        """Bytes of a shard; of one on an object store, by a range request."""
        try:
            if self.layout.remote is not None and not path.is_file():
                data = bytearray(self.layout.remote.read_range(path, start, start + size))
                blob = np.frombuffer(data, np.uint8)
            else:
                files.refuse_links(self.layout.root, path)
                if path.stat().st_size < start + size:
                    raise self._corrupt(path, "it is too short", item)
                # Not a memory map: a file that is truncated meanwhile would end the program.
                blob = np.fromfile(path, np.uint8, count=size, offset=start)
        except OSError as error:
            raise self._corrupt(path, str(error), item) from error
        if blob.size != size:
            raise self._corrupt(path, "it is too short", item)
        return blob

    def packed_array(self, stream: str, name: str) -> PackedArray:
        """The array that holds the rows of all items.

        Raises:
            CorruptError: its metadata are missing or damaged.
        """
        path = self.layout.attempts(stream) / name
        if path not in self._arrays:
            metadata = path / "zarr.json"
            facts = self._files.get(self.layout.shown(metadata))
            if facts is None:
                raise self._corrupt(metadata, "the manifest does not name it")
            data = self._read_whole(metadata, facts)
            try:
                self._arrays[path] = PackedArray.from_metadata(path, json.loads(data))
            except ValueError as error:
                raise self._corrupt(metadata, str(error)) from error
        return self._arrays[path]

    def problems(
        self, streams: Iterable[str], on_item: Callable[[], object] | None = None
    ) -> Iterator[tuple[Path, str, str | None, str | None]]:
        """Return every damage: the file, the problem, and the stream and item if it concerns one item.

        Reads every file, then every item of `streams`.
        """
        for name, facts in self._files.items():
            path = self.layout.root / name
            try:
                self.layout.fill([path], again=True)
                files.refuse_links(self.layout.root, path)
                problem = size_problem(path, facts)
                if problem or file_facts(path) != facts:
                    yield path, problem or "its bytes do not match their checksum", None, None
            except OSError as error:
                yield path, str(error), None, None
        for stream in streams:
            try:
                rows = self._folder(stream).rows
            except CorruptError as error:
                yield self._record_file(stream), str(error), stream, None
                continue
            for row in rows.values():
                for message in self._item_problems(stream, row.item):
                    yield self._record_file(stream), message, stream, row.item
                if on_item is not None:
                    on_item()

    def _item_problems(self, stream: str, item: str) -> list[str]:
        try:
            _, arrays = self._fetch(stream, item, None, verify=True)
        except CorruptError as error:
            return [str(error)]
        return array_problems(self._stream(stream), arrays)


def manifest_files(layout: Layout) -> dict[str, Json]:
    """Path below the cache -> size and CRC32C, from the manifest of a packed cache.

    Raises:
        CorruptError: the manifest does not name them.
    """
    try:
        named = unseal(files.read_document(layout.root, layout.manifest))["files"]
        for name, facts in named.items():
            parts = name.split("/")
            if {"", ".", ".."} & set(parts) or not all(type(facts[key]) is int for key in ("size", "crc32c")):
                raise ValueError(f"it names {name!r}")
    except _MALFORMED as error:
        raise layout.corrupt(layout.manifest, f"it does not name the files ({error!r})") from error
    return dict(named)


def refuse_writing(layout: Layout) -> UsageError:
    """The error for a command that writes into a packed cache."""
    unpack = command("cache", "convert", layout.place, "--out", f"{layout.place}.cache", "--store", "zarr")
    problem = f"The cache {layout.place} is packed, and packed caches are read-only"
    return UsageError(explain(problem, remedy=f"Unpack it first: {unpack}"))
