"""Folders below a root, nearest first, down to a depth; links are followed, but never in circles."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from vaflow.datasets.files import entries, printable

DEPTH = 4  # `<archive>/<task>/label_segments/arousal/`: releases nest their folders one or two deeper than others

_HEAD = 4096  # bytes


def walk(root: Path, depth: int = DEPTH) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """(folder, its files sorted by name), the root first. Hidden entries and names that are not text are left out."""
    queue = deque([(root, 0)])
    visited = set()
    while queue:
        folder, level = queue.popleft()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        files = []
        for entry in entries(folder):
            if not printable(entry.name):
                continue
            if not entry.is_dir():
                files.append(entry)
            elif level < depth:
                queue.append((Path(entry.path), level + 1))
        yield folder, files


def head(path: Path) -> str:
    """The first few thousand characters of a text file; empty where it cannot be read, or is a pipe."""
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD).decode("utf-8-sig", "replace")
    except OSError:
        return ""
