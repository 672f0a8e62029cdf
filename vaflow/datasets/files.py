"""Looking through folders: nothing is opened but what must be, and the order is the same on every machine.

Folders below a root, nearest first, down to a depth; links are followed, but never in circles.
"""

import logging
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from vaflow.errors import DataError, explain

LARGEST_TEXT = 64 * 2**20  # bytes of a file of labels, splits or names: a day of frames has a tenth of that

_LONGEST_NAME = 255  # bytes
_SHOWN_NAME = 100
_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def is_video(name: str) -> bool:
    """Whether a file name ends like a video, in any case."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, hidden entries left out, sorted by name; one that may not be read is passed by."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except PermissionError:
        _log.warning("%s may not be read and is left out", folder)
        return []


def printable(name: str) -> bool:
    """Whether a name can be an item id: text that JSON and other programs can hold (file names may be any bytes)."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def size_problem(path: Path, most: int = LARGEST_TEXT) -> str | None:
    """Why a text file is not to be read whole: it is too large, or a pipe or device. None where it may, or is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_size > most:
        return f"{status.st_size} bytes, more than the {most} that such a file can have"
    return None if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else "no regular file"


def below(folder: Path, name: str) -> Path:
    """The path of a name that came out of a data set or a cache, in a folder. Only text is looked at, never the disk.

    Raises:
        DataError: the name leads out of the folder, or no file can have it.
    """
    parts = name.split("/")
    odd = not name or {"", ".", ".."} & set(parts) or "\0" in name or "\\" in name or not printable(name)
    if odd or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise DataError(
            explain(
                "A name cannot be that of a file in a folder",
                expected="names separated by '/', none of them '..', empty, or longer than 255 bytes",
                got=ascii(name[:_SHOWN_NAME]),
            )
        )
    return folder / name


def seen(root: Path, shown: int = 6) -> str:
    """What stands directly below `root`, for messages that say what was found."""
    names = [entry.name + ("/" if entry.is_dir() else "") for entry in entries(root)]
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "") if names else "nothing"


def examples(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


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
