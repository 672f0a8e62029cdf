"""What workers and the pipeline say to each other: plain data, so that a worker needs neither torch nor the cache."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Clip
from vaflow.encoders.images import Preparation
from vaflow.extract.faces.detection import Cells
from vaflow.timeline import Grid


@dataclass(frozen=True)
class Job:
    """One clip to be read.

    Attributes:
        number: which job of the run; every message about it carries the number.
        audio, faces: which parts are wanted; the clock and the labels always are.
        face_source: "auto" (crops where the clip has them, else detection), "centerface" or "none" (whole frames).
        preparations: the inputs that the visual encoders expect.
        keep_jpeg: send the stored form of every crop along.
        decode_on: the GPU that decodes pictures; empty for PyAV.
        ask: pictures in which the pipeline is asked for faces at once; 0: the worker finds them itself.
    """

    number: int
    clip: Clip
    grid: Grid
    audio: bool
    faces: bool
    face_source: str
    preparations: tuple[Preparation, ...]
    keep_jpeg: bool
    decode_on: str = ""
    ask: int = 0


@dataclass(frozen=True)
class Clock:
    """First word about a clip: its frame clock with labels on it, and what it is made from.

    Attributes:
        labels: arrays of the labels stream (`vaflow.cache.schema.KINDS`).
        duration: seconds: last frame's presentation time plus the median interval.
        sources: part -> identity, for "video", "audio", "crops", "labels" where present.
        facts: what the labels record says besides: frames, rows, rates, sizes.
    """

    job: int
    labels: dict[str, NDArray[Any]]
    duration: float
    sources: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sound:
    """The next block of the clip's sound: [n] float32, 16 kHz mono, without gaps from time 0."""

    job: int
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class SoundEnd:
    """No more sound. `covered` are the (start, stop) seconds that came from the file; the rest are zeros."""

    job: int
    covered: tuple[tuple[float, float], ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Face:
    """The crop of one grid sample: preparation -> [size, size, 3] uint8, and its stored form, if kept.

    A clip's crops come in the order of their samples.
    """

    job: int
    sample: int
    images: dict[Preparation, NDArray[np.uint8]]
    jpeg: bytes | None


@dataclass(frozen=True)
class FacesEnd:
    """No more crops. `frame` [T] is the 0-based video frame of every grid sample, with or without a face."""

    job: int
    frame: NDArray[np.int64]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Detect:
    """Where are faces in this picture [h, w, 3] uint8, prepared for the network, and in those before it?

    One message each: a pipe takes small ones several times as fast. They are of one size. After the `last` one the
    worker does nothing but read until it has its answer, so that neither side waits in `send` for the other.
    """

    job: int
    picture: NDArray[np.uint8]
    last: bool


@dataclass(frozen=True)
class Detected:
    """The pipeline's answer: the likely cells of each picture. The only word to a worker besides its next job."""

    job: int
    cells: tuple[Cells, ...]


@dataclass(frozen=True)
class Done:
    """Everything wanted of the clip has been sent."""

    job: int


@dataclass(frozen=True)
class Failed:
    """The clip cannot be used. `stage` is where: open, labels, audio, faces, worker, encode or commit."""

    job: int
    stage: str
    error: str
    message: str


@dataclass(frozen=True)
class Alive:
    """Nothing to tell yet, but the work goes on. The pool keeps it to itself."""

    job: int


Message = Clock | Sound | SoundEnd | Face | FacesEnd | Detect | Done | Failed
