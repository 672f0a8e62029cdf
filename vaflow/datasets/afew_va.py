"""Layout `afew-va`: clips of films as folders of frames, with one JSON file of labels in each.

    [*/]<clip>/00000.png 00001.png ...   whole frames, numbered from 0
    [*/]<clip>/<clip>.json               frames[number]{landmarks, valence, arousal}, whole numbers from -10 to 10

`detect` looks, down to four folders below the root, for a folder that holds numbered images and a JSON file that begins
with an object of "frames". A clip's id is its folder's path below the root. The images carry no times: the films run
at 25 frames per second, so frame n is shown at n / 25 s. There is no audio, and the landmarks are not used: faces are
detected as in a video. There is no official split; ROOT/splits.csv (`name,split`) can give one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.datasets.clip import Annotation, Clip, Note
from vaflow.datasets.files import LeftOut, assign, head, walk
from vaflow.datasets.labels import MAX_FRAME, TARGETS, read_bytes, unusable
from vaflow.errors import DataError, examples

LOOKS_FOR = "folders that hold numbered images and a .json of labels each"
FRAME_RATE = 25.0  # of films
SCALE = 10.0  # the largest value a frame can have

_EXPECTED = (
    "a JSON object with 'frames': frame number -> an object with 'valence' and 'arousal', each from -10 to 10 or null"
)
_IMAGE = re.compile(r"\d+\.(png|jpe?g)", re.IGNORECASE)
_SHOWN = 10


def detect(root: Path) -> str | None:
    """Return why `root` matches this layout, or None."""
    for folder, labels, has_images in _clip_folders(root):
        if labels is not None and has_images and '"frames"' in head(labels):
            return f"{folder.relative_to(root)}/ holds numbered images and {labels.name}"
    return None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: ROOT/splits.csv has mistakes.
    """
    left_out = LeftOut(root)
    folders = {
        folder.relative_to(root).as_posix(): (folder, labels) for folder, labels, _ in _clip_folders(root, left_out)
    }
    assigned = assign(root, [(item, item) for item in folders])
    clips = [
        Clip(
            id=item,
            split=assigned.splits.get(item),
            group=assigned.groups.get(item, item),
            video=None,
            labels=labels,
            label_format="afew-va" if labels else "none",
            frames=folder,
            frame_rate=FRAME_RATE,
        )
        for item, (folder, labels) in folders.items()
    ]
    return clips, [*assigned.notes, *left_out.notes()]


def _clip_folders(root: Path, left_out: LeftOut | None = None) -> Iterator[tuple[Path, Path | None, bool]]:
    """(folder, its labels, whether it has images) of every folder that is a clip; the root itself is none."""
    for folder, files in walk(root, left_out):
        names = [entry.name for entry in files if entry.name.lower().endswith(".json")]
        named = [name for name in names if name[: -len(".json")] == folder.name]
        chosen = named or (names if len(names) == 1 else [])  # the JSON file named like its folder, or the only one
        labels = folder / chosen[0] if chosen else None
        has_images = any(_IMAGE.fullmatch(entry.name) for entry in files)
        if folder != root and (has_images or (labels is not None and labels.stem == folder.name)):
            yield folder, labels, has_images


def read_afew_va(path: Path) -> Annotation:
    """`frames[number]{valence, arousal}`, divided by 10; `number` is the frame of that number.

    Raises:
        DataError: with every problem and its frames.
    """
    try:
        document = json.loads(read_bytes(path))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise unusable(path, _EXPECTED, f"no JSON ({error})") from error
    frames = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(frames, dict):
        raise unusable(path, _EXPECTED, "JSON without an object 'frames'")
    problems: list[str] = []
    labels: dict[int, tuple[float, ...]] = {}
    for name, entry in frames.items():
        known = name.isascii() and name.isdigit() and len(name) < 10 and int(name) <= MAX_FRAME
        number = int(name) if known else -1
        if not known or number in labels:
            problems.append(f"{name!r} is {'listed twice' if known else 'not a frame number'}")
        elif not isinstance(entry, dict):
            problems.append(f"frame {name} is not an object")
        else:
            labels[number] = tuple(_value(entry, target, name, problems) for target in TARGETS)
    if problems:
        raise unusable(path, _EXPECTED, examples(problems, _SHOWN))
    if not labels:
        raise unusable(path, _EXPECTED, "no frames")
    frame = sorted(labels)
    value = np.array([labels[number] for number in frame], np.float32)
    return Annotation(value=value, frame=np.array(frame, np.int64))


def _value(entry: dict[str, Any], target: str, name: str, problems: list[str]) -> float:
    """One label divided by `SCALE`; NaN if it is missing or has a problem."""
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
