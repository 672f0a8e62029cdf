"""What one clip of a data set is, in numbers: its picture, its sound, its labels, its crops. Nothing is judged here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation, Clip
from vaflow.datasets.labels import on_clock
from vaflow.extract.crops import list_crops
from vaflow.extract.media import MediaInfo, frame_times, probe
from vaflow.extract.stills import open_stills
from vaflow.timeline import median_interval

AUDIO_SLACK = 0.5  # seconds of the picture that may be without sound before it is called partial
LEVEL_EDGES = (-1 / 3, 1 / 3)  # thirds of the range [-1, 1]

AudioCover = Literal["none", "partial", "whole"]


@dataclass(frozen=True)
class MediaFacts:
    """The video that a clip is taken from.

    Attributes:
        frames: pictures that decoding shows.
        duration: seconds: the last frame's time and one median interval.
        interval: median seconds between frames.
        nominal_rate, average_rate: frames per second, as claimed and as counted.
        drift: seconds by which a frame's time differs at most from its number divided by the average rate.
        audio: "partial" where more than half a second of the picture is before or after the sound.
        audio_span: (start, end) of the sound in seconds, or None where there is none or the container does not say.
    """

    frames: int
    duration: float
    interval: float
    nominal_rate: float | None
    average_rate: float | None
    drift: float
    audio: AudioCover
    audio_span: tuple[float, float] | None


@dataclass(frozen=True)
class LabelStats:
    """Sums over annotated frames, per dimension [2] and per region [9] (3 * valence level + arousal level)."""

    count: NDArray[np.int64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    regions: NDArray[np.int64]


@dataclass(frozen=True)
class LabelFacts:
    """An annotation.

    Attributes:
        rows: rows of the file.
        clock: "row" (row k is frame k), "frame" or "time".
        end: 1 + the last row's frame number, or its time in seconds.
        runs: (first, last + 1) rows of every stretch without any annotation.
        half: rows annotated in one of two dimensions only.
        constant: dimensions that never change.
        frames: of the clip's clock: the video's, or rows where there are more.
        annotated: those of them that have a value in any dimension.
        stats: over these frames.
    """

    rows: int
    clock: Literal["row", "frame", "time"]
    end: float
    runs: tuple[tuple[int, int], ...]
    half: int
    constant: tuple[str, ...]
    frames: int
    annotated: int
    stats: LabelStats


@dataclass(frozen=True)
class CropFacts:
    """Face crops: files found, frames of the video without one, files beyond its last frame, the last file's number."""

    found: int
    missing: int
    beyond: int
    last: int


def media_facts(path: Path, sound: Path | None = None) -> tuple[MediaFacts, NDArray[np.float64]]:
    """Read the headers and frame times of a video; the times, [N] seconds, come along. `sound`: a file of its own.

    Raises:
        MediaError: it cannot be used.
    """
    info = probe(path)
    times = frame_times(path, info=info)
    interval = median_interval(times)
    duration = float(times[-1]) + interval
    average = (times.size - 1) / float(times[-1] - times[0]) if times[-1] > times[0] else None
    audio, span = _audio_cover(info if sound is None else probe(sound), duration)
    nominal = info.video.nominal_rate if info.video else None
    facts = MediaFacts(times.size, duration, interval, nominal, average, drift(times), audio, span)
    return facts, times


def still_facts(clip: Clip) -> tuple[MediaFacts, NDArray[np.float64], int]:
    """As `media_facts`, of a folder of numbered pictures; and how many frames up to the last one have no picture.

    Raises:
        MediaError: it cannot be used.
    """
    info, times = open_stills(clip)
    interval = median_interval(times)
    rate = info.video.nominal_rate if info.video else None
    pictures = info.video.frames if info.video else 0
    audio: AudioCover = "none" if clip.audio is None else "whole"
    facts = MediaFacts(times.size, float(times[-1]) + interval, interval, rate, rate, drift(times), audio, None)
    return facts, times, times.size - pictures


def drift(times: NDArray[np.float64]) -> float:
    """Seconds by which frame number / average rate misses a presentation time at most; 0 for a constant rate."""
    return float(np.abs(times - np.linspace(times[0], times[-1], times.size)).max()) if times.size > 1 else 0.0


def _audio_cover(info: MediaInfo, duration: float) -> tuple[AudioCover, tuple[float, float] | None]:
    if info.audio is None:
        return "none", None
    if info.audio.duration is None:
        return "whole", None
    start, end = info.audio.start, info.audio.start + info.audio.duration
    silent = max(0.0, start) + max(0.0, duration - end)
    return ("partial" if silent > AUDIO_SLACK else "whole"), (start, end)


def label_facts(annotation: Annotation, times: NDArray[np.float64]) -> LabelFacts:
    """Measure an annotation; `times` [N] are the clip's frame times, none where the video cannot be used."""
    given = np.isfinite(annotation.value)
    value = annotation.value.astype(np.float64)
    constant = [name for name, column in zip(("valence", "arousal"), value.T, strict=True) if _is_constant(column)]
    clock: Literal["row", "frame", "time"] = "row"
    end = float(len(value))
    if annotation.time is not None:
        clock, end = "time", float(annotation.time[-1])
    elif annotation.frame is not None:
        clock = "row" if np.array_equal(annotation.frame, np.arange(len(value))) else "frame"
        end = float(annotation.frame[-1] + 1)
    on_frames = on_clock(annotation, times)
    return LabelFacts(
        rows=len(value),
        clock=clock,
        end=end,
        runs=runs(np.asarray(np.isnan(value).all(1))),
        half=int((given.sum(1) == 1).sum()) if len(annotation.targets) == 2 else 0,
        constant=tuple(name for name in constant if name in annotation.targets),
        frames=len(on_frames["time"]),
        annotated=int(on_frames["valid"].any(1).sum()),
        stats=label_stats(on_frames["value"].astype(np.float64)),
    )


def _is_constant(column: NDArray[np.float64]) -> bool:
    known = column[np.isfinite(column)]
    return known.size > 1 and bool((known == known[0]).all())


def runs(flags: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """(first, last + 1) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def label_stats(value: NDArray[np.float64]) -> LabelStats:
    """Sums of [N, 2] labels, NaN where there is none; a region counts frames that have both dimensions."""
    given = np.isfinite(value)
    filled = np.where(given, value, 0.0)
    level = np.digitize(value[given.all(1)], LEVEL_EDGES)
    return LabelStats(
        count=given.sum(0),
        total=filled.sum(0),
        squares=(filled**2).sum(0),
        low=np.where(given, value, np.inf).min(0, initial=np.inf),
        high=np.where(given, value, -np.inf).max(0, initial=-np.inf),
        regions=np.bincount(3 * level[:, 0] + level[:, 1], minlength=9),
    )


def merge_stats(parts: Sequence[LabelStats]) -> LabelStats:
    """The sums over several clips."""
    parts = [label_stats(np.empty((0, 2))), *parts]
    return LabelStats(
        count=np.sum([part.count for part in parts], 0),
        total=np.sum([part.total for part in parts], 0),
        squares=np.sum([part.squares for part in parts], 0),
        low=np.min([part.low for part in parts], 0),
        high=np.max([part.high for part in parts], 0),
        regions=np.sum([part.regions for part in parts], 0),
    )


def crop_facts(folders: Sequence[Path], frames: int | None) -> CropFacts:
    """Count crops against the video's frames; `frames` is None where the video cannot be used.

    Raises:
        OSError: a folder cannot be read.
    """
    numbers = np.array(list(list_crops(folders)), np.int64)
    last = int(numbers[-1]) + 1 if numbers.size else 0
    if frames is None:
        return CropFacts(numbers.size, 0, 0, last)
    inside = int((numbers < frames).sum())
    return CropFacts(numbers.size, frames - inside, numbers.size - inside, last)
