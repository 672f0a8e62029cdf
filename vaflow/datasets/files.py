"""Looking through folders: nothing is opened but what must be, and the order is the same on every machine."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

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


def seen(root: Path, shown: int = 6) -> str:
    """What stands directly below `root`, for messages that say what was found."""
    names = [entry.name + ("/" if entry.is_dir() else "") for entry in entries(root)]
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "") if names else "nothing"


def examples(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
