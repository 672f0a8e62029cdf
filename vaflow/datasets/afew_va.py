"""Layout `afew-va`: clips of films as folders of pictures, with one JSON of labels in each.

    [*/]<clip>/00000.png 00001.png ...   whole frames, numbered from 0
    [*/]<clip>/<clip>.json               frames[number]{landmarks, valence, arousal}, from -10 to 10

`detect` looks, down to four folders below the root, for a folder that holds numbered pictures and a JSON that begins
with an object of "frames". A clip's id is its folder's path below the root. The pictures carry no times: the films run
at 25 frames per second, so picture n is shown at n / 25 s. There is no sound, and the landmarks are not used: faces
are found as in a video. There is no official split; ROOT/splits.csv (`name,split`) can give one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vaflow.datasets.clip import Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.splits import SPLITS_FILE, match_splits, read_splits
from vaflow.datasets.walk import head, walk

LOOKS_FOR = "folders that hold numbered pictures and a .json of labels each"
FRAME_RATE = 25.0  # of films

_PICTURE = re.compile(r"\d+\.(png|jpe?g)", re.IGNORECASE)


def detect(root: Path) -> str | None:
    """Why `root` may be of this layout, or None."""
    for folder, labels, has_pictures in _folders(root):
        if labels is not None and has_pictures and '"frames"' in head(labels):
            return f"{folder.relative_to(root)}/ holds numbered pictures and {labels.name}"
    return None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    found = {folder.relative_to(root).as_posix(): (folder, labels) for folder, labels, _ in _folders(root)}
    splits: dict[str, str] = {}
    notes: list[Note] = []
    if (root / SPLITS_FILE).is_file():
        splits, notes = match_splits(read_splits(root / SPLITS_FILE), [(item, item) for item in found])
    clips = [_clip(item, splits.get(item), folder, labels) for item, (folder, labels) in found.items()]
    return clips, notes


def _clip(item: str, split: str | None, folder: Path, labels: Path | None) -> Clip:
    label_format = "afew-va" if labels else "none"
    return Clip(item, split, item, None, labels=labels, label_format=label_format, frames=folder, frame_rate=FRAME_RATE)


def _folders(root: Path) -> Iterator[tuple[Path, Path | None, bool]]:
    """(folder, its labels, whether it has pictures) of every folder that is a clip; the root itself is none."""
    for folder, files in walk(root):
        labels = _labels(folder, files)
        has_pictures = any(_PICTURE.fullmatch(entry.name) for entry in files)
        if folder != root and (has_pictures or (labels is not None and labels.stem == folder.name)):
            yield folder, labels, has_pictures


def _labels(folder: Path, files: Sequence[os.DirEntry[str]]) -> Path | None:
    """The JSON named like its folder, or the only one."""
    names = [entry.name for entry in files if entry.name.lower().endswith(".json")]
    own = [name for name in names if name[: -len(".json")] == folder.name]
    chosen = own or (names if len(names) == 1 else [])
    return folder / chosen[0] if chosen else None
