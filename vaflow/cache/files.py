"""The few things that the commit protocol asks of a file system, each durable when it returns."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex

import numpy as np
from numpy.typing import NDArray

from vaflow.cache.layout import TEMPORARY

Blob = NDArray[np.uint8]  # the bytes of one file, writable, so that arrays made of them are too

LARGEST_DOCUMENT = 64 * 2**20  # bytes

# Some network and FAT file systems have no hard links; they answer with one of these.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def refuse_links(root: Path, *paths: Path) -> None:
    """Nothing between `root` and `paths`, nor these themselves, may be a link: a cache is what lies in its folder.

    What is not there is no link; above `root` links are the user's own.

    Raises:
        OSError: there is one, or a path does not lie below `root`.
    """
    top = f"{root}{os.sep}"
    known = set()  # text and one look at each folder: this is done for every item that is read
    for path in map(os.fspath, paths):
        if path == str(root):
            continue
        if not path.startswith(top) or ".." in path.split(os.sep):  # noqa: PTH206
            raise OSError(errno.ELOOP, "a name that leads out of the cache", path)
        place = str(root)
        for part in path[len(top) :].split(os.sep):  # noqa: PTH206
            place = f"{place}{os.sep}{part}"
            if place not in known and os.path.islink(place):  # noqa: PTH114
                raise OSError(errno.ELOOP, "a link, which is not followed", place)
            known.add(place)


def behind_link(root: Path, path: Path) -> bool:
    """Whether removing `path` would remove something outside of `root`: a folder on the way to it is a link."""
    try:
        refuse_links(root, path.parent)
    except OSError:
        return True
    return False


def read_document(root: Path, path: Path) -> bytes:
    """All bytes of a small file below `root`.

    Raises:
        ValueError: it is a link or behind one, no regular file, or far too large.
        OSError: it is not there or cannot be read.
    """
    try:
        refuse_links(root, path)
    except OSError as error:
        raise ValueError(f"it is not in the cache: {error.filename} is {error.strerror}") from error
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file")
    if status.st_size > LARGEST_DOCUMENT:
        raise ValueError(f"it has {status.st_size} bytes, far more than such a file can have")
    return path.read_bytes()


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(top: Path, files: Iterable[str]) -> None:
    """Flush `files` below `top`, then every folder between them and `top`.

    Side by side: the journal of a file system takes them together, which is three to four times faster for zarr.
    """
    paths = [top / name for name in files]
    folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(top)}
    with ThreadPoolExecutor(max_workers=min(8, max(len(paths), 1))) as pool:
        for group in (paths, folders):
            for _ in pool.map(sync, group):  # raises what a thread raised
                pass


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it; each new name is flushed."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def create(path: Path, data: bytes) -> bool:
    """Create a file whole, unless there is one: False says that another writer was first. Never shows half a file."""
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_links(path, data)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def _create_without_links(path: Path, data: bytes) -> bool:
    """Exclusive, but a kill at the wrong instant leaves half a file, which its checksum gives away."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    sync(path.parent)
    return True


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another, whole, at once."""
    temporary = _write_temporary(path, data)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f"{TEMPORARY}{token_hex(8)}")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # what unlink says of a folder depends on the system
        if not path.is_dir():
            raise
        shutil.rmtree(path, ignore_errors=False)


def read(path: Path) -> Blob:
    """All bytes of a file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    return np.fromfile(path, np.uint8)
