"""Layout of a cache: its paths, the file operations of the commit protocol, and its JSON files.

A cache on an object store has a local copy. The object store is changed first, so that the local copy never contains
anything uncommitted. JSON files have a canonical form and a checksum, and are converted to and from the types of
`schema`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from vaflow import files
from vaflow.cache.remote import Remote
from vaflow.cache.schema import (
    DTYPES,
    FORMAT,
    KINDS,
    SCHEMA_VERSION,
    Blob,
    Json,
    Record,
    StreamInfo,
    escape,
    is_attempt,
)
from vaflow.errors import CacheError, CorruptError, UsageError, command, explain

CHECKSUM = "crc32c"
_BLOCK = 2**20  # bytes
MAX_DURATION = 1e7  # seconds of a clip: about four months
MAX_DEPTH = 32  # levels of lists and objects within a member of a stream or record


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


def canonical(value: Any) -> bytes:
    """Return canonical JSON: keys sorted, no spaces, ASCII, no NaN. Input of fingerprints and checksums."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def plain(value: Mapping[str, Any], what: str) -> Json:
    """Return `value` after a round trip through JSON: tuples become lists, keys become text.

    Raises:
        UsageError: JSON cannot represent it (NaN, arrays, NumPy scalars ...), or it is nested too deeply.
    """
    try:
        result = json.loads(canonical(value))
        _check_depth(result)
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"{what} is not plain JSON: {error}"
        raise UsageError(explain(problem, expected="text, finite numbers, true, false, null, lists")) from error
    if not isinstance(result, dict):
        raise UsageError(explain(f"{what} is not a JSON object", expected="an object", got=type(value).__name__))
    return result


def crc32c(data: bytes | Blob) -> int:
    """Return the CRC-32C (Castagnoli) as an unsigned number."""
    return int(google_crc32c.value(data if isinstance(data, bytes) else np.ascontiguousarray(data)))


def file_facts(path: Path) -> Json:
    """Return size and CRC-32C of a file, as stored in its record; reads block by block.

    Raises:
        OSError: the file is missing or unreadable.
    """
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), google_crc32c.extend(crc, block)
    return {"size": size, CHECKSUM: int(crc)}


def source_stamp(source: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify a source without reading its files.

    They cover names, sizes and modification times, and leave out content digests (`blake2b`).
    """
    return blake2b(canonical(_undigested(source, 3)), digest_size=8).hexdigest()


def _undigested(value: Any, depth: int) -> Any:
    """Remove content digests; `depth` 3 covers a source, its parts and their files."""
    if not depth or not isinstance(value, dict):
        return value
    return {key: _undigested(inner, depth - 1) for key, inner in value.items() if key != "blake2b"}


def seal(document: Json) -> bytes:
    """Return the file of a document: canonical JSON with the member `crc32c` (of the rest), and a newline."""
    return canonical({**document, CHECKSUM: crc32c(canonical(document))}) + b"\n"


def unseal(data: bytes) -> Json:
    """Return the document of a file made by `seal`, without its checksum.

    Raises:
        ValueError: the bytes differ from what `seal` makes of their document.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or CHECKSUM not in document:
        raise ValueError("it has no checksum")
    del document[CHECKSUM]
    try:
        sealed = seal(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not canonical JSON ({error})") from error
    if sealed != data:
        raise ValueError("it does not match its own checksum")
    return document


def now() -> str:
    """Return the current time: UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest_document(store: str) -> Json:
    """Return the document of `manifest.json`."""
    return {"format": FORMAT, "schema_version": SCHEMA_VERSION, "store": store, "created": now()}


def fingerprint(info: StreamInfo) -> str:
    """Return 32 hexadecimal digits: blake2b-128 of the canonical JSON of all members of `info`."""
    return blake2b(canonical(asdict(info)), digest_size=16).hexdigest()


def stream_document(info: StreamInfo) -> Json:
    """Return the document of `streams/<stream>.json`."""
    return {**asdict(info), "fingerprint": fingerprint(info), "schema_version": SCHEMA_VERSION}


def stream_from(document: Json) -> StreamInfo:
    """Invert `stream_document`.

    Raises:
        ValueError: members are missing or have another type or version, or the fingerprint does not match them.
    """
    _check_version(document)
    try:
        info = StreamInfo(**{f.name: document[f.name] for f in fields(StreamInfo)})
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    known = isinstance(info.kind, str) and info.kind in KINDS
    if not (known and isinstance(info.name, str) and isinstance(info.dtype, str) and isinstance(info.identity, dict)):
        raise ValueError("it has members of a wrong type, or an unknown kind")
    if not _is_count(info.dim):
        raise ValueError(f"its dim is {info.dim!r}, not a whole number of at least 0")
    _check_depth(info.identity)
    if fingerprint(info) != document.get("fingerprint"):
        raise ValueError("its fingerprint does not match its settings")
    return info


def record_document(record: Record) -> Json:
    """Return the document of `records/<stream>/<item>.json`."""
    return {f.name: getattr(record, f.name) for f in fields(Record)}


def record_from(document: Json) -> Record:
    """Invert `record_document`.

    Raises:
        ValueError: members are missing or have another type or version, or name files outside their attempt.
    """
    _check_version(document)
    try:
        record = Record(**{f.name: document[f.name] for f in fields(Record)})
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    texts = (record.stream, record.item, record.attempt, record.created, record.fingerprint)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("it has members that are not text")
    if not all(isinstance(part, dict) for part in (record.arrays, record.files, record.source, record.meta)):
        raise ValueError("it has members that are not objects")
    if not is_attempt(record.attempt):
        raise ValueError(f"its attempt {record.attempt!r} is not a plain file name")
    for part in (record.arrays, record.source, record.meta):
        _check_depth(part)
    for name, facts in record.files.items():
        first, *rest = name.split("/")
        if first not in (record.attempt, f"{record.attempt}.h5") or not all(is_attempt(part) for part in rest):
            raise ValueError(f"it names a file outside its attempt: {name!r}")
        if not isinstance(facts, dict) or not all(_is_count(facts.get(key)) for key in ("size", CHECKSUM)):
            raise ValueError(f"it lacks size or checksum of {name!r}")
    for name, facts in record.arrays.items():  # readers use shapes and dtypes before they read the files
        if not is_attempt(name):
            raise ValueError(f"the name of its array {name!r} is not a plain file name")
        shape, dtype = (facts.get("shape"), facts.get("dtype")) if isinstance(facts, dict) else (None, None)
        if not isinstance(shape, list) or not all(_is_count(length) for length in shape) or not isinstance(dtype, str):
            raise ValueError(f"it lacks shape or dtype of {name!r}")
        if dtype not in DTYPES:
            raise ValueError(f"array {name!r} has the dtype {dtype!r}, which no stream has")
    if not all(isinstance(record.meta.get(key), str | None) for key in ("split", "group")):
        raise ValueError("its split or group is not text")
    duration = record.meta.get("duration", 0.0)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 <= duration < MAX_DURATION:
        raise ValueError(f"its duration is {duration!r}, not seconds")
    _check_people(record.meta)
    _check_prompts(record.source.get("prompts"))
    return record


def _check_people(meta: Json) -> None:
    """Check the members of a record's meta that name a person of a clip; commands compute with them."""
    for key in ("person", "persons", "notable"):
        if meta.get(key) is not None and not _is_count(meta[key]):
            raise ValueError(f"its {key} is {meta[key]!r}, not a whole number of at least 0")
    if not isinstance(meta.get("clip", ""), str):
        raise ValueError(f"its clip is {meta['clip']!r}, not a name")
    seconds = meta.get("seconds", [])
    if not isinstance(seconds, list) or not all(type(x) in (int, float) and 0 <= x < MAX_DURATION for x in seconds):
        raise ValueError("its seconds are not a list of durations")


def _check_prompts(prompts: Any) -> None:
    """Check the texts of a prompt set, which commands print and encode; None for other records."""
    if prompts is None:
        return
    texts = [prompts.get(key, []) for key in ("templates", "descriptions")] if isinstance(prompts, dict) else [None]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts):
        raise ValueError("its prompts are not lists of texts")


def _check_depth(value: Any, left: int = MAX_DEPTH) -> None:
    """Check that a value is not nested so deeply that functions that visit it exceed Python's recursion limit."""
    if not left:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, left - 1)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_version(document: Json) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version!r}, this program reads {SCHEMA_VERSION}")
