"""Commit protocol: write and flush the arrays, then create the completion record. Many writers may share a cache.

A reader finds an item only through its record, and a record exists only after all its files are on the disk. A writer
that is killed leaves an attempt without a record, which readers skip.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from vaflow import files
from vaflow.cache import storage as places
from vaflow.cache.documents import file_facts, record_document, record_from, seal, unseal
from vaflow.cache.layout import Layout
from vaflow.cache.schema import Record, Rows
from vaflow.cache.stores import Store


def load_record(layout: Layout, path: Path) -> Record:
    """The record in a file below `records/`.

    Raises:
        ValueError: the file is damaged, or is not the record of that place.
        FileNotFoundError: there is none.
    """
    record = record_from(unseal(files.read_document(layout.root, path)))
    if layout.record(record.stream, record.item) != path:
        raise ValueError(f"it is the record of {record.item!r} of stream {record.stream!r}")
    return record


def commit(layout: Layout, store: Store, draft: Record, arrays: Mapping[str, Rows]) -> Record:
    """Write `arrays` as a new attempt and make `draft` its record; returns the record that holds now.

    Where there was no record, of several writers the first wins and the others' attempts are deleted. Where there was
    one, it is replaced at once and its attempt deleted.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = layout.item(draft.stream, draft.item)
    replacing = layout.record(draft.stream, draft.item).exists()  # decided before others can commit meanwhile
    files.refuse_links(layout.root, folder)
    files.make_folder(folder)
    attempt = token_hex(8)
    try:
        names = store.write_attempt(folder, attempt, arrays)
        places.flush(layout, layout.attempts(draft.stream), [f"{folder.name}/{name}" for name in names])
        record = replace(draft, attempt=attempt, files={name: file_facts(folder / name) for name in names})
        return _replace(layout, store, record) if replacing else _create(layout, store, record)
    finally:
        # Ask the disk: an interrupt may have come after the record was made.
        if _recorded_attempt(layout, draft) != attempt:
            places.remove(layout, store.path(folder, attempt))


def _recorded_attempt(layout: Layout, draft: Record) -> str | None:
    path = layout.record(draft.stream, draft.item)
    try:
        places.look(layout, path)
        return load_record(layout, path).attempt
    except (FileNotFoundError, ValueError):
        return None


def _create(layout: Layout, store: Store, record: Record) -> Record:
    path = layout.record(record.stream, record.item)
    if places.create(layout, path, seal(record_document(record))):
        return record
    try:
        return load_record(layout, path)
    except (FileNotFoundError, ValueError):  # dropped again, or half a file: ours takes its place
        return _replace(layout, store, record)


def _replace(layout: Layout, store: Store, record: Record) -> Record:
    path = layout.record(record.stream, record.item)
    try:
        old = load_record(layout, path)
    except (FileNotFoundError, ValueError):
        old = None
    places.replace(layout, path, seal(record_document(record)))
    if old is not None:
        places.remove(layout, store.path(layout.item(old.stream, old.item), old.attempt))
    return record


def discard(layout: Layout, store: Store, path: Path) -> None:
    """Remove the record in the file `path`, then its attempt, which is known unless the record is damaged."""
    try:
        record = load_record(layout, path)
    except FileNotFoundError:
        return
    except ValueError:
        record = None
    places.remove(layout, path)
    files.sync(path.parent)
    if record is not None:
        attempt = store.path(layout.item(record.stream, record.item), record.attempt)
        if not files.is_behind_link(layout.root, attempt):
            places.remove(layout, attempt)
