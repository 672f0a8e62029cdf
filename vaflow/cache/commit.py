"""Commit protocol: write and flush the arrays, then create the completion record. Many writers may share a cache.

A reader reaches an item only through its record, and a record exists only after all its files are on the disk. A writer
that is killed leaves an attempt without a record, which readers skip. The settings of a stream are written once, in a
file that later writers compare with theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from vaflow import files
from vaflow.cache.documents import (
    file_facts,
    fingerprint,
    plain,
    record_document,
    record_from,
    seal,
    stream_document,
    stream_from,
    unseal,
)
from vaflow.cache.layout import Layout
from vaflow.cache.schema import FLOAT, KINDS, Record, Rows, StreamInfo, escape
from vaflow.cache.stores import Store
from vaflow.errors import FingerprintError, UsageError, explain


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
