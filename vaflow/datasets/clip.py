"""The records of a data set: clips, annotations, notes about what a scan decided or left out, and layouts.

If all people of a clip are extracted, its items are `clip#1`, `clip#2`, ...
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Clip:
    """One person in one video, or one recording of audio alone.

    Attributes:
        id: unique in the data set: the path below its root without extension, or the trial's name.
        split: "train", "val", "test", or None if the data set does not say.
        group: source video or speaker; k-fold keeps the clips of one group together.
        video: file whose video stream gives the frame clock (and the faces, if there are no crops); None for audio
            alone and for folders of frames.
        audio: file whose audio stream is used; usually the video.
        crops: folders of face crops named by 1-based video frame number, merged in order; empty: detect faces.
        labels: annotation file, or None.
        label_format: key of `vaflow.datasets.READERS` or, with `dimensions`, of `DIMENSION_READERS`.
        dimensions: (target, file), if each dimension has its own file; `labels` is then the first of them.
        frames: folder of frames named by 0-based number, in place of a video, shown at `frame_rate` per second.
        frame_rate: frames per second of `frames`; None for a video, which has presentation times.
        person_labels: (K, file): labels of person K, if all people of the clip are extracted.
        side: "left" or "right": which of two people the clip is about, if it has no crops; "" if not known.
    """

    id: str
    split: str | None
    group: str
    video: Path | None
    audio: Path | None = None
    crops: tuple[Path, ...] = ()
    labels: Path | None = None
    label_format: str = "none"
    dimensions: tuple[tuple[str, Path], ...] = ()
    frames: Path | None = None
    frame_rate: float | None = None
    side: str = ""
    person_labels: tuple[tuple[int, Path], ...] = ()


@dataclass(frozen=True)
class Annotation:
    """Labels of one clip, before they are put on the frame clock.

    Attributes:
        value: [N, 2] float32, valence and arousal; NaN for a row that is not annotated.
        time: [N] seconds, or None if row k belongs to frame `frame[k]`.
        frame: [N] 0-based frame numbers, or None if rows have times.
        targets: the columns of `value` that the file has.
        stated: [N] seconds that the file states beside its frame numbers, NaN where none; only compared, never used.
    """

    value: NDArray[np.float32]
    time: NDArray[np.float64] | None = None
    frame: NDArray[np.int64] | None = None
    targets: tuple[str, ...] = field(default=("valence", "arousal"))
    stated: NDArray[np.float64] | None = None


Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Note:
    """One finding about a data set.

    Attributes:
        severity: "error": an item cannot be used, or results would be wrong; "warning": needs a look; "note": usual.
        code: kind of finding, e.g. "two-videos"; equal codes are shown together.
        item: clip id, or "" for the data set as a whole.
        message: the finding.
        remedy: what to do about it, or "".
    """

    severity: Severity
    code: str
    item: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Dataset:
    """The clips below `root`, sorted by id, and notes about what the scan decided or left out."""

    root: Path
    layout: str
    clips: tuple[Clip, ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How one kind of folder is read.

    Attributes:
        looks_for: what `detect` needs to find, for messages.
        detect: root -> why it may be of this layout, or None.
        scan: root -> clips in any order, and notes.
    """

    looks_for: str
    detect: Callable[[Path], str | None]
    scan: Callable[[Path], tuple[list[Clip], list[Note]]]


def person_item(clip: str, number: int) -> str:
    """Return the item of person `number` (from 1) of a clip whose people were all extracted."""
    return f"{clip}#{number}"


def clip_and_person(item: str) -> tuple[str, int]:
    """Return the clip and the number of the person that an item's name states; the item and 0 if it states none."""
    clip, mark, number = item.rpartition("#")
    return (clip, int(number)) if mark and clip and re.fullmatch(r"[1-9]\d*", number) else (item, 0)
