"""Arrays that may exceed memory: their rows are kept in an unnamed file on the cache's disk.

Arrays of up to one chunk are ordinary NumPy arrays; only longer ones, such as the log-Mel of 44 minutes, use the disk.
The file has no name, so nothing is left behind, however the process ends.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from vaflow.cache.layout import Layout
from vaflow.cache.schema import Array, Rows
from vaflow.files import TEMPORARY

IN_MEMORY = 64 * 2**20  # bytes of one array


class LongArray:
    """An array in a file, with part of the NumPy interface: slices of rows with step 1 are read and written.

    Another thread may read it once all rows are written.
    """

    def __init__(self, file: "_File", shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file, self.shape, self.dtype = file, shape, dtype
        self.ndim, self.size = len(shape), prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self._row_bytes = prod(shape[1:]) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        start, stop, _ = rows.indices(len(self))
        values = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        self._file.read(start * self._row_bytes, values)
        return values

    def __setitem__(self, rows: slice, values: Array) -> None:
        start, stop, _ = rows.indices(len(self))
        whole = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        whole[:] = values
        self._file.write(start * self._row_bytes, whole)

    def reshape(self, *shape: int) -> "LongArray":
        """The same rows in another shape of the same size."""
        if prod(shape) != self.size:
            raise ValueError(f"LongArray.reshape: {self.shape} does not fit {shape}")
        return LongArray(self._file, shape, self.dtype)


class Growing:
    """An array of unknown final length, to which blocks of rows are appended.

    Args:
        layout: of the cache whose disk has the file for rows beyond `IN_MEMORY`.
        row: the shape of a row; () for single values.
    """

    def __init__(self, layout: Layout, row: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._layout, self._row, self._dtype = layout, row, dtype
        self._blocks: list[Array] = []
        self._waiting = self._written = 0  # bytes in `_blocks`, bytes in the file
        self._file: _File | None = None

    def append(self, block: Array) -> None:
        """Append the rows [n, *row]; they are copied only if their dtype differs."""
        self._blocks.append(np.asarray(block, self._dtype))
        self._waiting += self._blocks[-1].nbytes
        if self._file is None and self._waiting > IN_MEMORY:
            self._file = _File(self._layout)
        if self._file is not None:
            for waiting in self._blocks:
                self._file.write(self._written, np.ascontiguousarray(waiting))
                self._written += waiting.nbytes
            self._blocks, self._waiting = [], 0

    def finish(self) -> Rows:
        """Return all rows, [N, *row]. Call it once, after the last `append`."""
        if self._file is None:
            return np.concatenate(self._blocks) if self._blocks else np.empty((0, *self._row), self._dtype)
        rows = self._written // (prod(self._row) * self._dtype.itemsize)
        return LongArray(self._file, (rows, *self._row), self._dtype)


class Scratch:
    """Factory of arrays for the items of one cache, with files on the disk of the cache. Returned by `Cache.scratch`.

    Writing raises CacheError if the disk is full or not writable.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> Array | LongArray:
        """Return an array of zeros; longer than `IN_MEMORY` bytes, it is in a file."""
        dtype = np.dtype(dtype)
        nbytes = prod(shape) * dtype.itemsize
        if nbytes <= IN_MEMORY:
            return np.zeros(shape, dtype)
        return LongArray(_File(self._layout, nbytes), shape, dtype)

    def growing(self, row: tuple[int, ...], dtype: np.dtype[Any] | str) -> Growing:
        """An array to which rows are appended."""
        return Growing(self._layout, row, np.dtype(dtype))


class _File:
    """Bytes in an unnamed file, which is deleted with the last reference to it.

    Args:
        size: bytes of zeros to begin with, which occupy no disk space until they are overwritten.
    """

    def __init__(self, layout: Layout, size: int = 0) -> None:
        self._layout = layout
        with self._refusals():
            # On systems without unnamed files it briefly has this name; `repair` removes files with this prefix.
            self._raw: Any = tempfile.TemporaryFile(dir=layout.root, prefix=TEMPORARY, buffering=0)  # noqa: SIM115
            self._raw.truncate(size)

    def __del__(self) -> None:
        if hasattr(self, "_raw"):
            self._raw.close()

    def write(self, at: int, values: Array) -> None:
        with self._refusals():
            self._raw.seek(at)
            rest = memoryview(values.reshape(-1).view(np.uint8).data)
            while rest:  # an unbuffered write may be partial
                rest = rest[self._raw.write(rest) :]

    def read(self, at: int, into: Array) -> None:
        with self._refusals():
            self._raw.seek(at)
            rest = memoryview(into.reshape(-1).view(np.uint8).data)
            while rest:
                size = self._raw.readinto(rest)
                if not size:
                    raise OSError("a temporary file of the cache is shorter than expected")
                rest = rest[size:]

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._layout.cannot_write(error) from error
