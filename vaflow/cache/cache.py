"""The cache: declare streams; read, write and drop items."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache.commit import (
    Folder,
    Index,
    Row,
    commit,
    declare,
    discard,
    load_record,
    load_stream,
    saved_at_intervals,
)
from vaflow.cache.layout import Layout, fingerprint, now, plain
from vaflow.cache.schema import (
    LABELS,
    SCHEMA_VERSION,
    Array,
    Item,
    Json,
    Record,
    Rows,
    StoreName,
    StreamInfo,
    array_problems,
    escape,
)
from vaflow.cache.scratch import LongArray, Scratch
from vaflow.cache.stores import STORES, fetch
from vaflow.errors import (
    CacheError,
    CorruptError,
    DataError,
    FingerprintError,
    MissingError,
    UsageError,
    command,
    explain,
    similar_names,
)

NO_SPLIT = "none"  # split name of clips without a split, in `info` and `items`


class Cache:
    """A directory of streams over clips. Returned by `open_cache` and `create_cache`.

    Attributes:
        path: the directory; of a cache on an object store, its local copy.
        place: the directory or URL, as `open_cache` accepts it.
        store: "zarr", "hdf5" or "packed".
        writable: whether items may be written and dropped.
        scratch: makes arrays for items that may exceed memory.
    """

    def __init__(self, layout: Layout, store: StoreName, *, writable: bool) -> None:
        self.path = layout.root
        self.place = layout.place
        self.store: StoreName = store
        self.writable = writable
        self.layout = layout
        self.scratch = Scratch(layout)
        self._store = STORES[store]
        self._streams: dict[str, StreamInfo] = {}  # by file name; the files never change
        self._index = Index(self.layout)

    def __repr__(self) -> str:
        return f"Cache({self.place!r}, store={self.store!r}, writable={self.writable})"

    # Streams

    def streams(self) -> dict[str, StreamInfo]:
        """Return every stream by name, sorted.

        Raises:
            CorruptError: a stream's file is damaged.
        """
        folder = self.layout.all_streams
        names = sorted(p.name for p in folder.glob("*.json") if not p.name.startswith(".")) if folder.is_dir() else []
        self._streams = {name: self._streams.get(name) or self._load_stream(name) for name in names}
        return {info.name: info for info in sorted(self._streams.values(), key=lambda info: info.name)}

    def _load_stream(self, file_name: str) -> StreamInfo:
        try:
            return load_stream(self.layout, file_name)
        except ValueError as error:
            raise self.layout.corrupt(self.layout.all_streams / file_name, str(error)) from error

    def _stream(self, stream: str) -> StreamInfo:
        name = f"{escape(stream)}.json"
        if name not in self._streams:
            known = self.streams()
            if stream not in known:
                raise MissingError(explain(f"{self.place} has no such stream", got=stream, choices=known))
        return self._streams[name]

    def fingerprint(self, stream: str) -> str:
        """The stream's fingerprint: 32 hexadecimal digits.

        Raises:
            MissingError: the stream does not exist.
        """
        return fingerprint(self._stream(stream))

    def declare(self, info: StreamInfo) -> None:
        """Add a stream, or check that the existing stream of this name has the same settings.

        Raises:
            FingerprintError: the settings differ; every field that differs is named.
            UsageError: `info` is not a valid stream, or the cache was opened for reading.
            CacheError: writing fails.
        """
        self._must_be_writable()
        try:
            declare(self.layout, info)
        except OSError as error:
            raise self.layout.cannot_write(error) from error

    # Items

    def items(self, split: str | None = None, stream: str | None = None) -> list[str]:
        """Return sorted clip ids: the items of the labels stream, optionally of one split and present in `stream`.

        The split "none" selects clips without a split. Of a text stream, the prompt sets are returned.

        Raises:
            UsageError: no clip has that split, or the stream does not exist.
            CorruptError: a record is damaged.
        """
        known = self.streams()
        if stream is not None and stream not in known:
            raise UsageError(explain(f"{self.place} has no such stream", got=stream, choices=known))
        if stream is not None and known[stream].kind == "text":
            return sorted(row.item for row in self._rows(stream).values())
        rows = self._rows(LABELS).values()
        if split is not None:
            splits = {row.split or NO_SPLIT for row in rows}
            if split not in splits:
                remedy = None
                if NO_SPLIT in splits:
                    assign = command("cache", "splits", self.place, "splits.csv")
                    remedy = f"none = clips without a split; to assign: `{assign}`"
                problem = f"No clip of {self.place} has this split"
                raise UsageError(explain(problem, got=split, choices=splits, remedy=remedy))
            rows = [row for row in rows if (row.split or NO_SPLIT) == split]  # type: ignore[assignment]
        if stream is not None and stream != LABELS:
            here = {row.item for row in self._rows(stream).values()}
            return sorted(row.item for row in rows if row.item in here)
        return sorted(row.item for row in rows)

    def _folder(self, stream: str) -> Folder:
        return self._index.folder(stream)

    def _rows(self, stream: str) -> dict[str, Row]:
        folder = self._folder(stream)
        for name, problem in folder.damaged.items():
            raise self.layout.corrupt(self.layout.records(stream) / name, problem)
        return folder.rows

    def has(self, stream: str, item: str) -> bool:
        """Return whether the item is committed, from the file system.

        Commits of other writers count at once; on an object store, after the cache is opened or its index refreshed.
        """
        return self.layout.record(stream, item).is_file()

    def source_stamps(self, stream: str) -> dict[str, str]:
        """Item -> `documents.source_stamp` of its source, for every readable item of the stream.

        Read from the index, so that 100,000 items are compared with a data set without reading their records.
        """
        return {row.item: row.source for row in self._folder(stream).rows.values()}

    def has_damage(self, stream: str) -> bool:
        """Return whether a record of the stream is damaged: `source_stamps` lacks such items."""
        return bool(self._folder(stream).damaged)

    def record(self, stream: str, item: str) -> Record:
        """Return the item's completion record, read from the disk.

        Raises:
            MissingError: the stream or item does not exist.
            CorruptError: the record is damaged.
        """
        info = self._stream(stream)
        path = self.layout.record(stream, item)
        try:
            record = load_record(self.layout, path)
        except FileNotFoundError:
            raise self._missing(stream, item) from None
        except ValueError as error:
            raise self.layout.corrupt(path, str(error), stream, item) from error
        if record.fingerprint != fingerprint(info):
            raise self.layout.corrupt(path, "its settings differ from those of its stream", stream, item)
        return record

    def _missing(self, stream: str, item: str) -> MissingError:
        ids = [row.item for row in self._folder(stream).rows.values()]
        remedy = similar_names(item, ids, "List the items with Cache.items()")
        return MissingError(explain(f"Stream {stream!r} of {self.place} has no such item", got=item, remedy=remedy))

    def record_files(self) -> list[Path]:
        """The file of every committed item of every stream, sorted; a record in it may be damaged."""
        return sorted(path for path in self.layout.all_records.glob("*/*.json") if not path.name.startswith("."))

    def record_at(self, path: Path) -> Record:
        """The record in one of `record_files`.

        Raises:
            ValueError: it is damaged.
            FileNotFoundError: it was dropped since it was listed.
        """
        return load_record(self.layout, path)

    def meta(self, item: str) -> Json:
        """Return the facts in a clip's labels record: "split", "group", "duration" ... Raises as `record`."""
        return self.record(LABELS, item).meta

    # Arrays

    def read(self, stream: str, item: str, names: Sequence[str] | None = None, *, verify: bool = True) -> Item:
        """Return the item's arrays, or those in `names`. Bytes are checked before zarr or libhdf5 parses them.

        Args:
            names: which arrays; all when None.
            verify: compare size and CRC32C of every file that is read with the record.

        Raises:
            MissingError: the stream, item or array does not exist.
            CorruptError: files are missing or differ from the record.
        """
        record, arrays = self._fetch(stream, item, names, verify=verify)
        return Item(stream, item, arrays, dict(record.meta))

    def committed(self, stream: str, item: str) -> tuple[Record, dict[str, Array]]:
        """Return the item's record and all arrays of the same attempt; checks and raises as `read`."""
        return self._fetch(stream, item, None, verify=True)

    def _fetch(
        self, stream: str, item: str, names: Sequence[str] | None, *, verify: bool
    ) -> tuple[Record, dict[str, Array]]:
        record = self.record(stream, item)
        while True:
            try:
                return record, fetch(self.layout, self._store, record, names, verify=verify)
            except CorruptError:
                path = self.layout.record(stream, item)
                try:
                    self.layout.look(path)
                except OSError as error:
                    raise self.layout.corrupt(path, f"it cannot be read ({error})", stream, item) from error
                current = self.record(stream, item)
                if current.attempt == record.attempt:
                    raise
                record = current  # the item was re-extracted in the meantime

    def write(
        self,
        stream: str,
        item: str,
        arrays: Mapping[str, Rows],
        *,
        source: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Record:
        """Commit an item durably (it survives a kill and a power cut). Replaces the item if it exists.

        Args:
            arrays: as the stream's kind in `KINDS` says; those made by `scratch` may exceed memory.
            source: identity of the files that the item was made from.

        Returns:
            The committed record: another writer's, if it committed the same new item first.

        Raises:
            DataError: the arrays do not fit the stream; every problem is named.
            MissingError: the stream is not declared.
            UsageError: `source` or `meta` is not plain JSON, or the cache was opened for reading.
            CacheError: writing fails.
        """
        self._must_be_writable()
        draft = Record(
            stream=stream,
            item=item,
            attempt="",
            arrays={},
            files={},
            source=plain(source or {}, "source"),
            meta=plain(meta or {}, "meta"),
            created=now(),
            fingerprint=self.fingerprint(stream),
        )
        return self._commit(draft, arrays)

    def adopt(self, record: Record, arrays: Mapping[str, Rows]) -> Record:
        """Commit an item of another cache with its source, facts and creation time; otherwise like `write`.

        Raises:
            FingerprintError: its settings differ from those of the stream in this cache.
        """
        self._must_be_writable()
        if record.fingerprint != self.fingerprint(record.stream):
            problem = f"Item {record.item!r} of stream {record.stream!r} has other settings than {self.place}"
            expected = f"fingerprint {self.fingerprint(record.stream)}"
            raise FingerprintError(explain(problem, expected=expected, got=record.fingerprint))
        return self._commit(replace(record, attempt="", files={}), arrays)

    def _commit(self, draft: Record, arrays: Mapping[str, Rows]) -> Record:
        info = self._stream(draft.stream)
        # Sorted, so that equal arrays make equal HDF5 files.
        arrays = {
            name: array if isinstance(array := arrays[name], LongArray) else np.asarray(array, order="C")
            for name in sorted(arrays)
        }
        problems = array_problems(info, arrays)
        if problems:
            raise DataError(explain(f"Item {draft.item!r} does not fit stream {draft.stream!r}: {'; '.join(problems)}"))
        shapes = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()}
        try:
            return commit(self.layout, self._store, replace(draft, arrays=shapes), arrays)
        except OSError as error:
            raise self.layout.cannot_write(error) from error

    def drop(self, stream: str, item: str) -> None:
        """Remove an item: its record first, then its arrays. A missing item is ignored."""
        self._must_be_writable()
        try:
            discard(self.layout, self._store, self.layout.record(stream, item))
        except OSError as error:
            raise self.layout.cannot_write(error) from error

    # Index and summary

    def refresh_index(self) -> None:
        """Save the index, so that the next reader opens fast; a read-only cache reloads it.

        Raises:
            CacheError: writing to the disk or the object store fails.
        """
        try:
            if self.layout.remote is not None:
                if self.writable:
                    self.layout.remote.push_lists()
                self.layout.remote.pull()
            if self.writable:
                self._index.save(self.streams())  # lists every folder; reads only new and changed records
            else:
                self._index = Index(self.layout)
        except OSError as error:
            raise self.layout.cannot_write(error) from error

    @contextmanager
    def indexed(self) -> Iterator[None]:
        """Save the index at intervals while the block runs, so that a killed run loses little; refresh it at the end.

        If the block fails, its error is raised even if saving the index fails too: the next run rebuilds the index.
        """
        try:
            with saved_at_intervals(self._save_aside):
                yield
        except BaseException:
            with suppress(CacheError):
                self.refresh_index()
            raise
        self.refresh_index()

    def _save_aside(self) -> None:
        """Save through a separate `Index`, because this runs in another thread."""
        if self.writable:
            Index(self.layout).save(self.streams())

    def info(self) -> Json:
        """Return the object that `vaflow cache info --json` prints."""
        clips = self._folder(LABELS).rows.values()
        return {
            "path": self.place,
            "schema_version": SCHEMA_VERSION,
            "store": self.store,
            "items": len(clips),
            "splits": dict(sorted(Counter(row.split or NO_SPLIT for row in clips).items())),
            "streams": {name: self._stream_facts(info) for name, info in self.streams().items()},
        }

    def _stream_facts(self, info: StreamInfo) -> Json:
        folder = self._folder(info.name)
        facts = asdict(info)
        settings = facts.pop("identity")
        del facts["name"]
        return {
            **facts,
            "items": len(folder.rows),
            "bytes": sum(row.nbytes for row in folder.rows.values()),
            "fingerprint": fingerprint(info),
            "encoder": settings.get("encoder"),
            "damaged": len(folder.damaged),
            "settings": settings,
        }

    def _must_be_writable(self) -> None:
        if not self.writable:
            problem = f"The cache {self.place} was opened for reading"
            raise UsageError(explain(problem, remedy="Open it with open_cache(path, writable=True)"))
