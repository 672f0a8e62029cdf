"""The few things that the commit protocol asks of a file system, each durable when it returns."""

import errno
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex

import numpy as np
from numpy.typing import NDArray

from vaflow.cache.names import TEMPORARY

Blob = NDArray[np.uint8]  # the bytes of one file, writable, so that arrays made of them are too

# Some network and FAT file systems have no hard links; they answer with one of these.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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
