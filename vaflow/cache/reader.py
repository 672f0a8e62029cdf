"""Read the arrays of a record: bytes are read once and checked before the store parses them."""

import stat
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

from vaflow import files
from vaflow.cache import storage as places
from vaflow.cache.documents import crc32c
from vaflow.cache.layout import Layout
from vaflow.cache.schema import Array, Blob, Json, Record
from vaflow.cache.stores import Store
from vaflow.errors import MissingError, explain

# Raised by the stores for files that match their checksum and have other contents.
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, OSError)


def fetch(
    layout: Layout, store: Store, record: Record, names: Sequence[str] | None, *, verify: bool = True
) -> dict[str, Array]:
    """The arrays `names` (all when None) of a committed item.

    Raises:
        MissingError: the item has no such array.
        CorruptError: a file is missing or differs from the record.
    """
    wanted = list(record.arrays) if names is None else list(names)
    for name in wanted:
        if name not in record.arrays:
            problem = f"Item {record.item!r} of stream {record.stream!r} has no such array"
            raise MissingError(explain(problem, got=name, choices=record.arrays))
    folder = layout.item(record.stream, record.item)
    needed = store.files_for(record.attempt, record.files, wanted)
    blobs, path = {}, folder
    try:
        places.fill(layout, [folder / name for name in needed])
        # Down to the attempt: deeper down `verify` looks. Whatever is read must match size and checksum anyway.
        files.refuse_links(layout.root, store.path(folder, record.attempt))
        for name in needed:
            path = folder / name
            blobs[name] = _read(layout, path, record, record.files[name], verify=verify)
    except OSError as error:
        raise layout.corrupt(path, str(error), record.stream, record.item) from error
    return decode(layout, store, record, blobs, wanted)


def _read(layout: Layout, path: Path, record: Record, facts: Json, *, verify: bool) -> Blob:
    """The bytes of one file; a file of another size is not read. Raises CorruptError."""
    found = size_problem(path, facts)
    if found is None:
        blob = np.fromfile(path, np.uint8)
        found = file_problem(blob, facts) if verify else None
        if found is None:
            return blob
    if layout.remote is not None:  # the local copy is damaged: download it again
        blob = places.read(layout, path, again=True)
        if file_problem(blob, facts) is None:
            return blob
    raise layout.corrupt(path, found, record.stream, record.item)


def decode(
    layout: Layout, store: Store, record: Record, blobs: Mapping[str, Blob], wanted: Sequence[str]
) -> dict[str, Array]:
    """The arrays `wanted` out of the files that hold them.

    Raises:
        CorruptError: the files do not hold them, or not in the shape and dtype that the record says.
    """
    folder = layout.item(record.stream, record.item)
    try:
        _check_room(record, blobs, wanted)
        arrays = store.read_attempt(record.attempt, blobs, wanted)
    except _BROKEN as error:
        problem = f"its files do not hold the arrays ({error})"
        raise layout.corrupt(store.path(folder, record.attempt), problem, record.stream, record.item) from error
    for name, array in arrays.items():
        if {"shape": list(array.shape), "dtype": str(array.dtype)} != record.arrays[name]:
            problem = f"array {name!r} is {array.dtype} {list(array.shape)}, the record says {record.arrays[name]}"
            raise layout.corrupt(store.path(folder, record.attempt), problem, record.stream, record.item)
    return arrays


def _check_room(record: Record, blobs: Mapping[str, Blob], wanted: Sequence[str]) -> None:
    """Arrays are not compressed, so none can be larger than the files that hold them.

    Raises:
        ValueError: the record claims more.
    """
    said = [record.arrays[name] for name in wanted]
    claimed = sum(int(prod(facts["shape"])) * np.dtype(facts["dtype"]).itemsize for facts in said)
    held = sum(blob.size for blob in blobs.values())
    if claimed > held:
        raise ValueError(f"the record claims {claimed} bytes of arrays, the files have {held}")


def size_problem(path: Path, facts: Json) -> str | None:
    """How a file differs from what its record says, as far as can be told without reading it.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return "it is no file"
    if status.st_size != facts["size"]:
        return f"it has {status.st_size} bytes, {facts['size']} were committed"
    return None


def file_problem(blob: Blob, facts: Json) -> str | None:
    """How the bytes of a file differ from what its record says, if they do."""
    if blob.size != facts["size"]:
        return f"it has {blob.size} bytes, {facts['size']} were committed"
    if crc32c(blob) != facts["crc32c"]:
        return "its bytes do not match their checksum"
    return None
