"""Paths inside a cache: where streams, records and attempts lie."""

from dataclasses import dataclass, field
from pathlib import Path

from vaflow.cache.names import escape
from vaflow.cache.remote import Remote
from vaflow.errors import CacheError, CorruptError, explain


@dataclass(frozen=True)
class Layout:
    """Paths of one cache, and the errors that name them.

    Attributes:
        root: the cache directory; of a cache on an object store, its local copy.
        remote: the object store; None for a local cache.
    """

    root: Path
    remote: Remote | None = field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Path or URL of the cache, as messages and runs name it."""
        return str(self.root) if self.remote is None else self.remote.url

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def index(self) -> Path:
        return self.root / "index.json"

    @property
    def all_streams(self) -> Path:
        return self.root / "streams"

    @property
    def all_records(self) -> Path:
        return self.root / "records"

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
        """The error for a damaged file."""
        where = f", item {item!r} of stream {stream!r}" if item is not None else ""
        return CorruptError(
            explain(
                f"{self.shown(path)} of the cache {self.place} is damaged{where}: {problem}",
                remedy=f"Run `vaflow cache repair {self.place}`, then extract again: it remakes only the damaged items",
            )
        )

    def cannot_write(self, error: OSError) -> CacheError:
        """The error for a disk or an object store that refuses to write."""
        return CacheError(
            explain(
                f"Cannot write into the cache {self.place}: {error}",
                remedy="Free disk space or grant write access, then run the same command again: it resumes",
            )
        )
