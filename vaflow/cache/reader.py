"""Read the arrays of a record. Bytes are read once and checked before the store parses them."""

import stat
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

from vaflow import files
from vaflow.cache.documents import crc32c
from vaflow.cache.layout import Layout
from vaflow.cache.schema import Array, Blob, Json, Record
from vaflow.cache.stores import Store
from vaflow.errors import MissingError, explain

# Errors of the stores for files that match their checksum but are not valid.
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, OSError)


def fetch(
    layout: Layout, store: Store, record: Record, names: Sequence[str] | None, *, verify: bool = True
) -> dict[str, Array]:
    """Return the arrays `names` (None: all) of a committed item.

    Raises:
        MissingError: the item has no such array.
        CorruptError: a file is missing or differs from the record.
    """
    array_names = list(record.arrays) if names is None else list(names)
    for name in array_names:
        if name not in record.arrays:
            problem = f"Item {record.item!r} of stream {record.stream!r} has no such array"
            raise MissingError(explain(problem, got=name, choices=record.arrays))
    folder = layout.item(record.stream, record.item)
    needed = store.files_for(record.attempt, record.files, array_names)
    blobs, path = {}, folder
    try:
        layout.fill([folder / name for name in needed])
        # Links below the attempt are left to `verify`: whatever is read must match size and checksum.
        files.refuse_links(layout.root, store.path(folder, record.attempt))
        for name in needed:
            path = folder / name
            blobs[name] = _read(layout, path, record, record.files[name], verify=verify)
    except OSError as error:
        raise layout.corrupt(path, str(error), record.stream, record.item) from error
    return decode(layout, store, record, blobs, array_names)


def _read(layout: Layout, path: Path, record: Record, facts: Json, *, verify: bool) -> Blob:
    """Return the bytes of one file, checked by size before it is read. Raises CorruptError."""
    problem = size_problem(path, facts)
    if problem is None:
        blob = np.fromfile(path, np.uint8)
        problem = file_problem(blob, facts) if verify else None
        if problem is None:
            return blob
    if layout.remote is not None:  # the local copy is damaged: download it again
        layout.fill([path], again=True)
        blob = np.fromfile(path, np.uint8)
        if file_problem(blob, facts) is None:
            return blob
    raise layout.corrupt(path, problem, record.stream, record.item)


def decode(
    layout: Layout, store: Store, record: Record, blobs: Mapping[str, Blob], array_names: Sequence[str]
) -> dict[str, Array]:
    """Return the arrays `array_names` from the bytes of their files.

    Raises:
        CorruptError: the files do not hold them, or in another shape or dtype than in the record.
    """
    folder = layout.item(record.stream, record.item)
    try:
        # Arrays are not compressed, so none can be larger than the files that hold them.
        facts = [record.arrays[name] for name in array_names]
        claimed = sum(int(prod(array["shape"])) * np.dtype(array["dtype"]).itemsize for array in facts)
        size = sum(blob.size for blob in blobs.values())
        if claimed > size:
            raise ValueError(f"the record claims {claimed} bytes of arrays, the files have {size}")
        arrays = store.read_attempt(record.attempt, blobs, array_names)
    except _BROKEN as error:
        problem = f"its files do not hold the arrays ({error})"
        raise layout.corrupt(store.path(folder, record.attempt), problem, record.stream, record.item) from error
    for name, array in arrays.items():
        if {"shape": list(array.shape), "dtype": str(array.dtype)} != record.arrays[name]:
            problem = f"array {name!r} is {array.dtype} {list(array.shape)}, the record has {record.arrays[name]}"
            raise layout.corrupt(store.path(folder, record.attempt), problem, record.stream, record.item)
    return arrays


def size_problem(path: Path, facts: Json) -> str | None:
    """Return how a file differs in type or size from its record; None if it does not.

    Raises:
        OSError: the file is missing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_size != facts["size"]:
        return f"it has {status.st_size} bytes, {facts['size']} were committed"
    return None


def file_problem(blob: Blob, facts: Json) -> str | None:
    """Return how the bytes of a file differ from its record; None if they do not."""
    if blob.size != facts["size"]:
        return f"it has {blob.size} bytes, {facts['size']} were committed"
    if crc32c(blob) != facts["crc32c"]:
        return "its bytes do not match their checksum"
    return None
