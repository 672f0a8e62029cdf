"""Commit protocol: write and flush the arrays, then create the completion record. Many writers may share a cache.

A reader reaches an item only through its record, and a record exists only after all its files are on the disk. A writer
that is killed leaves an attempt without a record, which readers skip.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from vaflow import files
from vaflow.cache.documents import file_facts, record_document, record_from, seal, unseal
from vaflow.cache.layout import Layout
from vaflow.cache.schema import Record, Rows
from vaflow.cache.stores import Store


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
