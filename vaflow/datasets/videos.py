"""Layout `videos`: any folder of videos, with labels beside them and a list of splits, both optional.

ROOT/**/*.{mp4,avi,mov,mkv,webm}; `<stem>.csv` beside a video; ROOT/splits.csv with `name,split`. Hidden files and
folders are left out, and folders that are links: they may leave the root or lead in circles.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.datasets.clip import Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.files import entries, examples, is_video, printable
from vaflow.datasets.splits import SPLITS_FILE, match_splits, read_splits

LOOKS_FOR = "video files (mp4, avi, mov, mkv, webm) in any folder"


@dataclass
class _Found:
    """Paths below the root, as text with forward slashes."""

    videos: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)  # path without its .csv -> path
    linked: list[str] = field(default_factory=list)  # folders that are links
    broken: list[str] = field(default_factory=list)  # names that are not text, links to nothing


def detect(root: Path) -> str | None:
    """Why `root` may be of this layout (its first video), or None."""
    for files, _ in _folders(root):
        for path, _ in files:
            if is_video(path):
                return f"{path} is a video"
    return None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    found = _survey(root)
    items = dict(zip(item_ids(found.videos), found.videos, strict=True))
    splits: dict[str, str] = {}
    notes = _found_notes(found)
    if (root / SPLITS_FILE).is_file():
        splits, more = match_splits(read_splits(root / SPLITS_FILE), list(items.items()))
        notes += more
    clips = [_clip(root, item, path, splits.get(item), found.tables.get(_stem(path))) for item, path in items.items()]
    shared = Counter(clip.labels for clip in clips if clip.labels)
    for clip in clips:
        if clip.labels and shared[clip.labels] > 1:
            message = f"{clip.labels.name} stands beside several videos of that name and is used for each"
            notes.append(Note("warning", "shared-labels", clip.id, message, "Rename the video that it does not fit"))
    return clips, notes


def item_ids(paths: list[str]) -> list[str]:
    """The path without its extension; with it, where that would be the id of two files."""
    short = Counter(_stem(path) for path in paths)
    full = set(paths)
    return [path if short[_stem(path)] > 1 or _stem(path) in full else _stem(path) for path in paths]


def _clip(root: Path, item: str, path: str, split: str | None, table: str | None) -> Clip:
    video = root / path
    labels = root / table if table else None
    return Clip(item, split, item, video, video, (), labels, "csv" if labels else "none")


def _stem(path: str) -> str:
    """The path without the last extension."""
    return path[: path.rindex(".")]


def _survey(root: Path) -> _Found:
    found = _Found()
    for files, linked in _folders(root):
        found.linked += linked
        for path, entry in files:
            if not printable(path):
                found.broken.append(ascii(path))
            elif is_video(path):
                if entry.is_file():
                    found.videos.append(path)
                else:
                    found.broken.append(path)
            elif path.lower().endswith(".csv") and path != SPLITS_FILE:
                found.tables[_stem(path)] = path
    return found


def _folders(root: Path) -> Iterator[tuple[list[tuple[str, os.DirEntry[str]]], list[str]]]:
    """(files with their entries, linked folders) of every folder of the tree, as paths below `root`."""
    queue = [""]
    while queue:
        folder = queue.pop()
        files: list[tuple[str, os.DirEntry[str]]] = []
        linked, below = [], []
        for entry in entries(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if not entry.is_dir():
                files.append((path, entry))
            elif entry.is_symlink():
                linked.append(path)
            else:
                below.append(path)
        queue += reversed(below)
        yield files, linked


def _found_notes(found: _Found) -> list[Note]:
    notes = []
    if found.linked:
        message = f"Linked folders were not entered: {examples(found.linked)}"
        notes.append(Note("warning", "linked-folder", "", message, "Link or copy the files, or name the real folder"))
    if found.broken:
        message = f"Links to nothing, or names that are not text: {examples(found.broken)}"
        notes.append(Note("warning", "unusable-name", "", message, "Rename them, or mend the links"))
    orphans = sorted(set(found.tables) - {_stem(path) for path in found.videos})
    if orphans:
        message = f"Tables without a video of their name: {examples(orphans)}"
        remedy = "Put the video beside it, or rename the table: labels count only beside a video of their name"
        notes.append(Note("note", "table-without-video", "", message, remedy))
    return notes
