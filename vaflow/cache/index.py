"""Index of the records, derived from them, so that opening a large cache does not read each record.

The records are the truth; the index can be deleted at any time. Per stream it is trusted while the records' folder
has the time of change and the inode that were seen, and that time was already past when the folder was listed (else
two changes could share it: "racily fresh"). Otherwise the folder is listed again, and only records whose time, size or
inode changed are read.

Saves the index now and then while a long run adds to a cache: after a kill, only what came later is read again.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vaflow import files
from vaflow.cache.documents import canonical, crc32c, source_stamp
from vaflow.cache.layout import Layout
from vaflow.cache.schema import SCHEMA_VERSION, Record
from vaflow.errors import CacheError
from vaflow.files import TEMPORARY

log = logging.getLogger(__name__)

Stamp = tuple[int, int]  # (st_mtime_ns, st_ino)

_HEAD, _MIDDLE, _TAIL = b'{"crc32c":', b',"index":', b"}\n"
_FINE = 100_000_000  # ns; clocks of local file systems tick every 4 to 10 ms
_COARSE = 2_000_000_000  # ns; FAT ticks every 2 s, and clocks of other machines may differ


class Row(NamedTuple):
    """Summary of one record, valid while its file is unchanged."""

    item: str
    mtime_ns: int
    size: int
    inode: int
    nbytes: int  # of the attempt's files
    split: str | None  # of labels records
    source: str  # `source_stamp` of what the item was made from


@dataclass
class Folder:
    """The records of one stream as they were when the folder had `stamp`."""

    stamp: Stamp
    settled: bool
    rows: dict[str, Row]
    damaged: dict[str, str] = field(default_factory=dict)  # file name -> what is wrong with it


def row_of(record: Record, stat: os.stat_result) -> Row:
    """The row of a record whose file has `stat`."""
    nbytes = sum(int(facts["size"]) for facts in record.files.values())
    split, source = record.meta.get("split"), source_stamp(record.source)
    return Row(record.item, stat.st_mtime_ns, stat.st_size, stat.st_ino, nbytes, split, source)


class Index:
    """Rows per stream, refreshed as needed.

    Args:
        layout: of the cache.
        load: record's file -> record; raises ValueError where it is damaged, FileNotFoundError where it is gone.
    """

    def __init__(self, layout: Layout, load: Callable[[Path], Record]) -> None:
        self._layout = layout
        self._load = load
        self._folders: dict[str, Folder] | None = None

    def folder(self, stream: str) -> Folder:
        """The stream's records as they are now."""
        known = self._known().get(stream)
        clock = time.time_ns()
        stamp = self._stamp(stream)
        if known is None or not known.settled or known.stamp != stamp:
            known = self._list(stream, stamp, known)
            known.settled = not known.damaged and stamp[0] < clock - _COARSE
            self._known()[stream] = known
        return known

    def forget(self) -> None:
        """Look at the saved table and the disk again."""
        self._folders = None

    def _stamp(self, stream: str) -> Stamp:
        try:
            stat = self._layout.records(stream).stat()
        except FileNotFoundError:
            return (0, 0)
        return (stat.st_mtime_ns, stat.st_ino)

    def _list(self, stream: str, stamp: Stamp, known: Folder | None) -> Folder:
        """List the folder; it was stamped before, so that a change meanwhile is seen the next time."""
        old = known.rows if known else {}
        found = Folder(stamp, False, {})
        if stamp == (0, 0):
            return found
        with os.scandir(self._layout.records(stream)) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.endswith(".json"):
                    continue
                try:
                    self._add(entry, old.get(entry.name), found)
                except FileNotFoundError:  # dropped since it was listed
                    continue
        return found

    def _add(self, entry: os.DirEntry[str], old: Row | None, found: Folder) -> None:
        stat = entry.stat()
        if old is not None and (old.mtime_ns, old.size, old.inode) == (stat.st_mtime_ns, stat.st_size, stat.st_ino):
            found.rows[entry.name] = old
            return
        try:
            found.rows[entry.name] = row_of(self._load(Path(entry.path)), stat)
        except ValueError as error:
            found.damaged[entry.name] = str(error)

    def save(self, streams: Iterable[str]) -> None:
        """Bring every stream up to date and write the table; waits up to 2 s so that readers can trust it."""
        clock = self._settle(streams)
        table = {}
        for stream in streams:
            found = self._list(stream, self._stamp(stream), self._known().get(stream))
            found.settled = not found.damaged and _is_past(found.stamp[0], clock)
            self._known()[stream] = found
            table[stream] = {"stamp": found.stamp, "settled": found.settled, "rows": found.rows}
        body = canonical({"schema_version": SCHEMA_VERSION, "streams": table})
        data = _HEAD + str(crc32c(body)).encode() + _MIDDLE + body + _TAIL
        files.replace_file(self._layout.index, data)

    def _settle(self, streams: Iterable[str]) -> int:
        """Wait until no folder's time of change can be given again; returns the file system's clock before listing."""
        times = [path.stat().st_mtime_ns for path in map(self._layout.records, streams) if path.is_dir()]
        clock = self._clock()
        for _ in range(2):
            recent = [mtime for mtime in times if not _is_past(mtime, clock)]
            if not recent:
                break
            time.sleep(1.2 * max(map(_margin, recent)) / 1e9)
            clock = self._clock()
        return clock

    def _clock(self) -> int:
        """The time that the file system would give to a change now."""
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
        """The saved table; nothing where there is none, or it is damaged or of another version."""
        try:
            data = self._layout.index.read_bytes()
        except OSError:
            return {}
        try:
            return _parse(data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.info("ignoring %s, which is made again from the records: %s", self._layout.index, error)
            return {}


def _parse(data: bytes) -> dict[str, Folder]:
    crc, _, body = data.removeprefix(_HEAD).partition(_MIDDLE)
    body = body.removesuffix(_TAIL)
    if not crc.isdigit() or crc32c(body) != int(crc) or data != _HEAD + crc + _MIDDLE + body + _TAIL:
        raise ValueError("it does not match its own checksum")
    document = json.loads(body)
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError("it is of another schema version")
    return {
        stream: Folder(
            (table["stamp"][0], table["stamp"][1]),
            table["settled"],
            {name: _row(row) for name, row in table["rows"].items()},
        )
        for stream, table in document["streams"].items()
    }


def _row(values: list[Any]) -> Row:
    row = Row(*values)
    numbers = (row.mtime_ns, row.size, row.inode, row.nbytes)
    if (
        not (isinstance(row.item, str) and isinstance(row.source, str))
        or not isinstance(row.split, str | None)
        or any(type(n) is not int for n in numbers)
    ):
        raise ValueError("it has rows of another type")
    return row


def _margin(mtime_ns: int) -> int:
    """How long after a change the same time could be given to another one; whole seconds mean a coarse clock."""
    return _COARSE if mtime_ns % 1_000_000_000 == 0 else _FINE


def _is_past(mtime_ns: int, clock: int) -> bool:
    return mtime_ns < clock - _margin(mtime_ns)


EVERY = 300.0  # seconds between two savings
SHARE = 50  # a pause lasts that many times as long as the last saving took: at most 2 % of a slow disk's time


@contextmanager
def now_and_then(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` in a thread of its own while the block runs. An error of the disk skips that saving only."""
    ended = threading.Event()

    def work() -> None:
        pause = EVERY
        while not ended.wait(pause):
            began = time.monotonic()
            try:
                save()
            except (OSError, CacheError) as error:
                log.info("the index was not saved: %s", error)
            pause = max(EVERY, SHARE * (time.monotonic() - began))

    thread = threading.Thread(target=work, name="vaflow-index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
