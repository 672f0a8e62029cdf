"""The stores of a cache, Zarr and HDF5: arrays of one attempt to files, and checked bytes of files to arrays.

`layout.py`, `commit.py` and `cache.py` decide when files are flushed, checked, committed or deleted. A new store is
one class with these four methods and one entry in `STORES`.
"""

import io
import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vaflow import files
from vaflow.cache.layout import Layout, crc32c
from vaflow.cache.schema import DTYPES, Array, Blob, Json, Record, Rows, StoreName, parts
from vaflow.errors import MissingError, explain
from vaflow.files import TEMPORARY

LARGEST_CHUNK = 64 * 2**20  # bytes; longer arrays are split along their first axis
RAW_CODECS = ([{"name": "bytes", "configuration": {"endian": "little"}}], [{"name": "bytes"}])
KEYS = ({"name": "default", "configuration": {"separator": "/"}}, {"name": "default"})  # of chunks: Zarr's default
_HDF5 = ".h5"
# Errors of the stores for files that match their checksum but are not valid.
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, OSError)


class Store(Protocol):
    """Converts between arrays and files of one attempt. File names are relative to the item's folder, with `/`."""

    def write_attempt(self, folder: Path, attempt: str, arrays: Mapping[str, Rows]) -> list[str]:
        """Write `arrays` into the existing `folder` under the new name `attempt`; returns the names of all files."""
        ...

    def files_for(self, attempt: str, files: Iterable[str], names: Sequence[str]) -> list[str]:
        """Return those of the attempt's `files` that hold the arrays `names`."""
        ...

    def read_attempt(self, attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
        """Return the arrays `names`, writable, from the bytes of the files that `files_for` names.

        Raises:
            ValueError, KeyError, OSError: the bytes do not hold them.
        """
        ...

    def path(self, folder: Path, attempt: str) -> Path:
        """Return the file or folder to delete with the attempt."""
        ...


class ZarrStore:
    """Zarr v3: an attempt is a group `<attempt>/` whose members are the arrays.

    Uncompressed, one chunk per array up to 64 MiB. All-zero chunks are written too: Zarr reads a missing one as zeros.
    The bytes are those that zarr itself writes with these settings (tests/cache/test_cache_contract.py).
    """

    def write_attempt(self, folder: Path, attempt: str, arrays: Mapping[str, Rows]) -> list[str]:
        """Write the bytes that zarr would write, but faster and without hard links, which some file systems lack."""
        top = folder / attempt
        top.mkdir()
        (top / "zarr.json").write_bytes(_document({"attributes": {}, "zarr_format": 3, "node_type": "group"}))
        names = ["zarr.json"]
        for name, array in arrays.items():
            (top / name).mkdir()
            chunks = chunk_shape(array)
            (top / name / "zarr.json").write_bytes(_document(_array_metadata(array, chunks)))
            names.append(f"{name}/zarr.json")
            for start in range(0, len(array) if array.size else 0, chunks[0]):  # a long array may not fit into memory
                rows = np.ascontiguousarray(array[start : start + chunks[0]], array.dtype.newbyteorder("<"))
                chunk = "/".join([name, "c", str(start // chunks[0]), *("0" for _ in chunks[1:])])
                (top / chunk).parent.mkdir(parents=True, exist_ok=True)
                with (top / chunk).open("xb") as file:
                    file.write(rows.data)
                    file.write(bytes((chunks[0] - len(rows)) * prod(chunks[1:]) * array.dtype.itemsize))  # padding
                names.append(chunk)
        return sorted(f"{attempt}/{name}" for name in names)

    def files_for(self, attempt: str, files: Iterable[str], names: Sequence[str]) -> list[str]:
        prefixes = tuple(f"{attempt}/{name}/" for name in names)
        return [file for file in files if file.startswith(prefixes) or file == f"{attempt}/zarr.json"]

    def read_attempt(self, attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
        return {name: _read_array(attempt, blobs, name) for name in names}

    def path(self, folder: Path, attempt: str) -> Path:
        return folder / attempt


def chunk_shape(array: Rows) -> tuple[int, ...]:
    """Return the shape of a chunk: the whole array, or rows of at most `LARGEST_CHUNK` bytes. Zarr forbids 0."""
    shape = tuple(max(1, length) for length in array.shape)
    if array.nbytes <= LARGEST_CHUNK:
        return shape
    row = array.nbytes // array.shape[0]
    return (max(1, LARGEST_CHUNK // row), *shape[1:])


def _array_metadata(array: Rows, chunks: tuple[int, ...]) -> Json:
    """Return the `zarr.json` of an array, with the keys in the order of zarr."""
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": KEYS[0],
        "fill_value": array.dtype.type(0).item(),
        "codecs": RAW_CODECS[1 if array.dtype.itemsize == 1 else 0],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _document(content: Json) -> bytes:
    return json.dumps(content, indent=2).encode()


def _read_array(attempt: str, blobs: Mapping[str, Blob], name: str) -> Array:
    """Return an array from its chunks, 30 times faster than through zarr.

    Raises:
        ValueError: its chunks are compressed, not whole rows, or not all there; zarr would read missing ones as zeros.
    """
    metadata: dict[str, Any] = json.loads(blobs[f"{attempt}/{name}/zarr.json"].tobytes())
    shape, grid, dtype = tuple(metadata["shape"]), metadata["chunk_grid"], metadata["data_type"]
    if metadata["codecs"] not in RAW_CODECS or metadata["chunk_key_encoding"] not in KEYS or dtype not in DTYPES:
        raise ValueError(f"array {name!r} is not stored as raw bytes of a known type")
    chunk = tuple(grid["configuration"]["chunk_shape"]) if grid.get("name") == "regular" else ()
    lengths_fit = all(type(length) is int and length >= 0 for length in (*shape, *chunk))
    if not lengths_fit or not shape or not chunk[:1] > (0,) or chunk[1:] != tuple(max(1, n) for n in shape[1:]):
        raise ValueError(f"array {name!r} is not stored in chunks of whole rows")
    prefix, rest = f"{attempt}/{name}/c/", "/0" * (len(shape) - 1)
    expected = -(-shape[0] // chunk[0]) if prod(shape) else 0
    stored = sum(key.startswith(prefix) for key in blobs)
    if expected != stored:
        raise ValueError(f"array {name!r} has {stored} of {expected} chunks")
    little = np.dtype(dtype).newbyteorder("<")
    if not expected:
        return np.empty(shape, little)
    chunks = [blobs[f"{prefix}{k}{rest}"].view(little).reshape(chunk[0], *shape[1:]) for k in range(expected)]
    chunks[-1] = chunks[-1][: shape[0] - chunk[0] * (expected - 1)]  # the last chunk is padded
    return chunks[0] if expected == 1 else np.concatenate(chunks)


class Hdf5Store:
    """HDF5: an attempt is one file `<attempt>.h5` whose root holds the arrays as contiguous datasets.

    Uncompressed and without modification times, so that equal arrays make equal files.
    """

    def write_attempt(self, folder: Path, attempt: str, arrays: Mapping[str, Rows]) -> list[str]:
        import h5py

        temporary = folder / f"{TEMPORARY}{attempt}{_HDF5}"
        try:
            with temporary.open("x+b", buffering=0) as raw:
                checked = _CheckedFile(raw)
                with h5py.File(checked, "w") as file:
                    for name, array in arrays.items():
                        made = file.create_dataset(name, array.shape, array.dtype, track_times=False)
                        for rows in parts(array):
                            made[rows] = array[rows]
                if checked.error is not None:
                    raise checked.error
            temporary.replace(self.path(folder, attempt))
        finally:
            temporary.unlink(missing_ok=True)
        return [attempt + _HDF5]

    def files_for(self, attempt: str, files: Iterable[str], names: Sequence[str]) -> list[str]:
        return [file for file in files if file == attempt + _HDF5]

    def read_attempt(self, attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
        import h5py

        blob, arrays = blobs[attempt + _HDF5], {}
        with h5py.File(io.BytesIO(blob.data), "r") as file:
            for name in names:  # links, virtual and compressed datasets could read other files or expand to any size
                dataset = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
                if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external or dataset.chunks:
                    raise ValueError(f"{name!r} is not a contiguous dataset of this file")
                if dataset.dtype.hasobject or dataset.nbytes > blob.size:
                    problem = f"claims {dataset.nbytes} bytes of {dataset.dtype}, the file has {blob.size}"
                    raise ValueError(f"{name!r} {problem}")
                arrays[name] = np.asarray(dataset[()])
        return arrays

    def path(self, folder: Path, attempt: str) -> Path:
        return folder / f"{attempt}{_HDF5}"


class _CheckedFile:
    """A file that hides write errors from HDF5, which crashes the process if the disk is full while it closes a file.

    Attributes:
        error: the first error, for the caller to raise after HDF5 has closed the file; later writes are ignored.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while self.error is None and left:
                left = left[self._raw.write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int) -> int:
        try:
            return self._raw.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size

    def readinto(self, buffer: Any) -> int:
        left = memoryview(buffer).cast("B")
        size = len(left)
        while left and (count := self._raw.readinto(left)):
            left = left[count:]
        left[:] = bytes(len(left))  # bytes that were never written
        return size

    def read(self, size: int = -1) -> bytes | None:
        return self._raw.read(size)  # h5py recognizes a file object by this method

    def seek(self, position: int, whence: int = 0) -> int:
        return self._raw.seek(position, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def flush(self) -> None:
        """Do nothing: the file is unbuffered, and the commit syncs it."""


STORES: Mapping[StoreName, Store] = {"zarr": ZarrStore(), "hdf5": Hdf5Store()}


def fetch(
    layout: Layout, store: Store, record: Record, names: Sequence[str] | None, *, verify: bool = True
) -> dict[str, Array]:
    """Return the arrays `names` (None: all) of a committed item.

    Raises:
        MissingError: the item has no such array.
        CorruptError: a file is missing or differs from the record.
    """
    array_names = known_arrays(record, names)
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


def known_arrays(record: Record, names: Sequence[str] | None) -> list[str]:
    """Return `names`, or the names of all arrays of an item for None.

    Raises:
        MissingError: the item has no such array.
    """
    for name in names or ():
        if name not in record.arrays:
            problem = f"Item {record.item!r} of stream {record.stream!r} has no such array"
            raise MissingError(explain(problem, got=name, choices=record.arrays))
    return list(record.arrays if names is None else names)


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
