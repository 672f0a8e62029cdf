"""HDF5: an attempt is one file `<attempt>.h5` whose root holds the arrays as contiguous datasets."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache.schema import Array, Blob, Rows, parts
from vaflow.files import TEMPORARY

SUFFIX = ".h5"


class Hdf5Store:
    """Uncompressed and without times of change, so that equal arrays make equal files."""

    def write_attempt(self, folder: Path, attempt: str, arrays: Mapping[str, Rows]) -> list[str]:
        import h5py

        temporary = folder / f"{TEMPORARY}{attempt}{SUFFIX}"
        try:
            with temporary.open("x+b", buffering=0) as raw:
                steady = _Steady(raw)
                with h5py.File(steady, "w") as file:
                    for name, array in arrays.items():
                        made = file.create_dataset(name, array.shape, array.dtype, track_times=False)
                        for rows in parts(array):
                            made[rows] = array[rows]
                if steady.error is not None:
                    raise steady.error
            temporary.replace(self.path(folder, attempt))
        finally:
            temporary.unlink(missing_ok=True)
        return [attempt + SUFFIX]

    def files_for(self, attempt: str, files: Iterable[str], names: Sequence[str]) -> list[str]:
        return [file for file in files if file == attempt + SUFFIX]

    def read_attempt(self, attempt: str, blobs: Mapping[str, Blob], names: Sequence[str]) -> dict[str, Array]:
        import h5py

        with h5py.File(io.BytesIO(blobs[attempt + SUFFIX].data), "r") as file:
            return {name: _read(file, name, blobs[attempt + SUFFIX].size) for name in names}

    def path(self, folder: Path, attempt: str) -> Path:
        return folder / f"{attempt}{SUFFIX}"


class _Steady:
    """A file that reports no write errors to HDF5, which crashes the process if the disk is full while it closes.

    Attributes:
        error: the first error, to be raised after HDF5 has closed the file; nothing is written after it.
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
        left[:] = bytes(len(left))  # what was never written
        return size

    def read(self, size: int = -1) -> bytes | None:
        return self._raw.read(size)  # by this h5py knows a file

    def seek(self, position: int, whence: int = 0) -> int:
        return self._raw.seek(position, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def flush(self) -> None:
        """Nothing is held back; the commit syncs."""


def _read(file: Any, name: str, size: int) -> Array:
    """One dataset that lies in the file as it is: HDF5 can also point at other files, or unpack to any size.

    Raises:
        ValueError: it is something else.
    """
    import h5py

    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or found.chunks:
        raise ValueError(f"{name!r} is not a contiguous dataset of this file")
    if found.dtype.hasobject or found.nbytes > size:
        raise ValueError(f"{name!r} claims {found.nbytes} bytes of {found.dtype}, the file has {size}")
    return np.asarray(found[()])
