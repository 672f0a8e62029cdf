"""The JSON files of a cache: canonical form, own checksum, fingerprint, and the way to and from the types."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import google_crc32c
import numpy as np

from vaflow.cache.files import Blob
from vaflow.cache.names import is_attempt
from vaflow.cache.schema import FORMAT, SCHEMA_VERSION, Json, Record, StreamInfo
from vaflow.errors import UsageError, explain

CHECKSUM = "crc32c"


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
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or CHECKSUM not in document:
        raise ValueError("it has no checksum")
    del document[CHECKSUM]
    try:
        sealed = seal(document)
    except ValueError as error:
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
    if not is_attempt(record.attempt):
        raise ValueError(f"its attempt {record.attempt!r} is not a plain file name")
    for name in record.files:
        first, *rest = name.split("/")
        if first not in (record.attempt, f"{record.attempt}.h5") or {"", ".", ".."} & set(rest):
            raise ValueError(f"it names a file outside its attempt: {name!r}")
    return record


def _check_version(document: Json) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version!r}, this program reads {SCHEMA_VERSION}")
