"""Commit protocol of the items and streams of a cache, and the index of the committed records.

Arrays are written and flushed before their completion record is created, so a reader, which reaches an item only
through its record, finds all its files. A writer that is killed leaves an attempt without a record, which readers skip.
The settings of a stream are written once, in a file that later writers compare with theirs. Many writers may share a
cache.

The index spares readers of a large cache from reading each record. It is derived from the records and can be deleted at
any time. The entry of a stream is valid while the directory of its records has the same modification time and inode as
when it was listed, provided that this time was already past then: two changes within one clock tick have the same time.
Otherwise the directory is listed again, and only records whose modification time, size or inode differ are read.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from vaflow import files
from vaflow.cache.layout import (
    Layout,
    canonical,
    crc32c,
    file_facts,
    fingerprint,
    plain,
    record_document,
    record_from,
    seal,
    source_stamp,
    stream_document,
    stream_from,
    unseal,
)
from vaflow.cache.schema import FLOAT, KINDS, SCHEMA_VERSION, Record, Rows, StreamInfo, escape
from vaflow.cache.stores import Store
from vaflow.errors import CacheError, FingerprintError, UsageError, explain
from vaflow.files import TEMPORARY


def load_record(layout: Layout, path: Path) -> Record:
    """Load the record in a file below `records/`.

    Raises:
        ValueError: the file is damaged, or holds the record of another item.
        FileNotFoundError: the file does not exist.
    """
    record = record_from(unseal(files.read_document(layout.root, path)))
    if layout.record(record.stream, record.item) != path:
        raise ValueError(f"it holds the record of item {record.item!r} of stream {record.stream!r}")
    return record


def commit(layout: Layout, store: Store, draft: Record, arrays: Mapping[str, Rows]) -> Record:
    """Write `arrays` as a new attempt and commit it with the record `draft`; returns the committed record.

    A new item: the first of several writers commits it, and the attempts of the others are deleted. An existing item:
    its record is replaced atomically, then its old attempt is deleted.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    folder = layout.item(draft.stream, draft.item)
    path = layout.record(draft.stream, draft.item)
    replacing = path.exists()  # checked before the arrays are written: other writers may commit meanwhile
    files.refuse_links(layout.root, folder)
    files.make_folder(folder)
    attempt = token_hex(8)
    try:
        names = store.write_attempt(folder, attempt, arrays)
        layout.flush(layout.attempts(draft.stream), [f"{folder.name}/{name}" for name in names])
        record = replace(draft, attempt=attempt, files={name: file_facts(folder / name) for name in names})
        if not replacing and layout.create(path, seal(record_document(record))):
            return record
        previous = _readable_record(layout, path)
        if previous is not None and not replacing:
            return previous
        layout.replace(path, seal(record_document(record)))  # also if the record is damaged, or was dropped meanwhile
        if previous is not None:
            layout.remove(store.path(folder, previous.attempt))
        return record
    finally:
        # Read the record again: an interrupt may have come after it was created.
        layout.look(path)
        committed = _readable_record(layout, path)
        if committed is None or committed.attempt != attempt:
            layout.remove(store.path(folder, attempt))


def _readable_record(layout: Layout, path: Path) -> Record | None:
    """Load a record; None if it is missing or damaged."""
    try:
        return load_record(layout, path)
    except (FileNotFoundError, ValueError):
        return None


def discard(layout: Layout, store: Store, path: Path) -> None:
    """Remove the record in the file `path`, then its attempt if the record is readable."""
    try:
        record = load_record(layout, path)
    except FileNotFoundError:
        return
    except ValueError:
        record = None
    layout.remove(path)
    files.sync(path.parent)
    if record is not None:
        attempt = store.path(layout.item(record.stream, record.item), record.attempt)
        if not files.is_behind_link(layout.root, attempt):
            layout.remove(attempt)


def load_stream(layout: Layout, file_name: str) -> StreamInfo:
    """Load a stream from its file below `streams/`.

    Raises:
        ValueError: the file is damaged, or holds another stream.
        FileNotFoundError: the file does not exist.
    """
    path = layout.all_streams / file_name
    info = stream_from(unseal(files.read_document(layout.root, path)))
    if layout.stream(info.name) != path:
        raise ValueError(f"it describes stream {info.name!r}")
    return info


def declare(layout: Layout, info: StreamInfo) -> None:
    """Create the stream's file, or compare the settings with it. Of several writers, the first creates it.

    Raises:
        FingerprintError: the stream exists with other settings.
        UsageError: `info` is not a valid stream.
        CorruptError: the stream's file is damaged.
    """
    info = checked(info)
    path = layout.stream(info.name)
    if not path.exists():
        files.make_folder(layout.records(info.name))
        files.make_folder(layout.attempts(info.name))
        files.make_folder(layout.all_streams)
        _refuse_foreign_records(layout, info)
        if layout.create(path, seal(stream_document(info))):
            return
    try:
        known = load_stream(layout, path.name)
    except ValueError as error:
        raise layout.corrupt(path, str(error)) from error
    if fingerprint(known) != fingerprint(info):
        fields = "; ".join(differences(asdict(known), asdict(info)))
        problem = f"Stream {info.name!r} of {layout.place} has other settings: {fields}"
        raise FingerprintError(explain(problem, remedy="Use the settings of the cache, or extract into another cache"))


def checked(info: StreamInfo) -> StreamInfo:
    """Return `info` with its identity after a round trip through JSON.

    Raises:
        UsageError: it is not a valid stream; every problem is named.
    """
    escape(info.name)
    if info.kind not in KINDS:
        raise UsageError(explain(f"Stream {info.name!r} has an unknown kind", got=info.kind, choices=KINDS))
    problems = []
    if type(info.dim) is not int or info.dim < 0:
        problems.append(f"dim is {info.dim!r}, not a whole number of at least 0")
    one = "uint8" if info.kind in ("pixels", "crops") else "float32"
    dtypes = FLOAT if info.kind in ("visual", "audio", "logmel") else (one,)
    if info.dtype not in dtypes:
        problems.append(f"dtype is {info.dtype!r}, not {' or '.join(dtypes)}")
    if problems:
        raise UsageError(explain(f"Stream {info.name!r} cannot be declared: {'; '.join(problems)}"))
    return replace(info, identity=plain(info.identity, f"The identity of stream {info.name!r}"))


def _refuse_foreign_records(layout: Layout, info: StreamInfo) -> None:
    """Raise FingerprintError if records exist, their stream file is missing, and their settings differ from `info`."""
    for path in sorted(layout.records(info.name).glob("*.json")):
        try:
            record = load_record(layout, path)
        except (ValueError, FileNotFoundError):  # reading and `verify` report the damage
            continue
        if record.fingerprint != fingerprint(info):
            missing = layout.shown(layout.stream(info.name))
            problem = (
                f"{layout.place} holds items of stream {info.name!r} with other settings, and {missing} is missing"
            )
            expected = f"fingerprint {fingerprint(info)}"
            remedy = "Use the settings of the cache, or extract into another cache"
            raise FingerprintError(explain(problem, expected=expected, got=record.fingerprint, remedy=remedy))


def differences(
    first: Any, second: Any, path: str = "", names: tuple[str, str] = ("cache has", "now")
) -> Iterator[str]:
    """Yield every leaf in which two JSON values differ, as `dotted.path: cache has X, now Y`; `names` label them."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            name = f"{path}.{key}" if path else key
            if key not in first:
                yield f"{name}: {names[0]} nothing, {names[1]} {second[key]!r}"
            elif key not in second:
                yield f"{name}: {names[0]} {first[key]!r}, {names[1]} nothing"
            else:
                yield from differences(first[key], second[key], name, names)
    elif first != second or type(first) is not type(second):
        yield f"{path}: {names[0]} {first!r}, {names[1]} {second!r}"


log = logging.getLogger(__name__)

Stamp = tuple[int, int]  # (st_mtime_ns, st_ino)

HEAD, MIDDLE, TAIL = b'{"crc32c":', b',"index":', b"}\n"
_FINE = 100_000_000  # ns; clocks of local file systems tick every 4 to 10 ms
_COARSE = 2_000_000_000  # ns; FAT ticks every 2 s, and clocks of other machines may differ


class Row(NamedTuple):
    """Summary of one record, valid while its file is unchanged."""

    item: str
    mtime_ns: int
    size: int
    inode: int
    nbytes: int  # of the attempt's files
    split: str | None  # labels records only
    source: str  # `source_stamp` of the item's source


@dataclass
class Folder:
    """The records of one stream at the time when their directory had `stamp`."""

    stamp: Stamp
    settled: bool
    rows: dict[str, Row]
    damaged: dict[str, str] = field(default_factory=dict)  # file name -> problem


def row_of(record: Record, stat: os.stat_result) -> Row:
    """Return the row of a record whose file has `stat`."""
    nbytes = sum(int(facts["size"]) for facts in record.files.values())
    split, source = record.meta.get("split"), source_stamp(record.source)
    return Row(record.item, stat.st_mtime_ns, stat.st_size, stat.st_ino, nbytes, split, source)


class Index:
    """Rows per stream of the cache at `layout`, refreshed as needed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._folders: dict[str, Folder] | None = None

    def folder(self, stream: str) -> Folder:
        """Return the stream's current records."""
        known = self._known().get(stream)
        clock = time.time_ns()
        stamp = self._stamp(stream)
        if known is None or not known.settled or known.stamp != stamp:
            known = self._list(stream, stamp, known)
            known.settled = not known.damaged and stamp[0] < clock - _COARSE
            self._known()[stream] = known
        return known

    def _stamp(self, stream: str) -> Stamp:
        try:
            stat = self._layout.records(stream).stat()
        except FileNotFoundError:
            return (0, 0)
        return (stat.st_mtime_ns, stat.st_ino)

    def _list(self, stream: str, stamp: Stamp, known: Folder | None) -> Folder:
        """List the directory. `stamp` was taken before, so that the next access detects a change during the listing."""
        old = known.rows if known else {}
        folder = Folder(stamp, False, {})
        if stamp == (0, 0):
            return folder
        with os.scandir(self._layout.records(stream)) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith(".json"):
                    continue
                try:
                    stat, row = entry.stat(), old.get(entry.name)
                    state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                    if row is None or (row.mtime_ns, row.size, row.inode) != state:
                        row = row_of(load_record(self._layout, Path(entry.path)), stat)
                    folder.rows[entry.name] = row
                except FileNotFoundError:  # dropped since it was listed
                    continue
                except ValueError as error:
                    folder.damaged[entry.name] = str(error)
        return folder

    def save(self, streams: Iterable[str]) -> None:
        """Update every stream and write the index; waits up to 2 s so that its entries are valid for readers."""
        clock = self._settle(streams)
        table = {}
        for stream in streams:
            folder = self._list(stream, self._stamp(stream), self._known().get(stream))
            folder.settled = not folder.damaged and is_past(folder.stamp[0], clock)
            self._known()[stream] = folder
            table[stream] = {"stamp": folder.stamp, "settled": folder.settled, "rows": folder.rows}
        body = canonical({"schema_version": SCHEMA_VERSION, "streams": table})
        data = HEAD + str(crc32c(body)).encode() + MIDDLE + body + TAIL
        files.replace_file(self._layout.index, data)

    def _settle(self, streams: Iterable[str]) -> int:
        """Wait until no further change can get a directory's modification time; returns the file system's clock."""
        times = [path.stat().st_mtime_ns for path in map(self._layout.records, streams) if path.is_dir()]
        clock = self._clock()
        for _ in range(2):
            recent = [mtime for mtime in times if not is_past(mtime, clock)]
            if not recent:
                break
            time.sleep(1.2 * max(map(_margin, recent)) / 1e9)
            clock = self._clock()
        return clock

    def _clock(self) -> int:
        """Return the modification time that the file system gives to a change now."""
        probe = self._layout.root / f"{TEMPORARY}clock-{os.getpid()}-{time.monotonic_ns()}"
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _known(self) -> dict[str, Folder]:
        if self._folders is None:
            self._folders = self._read()
        return self._folders

    def _read(self) -> dict[str, Folder]:
        """Load the saved index; empty if it is missing, damaged, a link or of another version."""
        path = self._layout.index
        if path.is_symlink() or not path.is_file():  # a named pipe or a device could be read forever
            return {}
        try:
            data = path.read_bytes()
        except OSError:
            return {}
        try:
            return _parse(data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.info("Rebuilding %s from the records: %s", self._layout.index, error)
            return {}


def _parse(data: bytes) -> dict[str, Folder]:
    crc, _, body = data.removeprefix(HEAD).partition(MIDDLE)
    body = body.removesuffix(TAIL)
    if not crc.isdigit() or crc32c(body) != int(crc) or data != HEAD + crc + MIDDLE + body + TAIL:
        raise ValueError("it does not match its own checksum")
    document = json.loads(body)
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError("it has another schema version")
    folders = {}
    for stream, table in document["streams"].items():
        rows = {name: Row(*values) for name, values in table["rows"].items()}
        for row in rows.values():
            texts = isinstance(row.item, str) and isinstance(row.source, str) and isinstance(row.split, str | None)
            if not texts or any(type(n) is not int for n in (row.mtime_ns, row.size, row.inode, row.nbytes)):
                raise ValueError("it has rows of another type")
        folders[stream] = Folder((table["stamp"][0], table["stamp"][1]), table["settled"], rows)
    return folders


def _margin(mtime_ns: int) -> int:
    """Return for how long another change may get the same time; whole seconds indicate a coarse clock."""
    return _COARSE if mtime_ns % 1_000_000_000 == 0 else _FINE


def is_past(mtime_ns: int, clock: int) -> bool:
    return mtime_ns < clock - _margin(mtime_ns)


EVERY = 300.0  # seconds between two saves
SHARE = 50  # least ratio of pause to duration of the last save: saving takes at most 2 % of a slow disk's time


@contextmanager
def saved_at_intervals(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` at intervals in a separate thread while the block runs. A write error skips one save."""
    ended = threading.Event()

    def work() -> None:
        pause = EVERY
        while not ended.wait(pause):
            began = time.monotonic()
            try:
                save()
            except (OSError, CacheError) as error:
                log.info("Cannot save the index: %s", error)
            pause = max(EVERY, SHARE * (time.monotonic() - began))

    thread = threading.Thread(target=work, name="vaflow-index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
