"""Index of the records, so that opening a large cache does not read each record.

The index is derived from the records and can be deleted at any time. The entry of a stream is valid while the directory
of its records has the same modification time and inode as when it was listed, provided that this time was already past
then: two changes within one clock tick have the same time. Otherwise the directory is listed again, and only records
whose modification time, size or inode differ are read.
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
from typing import NamedTuple

from vaflow import files
from vaflow.cache.commit import load_record
from vaflow.cache.documents import canonical, crc32c, source_stamp
from vaflow.cache.layout import Layout
from vaflow.cache.schema import SCHEMA_VERSION, Record
from vaflow.errors import CacheError
from vaflow.files import TEMPORARY

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

    def forget(self) -> None:
        """Discard the loaded index; the next access reads the file and the disk again."""
        self._folders = None

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
        """Load the saved index; empty if it is missing, damaged or of another version."""
        try:
            data = self._layout.index.read_bytes()
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
