"""What a layout says about one item of a data set, and what its labels say.

What a layout finds below a root: clips, and notes about what it had to decide.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Clip:
    """One person to be followed through one video.

    Attributes:
        id: unique in the data set: the path below its root without extension, or the trial's name.
        split: "train", "val", "test", or None where the data set does not say.
        group: the source video's stem; clips of one group never part in k-fold.
        video: the file whose video stream gives the frame clock (and the faces, where there are no crops).
        audio: the file whose audio stream is used; usually the video.
        crops: folders of face crops named by 1-based video frame number, merged in order; empty: detect faces.
        labels: the annotation file, or None.
        label_format: how to read it: a key of `vaflow.datasets.formats.READERS` or, with `dimensions`, of
            `DIMENSION_READERS`.
        dimensions: (target, file), where each dimension has a file of its own; `labels` is then the first of them.
        frames: in the place of a video, a folder of its frames as pictures named by number (0-based: picture n is
            frame n), shown at `frame_rate` per second.
        frame_rate: frames per second of `frames`; None where there is a video, whose own times count.
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


@dataclass(frozen=True)
class Annotation:
    """Labels of one clip, before they meet the frame clock.

    Attributes:
        value: [N, 2] float32, valence and arousal; NaN where a row is not annotated.
        time: [N] seconds, or None where row k belongs to frame `frame[k]`.
        frame: [N] 0-based frame numbers, or None where rows have times.
        targets: which columns of `value` the file has at all.
    """

    value: NDArray[np.float32]
    time: NDArray[np.float64] | None = None
    frame: NDArray[np.int64] | None = None
    targets: tuple[str, ...] = field(default=("valence", "arousal"))


Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Note:
    """One thing worth knowing about a data set.

    Attributes:
        severity: "error": an item cannot be used, or results would be wrong; "warning": look at it; "note": normal.
        code: what kind of thing, e.g. "two-videos"; equal codes are shown together.
        item: the clip's id, or "" for the data set as a whole.
        message: what was found.
        remedy: what can be done, or "".
    """

    severity: Severity
    code: str
    item: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Dataset:
    """The clips below `root`, sorted by id, and what the scan had to decide or leave out."""

    root: Path
    layout: str
    clips: tuple[Clip, ...]
    notes: tuple[Note, ...] = ()
