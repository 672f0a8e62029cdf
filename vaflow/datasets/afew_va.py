"""Layout `afew-va`: clips of films as folders of pictures, with one JSON of labels in each.

    [*/]<clip>/00000.png 00001.png ...   whole frames, numbered from 0
    [*/]<clip>/<clip>.json               frames[number]{landmarks, valence, arousal}, from -10 to 10

`detect` looks, down to four folders below the root, for a folder that holds numbered pictures and a JSON that begins
with an object of "frames". A clip's id is its folder's path below the root. The pictures carry no times: the films run
at 25 frames per second, so picture n is shown at n / 25 s. There is no sound, and the landmarks are not used: faces
are found as in a video. There is no official split; ROOT/splits.csv (`name,split`) can give one.

AFEW-VA's annotation files: one JSON object per clip, whole numbers from -10 to 10 per frame.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.datasets import text
from vaflow.datasets.clip import Annotation, Clip, Note
from vaflow.datasets.files import head, walk
from vaflow.datasets.splits import SPLITS_FILE, match_splits, read_splits
from vaflow.datasets.text import MAX_FRAME, TARGETS
from vaflow.errors import DataError

SCALE = 10.0  # the largest value a frame can have

_EXPECTED = (
    "a JSON object with 'frames': frame number -> an object with 'valence' and 'arousal', each from -10 to 10 or null"
)
_SHOWN = 20


def read_afew_va(path: Path) -> Annotation:
    """`frames[number]{valence, arousal}` -> values divided by 10; frame `number` is the picture of that number.

    Raises:
        DataError: with every problem and its frames.
    """
    problems: list[str] = []
    found: dict[int, tuple[float, ...]] = {}
    for name, entry in _frames(path).items():
        number = _number(name)
        if number is None or number in found:
            problems.append(f"{name!r} is {'not a frame number' if number is None else 'there twice'}")
        elif not isinstance(entry, dict):
            problems.append(f"frame {name} is not an object")
        else:
            found[number] = tuple(_value(entry, target, name, problems) for target in TARGETS)
    if problems:
        rest = len(problems) - _SHOWN
        shown = "; ".join(problems[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
        raise text.refuse(path, _EXPECTED, shown)
    if not found:
        raise text.refuse(path, _EXPECTED, "no frames")
    frame = sorted(found)
    value = np.array([found[number] for number in frame], np.float32)
    return Annotation(value=value, frame=np.array(frame, np.int64))


def _frames(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text.read_bytes(path))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise text.refuse(path, _EXPECTED, f"no JSON ({error})") from error
    frames = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(frames, dict):
        raise text.refuse(path, _EXPECTED, "JSON without an object 'frames'")
    return frames


def _number(name: str) -> int | None:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        return None
    return int(name) if int(name) <= MAX_FRAME else None


def _value(entry: dict[str, Any], target: str, name: str, problems: list[str]) -> float:
    """One label as a share of `SCALE`; NaN where there is none or it has a problem."""
    value = entry.get(target)
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = repr(value[:40]) if isinstance(value, str) else type(value).__name__
        problems.append(f"{target} of frame {name} is not a number ({got})")
    elif not -SCALE <= value <= SCALE:  # NaN fails this comparison too
        problems.append(f"{target} of frame {name} is {str(value)[:40]}, beyond [-10, 10]")
    else:
        return value / SCALE
    return np.nan


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
