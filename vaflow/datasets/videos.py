"""Layout `videos`: any folder of videos, with labels beside them and a list of splits, both optional.

ROOT/**/*.{mp4,avi,mov,mkv,webm}; `<stem>.csv` beside a video; ROOT/splits.csv with `name,split`. Hidden files and
folders are left out, and folders that are links: they may leave the root or lead in circles.

Tables of one's own: a column of frames or times, and one or two of labels.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vaflow.datasets import text
from vaflow.datasets.clip import Annotation, Clip, Note
from vaflow.datasets.files import entries, examples, is_video, printable
from vaflow.datasets.splits import SPLITS_FILE, match_splits, read_splits
from vaflow.datasets.text import TARGETS, Problems


def read_csv(path: Path) -> Annotation:
    """A table with a column `frame` (0-based) or `time` (seconds), and `valence`, `arousal` or one of them.

    Other columns are ignored. Values are in [-1, 1]; -5 or an empty cell is not annotated. Frames and times ascend.

    Raises:
        DataError: with every problem and its lines.
    """
    expected = (
        "a header with 'frame' or 'time', and 'valence' and/or 'arousal', separated by commas; then one row a line"
    )
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, expected, "an empty file")
    header = [cell.lower() for cell in text.split(lines[0])]
    clocks = [name for name in ("frame", "time") if name in header]
    targets = tuple(name for name in TARGETS if name in header)
    if not clocks or not targets or len(set(header)) != len(header):
        raise text.refuse(path, expected, f"line 1 ({lines[0][:60]!r})")
    clock, where = clocks[0], [header.index(name) for name in targets]
    stands, value = [], []
    for number, cells in text.rows(lines, len(header), problems):
        stands.append((number, cells[header.index(clock)]))
        value.append([text.value(cells[i], number, problems, text.EMPTY) for i in where])
    frame = text.frames(stands, problems) if clock == "frame" else None
    time = text.times(stands, problems) if clock == "time" else None
    if problems:
        raise text.refuse(path, expected, problems)
    if not value:
        raise text.refuse(path, expected, "a header without rows")
    both = np.full((len(value), 2), np.nan, np.float32)
    both[:, [TARGETS.index(name) for name in targets]] = value
    return Annotation(value=both, time=time, frame=frame, targets=targets)


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
