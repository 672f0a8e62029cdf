"""The JSON files of a cache: canonical form, own checksum, fingerprint, and the way to and from the types."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from vaflow.cache.names import is_attempt
from vaflow.cache.schema import DTYPES, FORMAT, KINDS, SCHEMA_VERSION, Blob, Json, Record, StreamInfo
from vaflow.errors import UsageError, explain

CHECKSUM = "crc32c"
_BLOCK = 2**20  # bytes
MAX_DURATION = 1e7  # seconds of a clip: no recording has four months


def canonical(value: Any) -> bytes:
    """JSON in one form only: keys sorted, no spaces, ASCII, no NaN. Fingerprints and checksums are taken of it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def plain(value: Mapping[str, Any], what: str) -> Json:
    """`value` as JSON gives it back: tuples are lists, keys are text.

    Raises:
        UsageError: it holds something that JSON does not have (NaN, arrays, NumPy scalars ...).
    """
    try:
        result = json.loads(canonical(value))
    except (TypeError, ValueError) as error:
        raise UsageError(
            explain(f"{what} is not plain JSON: {error}", expected="text, finite numbers, true, false, null, lists")
        ) from error
    if not isinstance(result, dict):
        raise UsageError(explain(f"{what} is not a JSON object", expected="an object", got=type(value).__name__))
    return result


def crc32c(data: bytes | Blob) -> int:
    """CRC-32C (Castagnoli) as an unsigned number."""
    return int(google_crc32c.value(data if isinstance(data, bytes) else np.ascontiguousarray(data)))


def file_facts(path: Path) -> Json:
    """Size and CRC-32C of a file, as its record says them, read block by block.

    Raises:
        OSError: it is not there or cannot be read.
    """
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), google_crc32c.extend(crc, block)
    return {"size": size, CHECKSUM: int(crc)}


def source_stamp(source: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a source as far as it can be told without reading files.

    Digests of their contents (`blake2b`) are left out; names, sizes and times of change are not.
    """
    return blake2b(canonical(_undigested(source, 3)), digest_size=8).hexdigest()


def _undigested(value: Any, depth: int) -> Any:
    """Parts, and files within parts, are not nested deeper."""
    if not depth or not isinstance(value, dict):
        return value
    return {key: _undigested(inner, depth - 1) for key, inner in value.items() if key != "blake2b"}


def seal(document: Json) -> bytes:
    """The file of a document: canonical JSON with the member `crc32c` (of the JSON without it), and a newline."""
    return canonical({**document, CHECKSUM: crc32c(canonical(document))}) + b"\n"


def unseal(data: bytes) -> Json:
    """The document of a file made by `seal`, without its checksum.

    Raises:
        ValueError: the bytes are not exactly what `seal` makes of the document they hold.
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
        raise ValueError(f"it is not what a writer makes ({error})") from error
    if sealed != data:
        raise ValueError("it does not match its own checksum")
    return document


def now() -> str:
    """This instant in UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest_document(store: str) -> Json:
    """What `manifest.json` says."""
    return {"format": FORMAT, "schema_version": SCHEMA_VERSION, "store": store, "created": now()}


def fingerprint(info: StreamInfo) -> str:
    """32 hexadecimal digits: blake2b-128 of the canonical JSON of the stream's name, kind, dim, dtype and identity."""
    return blake2b(canonical(asdict(info)), digest_size=16).hexdigest()


def stream_document(info: StreamInfo) -> Json:
    """What `streams/<stream>.json` says."""
    return {**asdict(info), "fingerprint": fingerprint(info), "schema_version": SCHEMA_VERSION}


def stream_from(document: Json) -> StreamInfo:
    """The way back.

    Raises:
        ValueError: members are missing, of another type or version, or the fingerprint is not theirs.
    """
    _check_version(document)
    try:
        info = StreamInfo(**{f.name: document[f.name] for f in fields(StreamInfo)})
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    known = isinstance(info.kind, str) and info.kind in KINDS
    if not (known and isinstance(info.name, str) and isinstance(info.dtype, str) and isinstance(info.identity, dict)):
        raise ValueError("it has members of another type, or a kind that is not known")
    if not _is_count(info.dim):
        raise ValueError(f"its dim is {info.dim!r}, not a whole number of at least 0")
    if fingerprint(info) != document.get("fingerprint"):
        raise ValueError("its fingerprint is not that of its settings")
    return info


def record_document(record: Record) -> Json:
    """What `records/<stream>/<item>.json` says."""
    return {f.name: getattr(record, f.name) for f in fields(Record)}


def record_from(document: Json) -> Record:
    """The way back.

    Raises:
        ValueError: members are missing, of another type or version, or name files outside their attempt.
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
    for name, facts in record.files.items():
        _check_file(record.attempt, name, facts)
    for name, facts in record.arrays.items():
        _check_array(name, facts)
    _check_meta(record.meta)
    return record


def _check_file(attempt: str, name: str, facts: Any) -> None:
    first, *rest = name.split("/")
    if first not in (attempt, f"{attempt}.h5") or not all(is_attempt(part) for part in rest):
        raise ValueError(f"it names a file outside its attempt: {name!r}")
    if not isinstance(facts, dict) or not all(_is_count(facts.get(key)) for key in ("size", CHECKSUM)):
        raise ValueError(f"it does not say size and checksum of {name!r}")


def _check_array(name: str, facts: Any) -> None:
    """Shape and dtype are such that a program can add them up; whether the files hold them is found out when read."""
    shape, dtype = (facts.get("shape"), facts.get("dtype")) if isinstance(facts, dict) else (None, None)
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape) or not isinstance(dtype, str):
        raise ValueError(f"it does not say shape and dtype of {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"array {name!r} is of {dtype!r}, which no stream has")


def _check_meta(meta: Json) -> None:
    """Facts that programs rely on, where there are any."""
    if not all(isinstance(meta.get(key), str | None) for key in ("split", "group")):
        raise ValueError("its split or group is not text")
    duration = meta.get("duration", 0.0)
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 <= duration < MAX_DURATION:
        raise ValueError(f"its duration is {duration!r}, not seconds")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_version(document: Json) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version!r}, this program reads {SCHEMA_VERSION}")
