"""File operations of the commit protocol, on a disk or on an object store with its local copy.

The object store is changed first, so that the local copy never contains anything uncommitted.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vaflow import files
from vaflow.cache.layout import Layout
from vaflow.cache.schema import Blob


def create(layout: Layout, path: Path, data: bytes) -> bool:
    """Create a file whole, unless there is one: returns False if another writer was first."""
    if layout.remote is None:
        return files.create_file(path, data)
    if not layout.remote.create(path, data):
        layout.remote.look(path)
        return False
    files.make_folder(path.parent)
    files.replace_file(path, data)
    return True


def replace(layout: Layout, path: Path, data: bytes) -> None:
    """Replace a file whole, at once."""
    if layout.remote is not None:
        layout.remote.replace(path, data)
    files.replace_file(path, data)


def remove(layout: Layout, path: Path) -> None:
    """Remove a file or a whole folder; does nothing if there is none.

    Raises:
        OSError: it cannot be removed, or is behind a link: nothing outside the cache is removed.
    """
    files.refuse_links(layout.root, path.parent)
    if layout.remote is not None:
        layout.remote.remove(path)
    files.remove(path)


def flush(layout: Layout, top: Path, names: Iterable[str]) -> None:
    """Make new files below `top` last: on the disk, or on the object store."""
    if layout.remote is None:
        files.sync_all(top, names)
    else:
        layout.remote.put(top / name for name in names)


def look(layout: Layout, path: Path) -> None:
    """Download a small file again if other writers changed it; on a disk, do nothing."""
    if layout.remote is not None:
        layout.remote.look(path)


def fill(layout: Layout, paths: Iterable[Path], *, again: bool = False) -> None:
    """Download files of arrays that are not in the local copy; all of them if `again`, to replace or check them."""
    if layout.remote is not None:
        layout.remote.fill(paths, again=again)


def read(layout: Layout, path: Path, *, again: bool = False) -> Blob:
    """All bytes of a file. Raises OSError."""
    fill(layout, [path], again=again)
    return np.fromfile(path, np.uint8)
