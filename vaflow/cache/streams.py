"""Stream files: the settings of a stream, written once and compared by later writers."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from vaflow.cache.commit import load_record
from vaflow.cache.documents import fingerprint, plain, seal, stream_document, stream_from, unseal
from vaflow.cache.layout import Layout
from vaflow.cache.schema import FLOAT, KINDS, StreamInfo, escape
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.files import make_folder, read_document

_DTYPES = {
    "labels": ("float32",),
    "targets": ("float32",),
    "pixels": ("uint8",),
    "text": ("float32",),
    "faces": ("float32",),
    "crops": ("uint8",),
}


def load_stream(layout: Layout, file_name: str) -> StreamInfo:
    """Load a stream from its file below `streams/`.

    Raises:
        ValueError: the file is damaged, or holds another stream.
        FileNotFoundError: the file does not exist.
    """
    path = layout.all_streams / file_name
    info = stream_from(unseal(read_document(layout.root, path)))
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
        make_folder(layout.records(info.name))
        make_folder(layout.attempts(info.name))
        make_folder(layout.all_streams)
        _refuse_foreign_records(layout, info)
        if layout.create(path, seal(stream_document(info))):
            return
    try:
        known = load_stream(layout, path.name)
    except ValueError as error:
        raise layout.corrupt(path, str(error)) from error
    if fingerprint(known) != fingerprint(info):
        fields = "; ".join(differences(asdict(known), asdict(info)))
        raise FingerprintError(
            explain(
                f"Stream {info.name!r} of {layout.place} has other settings: {fields}",
                remedy="Use the settings of the cache, or extract into another cache",
            )
        )


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
    dtypes = _DTYPES.get(info.kind, FLOAT)
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
            raise FingerprintError(
                explain(
                    f"{layout.place} holds items of stream {info.name!r} with other settings, "
                    f"and {layout.shown(layout.stream(info.name))} is missing",
                    expected=f"fingerprint {fingerprint(info)}",
                    got=record.fingerprint,
                    remedy="Use the settings of the cache, or extract into another cache",
                )
            )


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
