"""Messages between decoding processes and the pipeline: plain data without torch or cache types."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Clip
from vaflow.encoders.preprocessing import Preparation, Prepared
from vaflow.extract.config import too_much_memory
from vaflow.extract.faces.detection import Cells
from vaflow.timeline import Grid


@dataclass(frozen=True)
class StoredPerson:
    """A person whose crops a cache holds.

    Attributes:
        cache: its path or URL; item: the item with the crops.
        stream: a stream of images of that item, whose samples are those of the features.
        person: number of the person.
        facts: members of the features' record.
    """

    cache: str
    item: str
    stream: str
    person: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One clip to read.

    Attributes:
        number: of the job; every message about it carries the number.
        audio, faces: which parts to read, besides the clock and the labels.
        person, identity: who is estimated, and the network that tells people apart, as in the settings.
        face_source: "auto" (crops where the clip has them, else detection), "centerface" or "none" (whole frames).
        preparations: the inputs that the visual encoders expect.
        keep_jpeg: send the JPEG of every crop along.
        keep_everyone: send the JPEG of every face, where the clip shows several people.
        decode_on: the GPU that decodes frames; empty for PyAV.
        stored: read the crops of this person from a cache; no media file is read.
        ask: images per question to the parent's face detector; 0: the worker detects faces itself.
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
    person: str = "largest"  # "all": everyone is read
    identity: str = "none"
    stored: StoredPerson | None = None
    keep_everyone: bool = False


@dataclass(frozen=True)
class PersonLabels:
    """Labels of one person: arrays of the labels stream, and the members of its record that differ between people."""

    arrays: dict[str, NDArray[Any]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Clock:
    """First message of a clip: its labels on its frame clock, and the identity of its sources.

    Attributes:
        labels: arrays of the labels stream (`vaflow.cache.schema.KINDS`).
        duration: seconds; last frame's presentation time plus the median interval.
        sources: part -> identity, for "video", "audio", "crops", "labels" where present.
        facts: further members of the labels record: frames, rows, rates, sizes.
        people: number -> labels of that person, if everyone is read and the person has labels.
        label_problem: why labels may not belong to the clip, of `vaflow.datasets.labels.clock_problem`.
    """

    job: int
    labels: dict[str, NDArray[Any]]
    duration: float
    sources: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    people: dict[int, PersonLabels] = field(default_factory=dict)
    label_problem: str = ""


@dataclass(frozen=True)
class AudioBlock:
    """The next block of the clip's audio: [n] float32, 16 kHz mono, without gaps from time 0."""

    job: int
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class AudioEnd:
    """End of the audio. `covered`: the (start, stop) seconds that came from the file; the rest are zeros."""

    job: int
    covered: tuple[tuple[float, float], ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Face:
    """The crop of one grid sample: preparation -> [size, size, 3], and its JPEG if it is kept.

    Crops of a person are sent in the order of their samples. `person`: number, if everyone is read, else 0.
    """

    job: int
    sample: int
    images: dict[Preparation, Prepared]
    jpeg: bytes | None
    person: int = 0


@dataclass(frozen=True)
class FaceCrop:
    """The JPEG of the next row of the faces stream; sent for every row or for none."""

    job: int
    jpeg: bytes


@dataclass(frozen=True)
class FacesEnd:
    """End of the crops.

    Attributes:
        frame: [T] 0-based video frame of every grid sample, with or without a face.
        everyone: arrays of the faces stream; None if the faces were not detected.
        people: number of people whose crops were sent, if everyone is read.
    """

    job: int
    frame: NDArray[np.int64]
    facts: dict[str, Any]
    everyone: dict[str, NDArray[Any]] | None = None
    people: int = 0


@dataclass(frozen=True)
class Detect:
    """Question to the parent's face detector: one image [h, w, 3] uint8, prepared for the network.

    Images of a question have one size and are sent one by one: a pipe takes small messages several times as fast.
    After the `last` one the worker only reads until the answer arrives, so that neither side blocks in `send`.
    """

    job: int
    image: NDArray[np.uint8]
    last: bool


@dataclass(frozen=True)
class Detected:
    """Answer to `Detect`: the likely cells of each image. The only message to a worker besides its next job."""

    job: int
    cells: tuple[Cells, ...]


@dataclass(frozen=True)
class Done:
    """End of a clip: everything needed of it has been sent."""

    job: int


@dataclass(frozen=True)
class Failed:
    """The clip cannot be used. `stage` is one of open, labels, audio, faces, worker, encode or commit."""

    job: int
    stage: str
    error: str
    message: str

    @classmethod
    def by(cls, error: Exception, job: int, stage: str) -> "Failed":
        """The message for an error of a clip."""
        message = too_much_memory() if isinstance(error, MemoryError) else str(error) or repr(error)
        return cls(job, stage, type(error).__name__, message)


@dataclass(frozen=True)
class Alive:
    """Heartbeat of a worker; not forwarded by the pool."""

    job: int


Message = Clock | AudioBlock | AudioEnd | Face | FaceCrop | FacesEnd | Detect | Done | Failed
