"""Paths inside a cache, and the file operations of the commit protocol.

A cache on an object store has a local copy. The object store is changed first, so that the local copy never contains
anything uncommitted.
"""

from collections.abc import Iterable
from pathlib import Path

from vaflow import files
from vaflow.cache.remote import Remote
from vaflow.cache.schema import escape
from vaflow.errors import CacheError, CorruptError, command, explain


class Layout:
    """Paths of one cache, operations on its files, and the errors that name them.

    Attributes:
        root: the cache directory; of a cache on an object store, its local copy.
        remote: the object store; None for a local cache.
        place: path or URL of the cache, for messages and runs.
    """

    def __init__(self, root: Path, remote: Remote | None = None) -> None:
        self.root, self.remote = root, remote
        self.place = str(root) if remote is None else remote.url
        self.manifest, self.index = root / "manifest.json", root / "index.json"
        self.all_streams, self.all_records = root / "streams", root / "records"

    def stream(self, stream: str) -> Path:
        """The file that describes the stream."""
        return self.all_streams / f"{escape(stream)}.json"

    def records(self, stream: str) -> Path:
        """The folder of the stream's records."""
        return self.all_records / escape(stream)

    def record(self, stream: str, item: str) -> Path:
        """The completion record of one item."""
        return self.records(stream) / f"{escape(item)}.json"

    def attempts(self, stream: str) -> Path:
        """The folder of all attempts at the stream's items."""
        return self.root / escape(stream)

    def item(self, stream: str, item: str) -> Path:
        """The folder of all attempts at one item; the names in a record's `files` are below it."""
        return self.attempts(stream) / escape(item)

    def named(self, path: Path) -> Path | str:
        """Path or URL of a file, for messages."""
        return path if self.remote is None else f"{self.place}/{self.shown(path)}"

    def shown(self, path: Path) -> str:
        """Path of a file relative to the cache, for messages."""
        return path.relative_to(self.root).as_posix()

    def corrupt(self, path: Path, problem: str, stream: str | None = None, item: str | None = None) -> CorruptError:
        """Return the error for a damaged file."""
        where = f", item {item!r} of stream {stream!r}" if item is not None else ""
        repair = command("cache", "repair", self.place)
        problem = f"{self.shown(path)} of the cache {self.place} is damaged{where}: {problem}"
        remedy = f"Run `{repair}`, then extract again; only damaged items are extracted"
        return CorruptError(explain(problem, remedy=remedy))

    def cannot_write(self, error: OSError) -> CacheError:
        """Return the error for a failed write to the disk or the object store."""
        remedy = "Free disk space or grant write access, then run the same command again: it resumes"
        return CacheError(explain(f"Cannot write into the cache {self.place}: {error}", remedy=remedy))

    def create(self, path: Path, data: bytes) -> bool:
        """Create a whole file if it does not exist; returns False if another writer was first."""
        if self.remote is None:
            return files.create_file(path, data)
        if not self.remote.create(path, data):
            self.remote.look(path)
            return False
        files.make_folder(path.parent)
        files.replace_file(path, data)
        return True

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a whole file atomically."""
        if self.remote is not None:
            self.remote.replace(path, data)
        files.replace_file(path, data)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with its contents; do nothing if it does not exist.

        Raises:
            OSError: it cannot be removed, or is behind a link: nothing outside the cache is removed.
        """
        files.refuse_links(self.root, path.parent)
        if self.remote is not None:
            self.remote.remove(path)
        files.remove(path)

    def flush(self, top: Path, names: Iterable[str]) -> None:
        """Make new files below `top` durable: sync them to the disk, or upload them."""
        if self.remote is None:
            files.sync_all(top, names)
        else:
            self.remote.put(top / name for name in names)

    def look(self, path: Path) -> None:
        """Download a small file again if other writers changed it; on a disk, do nothing."""
        if self.remote is not None:
            self.remote.look(path)

    def fill(self, paths: Iterable[Path], *, again: bool = False) -> None:
        """Download files of arrays that are missing in the local copy; with `again`, all of them."""
        if self.remote is not None:
            self.remote.fill(paths, again=again)
