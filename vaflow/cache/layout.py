"""Where everything lies inside a cache, and how names become file names. No I/O here.

All paths of a cache are made in this module; of a cache on an object store, those of its local folder. No stream or
item name, however odd, leads outside the cache folder.

Errors that several modules of the cache raise, worded once.
"""

import json
import re
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from vaflow.errors import CacheError, CorruptError, UsageError, explain

if TYPE_CHECKING:
    from vaflow.cache.remote import Remote

_LONGEST = 160  # bytes; leaves room for suffixes below the usual 255
_KEPT_WHEN_SHORTENED = 100
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ODD = re.compile(rb"[^A-Za-z0-9._-]")
_FOLDERS = ("streams", "records")


def escape(name: str) -> str:
    """The file name of a stream or item; different names never share one.

    Bytes (UTF-8) outside [A-Za-z0-9._-] become %XX; so does a leading dot, and the first character of names that
    end in `.json` or `.jsonl` or are `streams` or `records`, because those have a meaning of their own. What is then
    longer than 160 characters keeps its first 100, followed by `~` and the blake2b-128 digest of the whole name.

    Raises:
        UsageError: the name is empty, or holds characters that JSON cannot carry unchanged.
    """
    if not name:
        raise UsageError(explain("A stream or item needs a name", expected="at least one character", got=repr(name)))
    raw = name.encode("utf-8", "surrogatepass")
    if _PLAIN.fullmatch(name) is None:
        if not name.isascii() and json.loads(json.dumps(name)) != name:
            raise UsageError(
                explain("A stream or item has a name that JSON cannot hold", expected="proper Unicode", got=ascii(name))
            )
        body = _ODD.sub(lambda found: b"%%%02X" % found[0][0], raw).decode("ascii")
        name = _encode_first(body) if body.startswith(".") else body
    if name in _FOLDERS or name.endswith((".json", ".jsonl")):
        name = _encode_first(name)
    if len(name) > _LONGEST:
        head = re.sub(r"%.?$", "", name[:_KEPT_WHEN_SHORTENED])
        return f"{head}~{blake2b(raw, digest_size=16).hexdigest()}"
    return name


def _encode_first(name: str) -> str:
    return name if name.startswith("%") else f"%{ord(name[0]):02X}{name[1:]}"


def is_attempt(name: str) -> bool:
    """Whether `name` can be an attempt's: a plain file name that leads nowhere else."""
    return _PLAIN.fullmatch(name) is not None


@dataclass(frozen=True)
class Layout:
    """Paths of one cache.

    Attributes:
        root: its folder.
        remote: the object store that the folder stands for; None: the folder is the cache.
    """

    root: Path
    remote: Optional["Remote"] = field(default=None, compare=False)

    @property
    def place(self) -> str:
        """Where the cache is, as messages and runs name it."""
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
        """The file that says what made the stream."""
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
        """Where a file is for people: its path, or its URL."""
        return path if self.remote is None else f"{self.place}/{self.shown(path)}"

    def shown(self, path: Path) -> str:
        """A path as messages name it: from the cache's root."""
        return path.relative_to(self.root).as_posix()


def corrupt(
    layout: Layout, path: Path, problem: str, stream: str | None = None, item: str | None = None
) -> CorruptError:
    """The error for a file whose bytes are not what was committed."""
    where = f", item {item!r} of stream {stream!r}" if item is not None else ""
    return CorruptError(
        explain(
            f"{layout.shown(path)} of the cache {layout.place} is damaged{where}: {problem}",
            remedy=f"Run `vaflow cache repair {layout.place}`, then extract again: only what was damaged is made anew",
        )
    )


def cannot_write(layout: Layout, error: OSError) -> CacheError:
    """The error for a disk that refuses."""
    return CacheError(
        explain(
            f"Cannot write into the cache {layout.place}: {error}",
            remedy="Make room or give write access, then run the same command again: it goes on where it stopped",
        )
    )
