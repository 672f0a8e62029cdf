"""What one clip of a data set is, in numbers: its picture, its sound, its crops. Nothing is judged here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Clip
from vaflow.errors import MediaError
from vaflow.extract.audio import SILENT_PEAK, decode_audio
from vaflow.extract.crops import list_crops, read_crop
from vaflow.extract.doctor.strips import runs, strip
from vaflow.extract.media import MediaInfo, frame_times, probe
from vaflow.extract.stills import open_stills
from vaflow.timeline import median_interval

AUDIO_SLACK = 0.5  # seconds of the picture that may be without sound before it is called partial
OPENED_CROPS = 3  # of a clip: the first, the middle, the last

AudioCover = Literal["none", "unreadable", "silent", "partial", "whole"]


@dataclass(frozen=True)
class MediaFacts:
    """The video that a clip is taken from.

    Attributes:
        frames: pictures that decoding shows.
        duration: seconds: the last frame's time and one median interval.
        interval: median seconds between frames.
        nominal_rate, average_rate: frames per second, as claimed and as counted.
        drift: seconds by which a frame's time differs at most from its number divided by the average rate.
        gap: seconds between two successive frames at most.
        audio: "partial" where more than half a second of the picture is before or after the sound; "silent" where no
            sample reaches -80 dBFS; "unreadable" where nothing decodes.
        audio_span: (start, end) of the sound in seconds, or None where there is none or the container does not say.
    """

    frames: int
    duration: float
    interval: float
    nominal_rate: float | None
    average_rate: float | None
    drift: float
    gap: float
    audio: AudioCover
    audio_span: tuple[float, float] | None


@dataclass(frozen=True)
class CropFacts:
    """Face crops.

    Attributes:
        found: files; `beyond` of them lie after the video's last frame; `last` is the last one's number.
        missing: frames of the video without one; `longest` of them in a row.
        damaged: names of files that cannot be read as pictures, of the few that were opened.
        strip: [BINS] uint8, the share of frames with a crop in each stretch of the clip, 255 for all of them.
    """

    found: int
    missing: int
    beyond: int
    last: int
    longest: int = 0
    damaged: tuple[str, ...] = ()
    strip: bytes = b""


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
    facts = MediaFacts(times.size, duration, interval, nominal, average, drift(times), widest(times), audio, span)
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
    duration = float(times[-1]) + interval
    audio, span = ("none", None) if clip.audio is None else _audio_cover(probe(clip.audio), duration)
    facts = MediaFacts(times.size, duration, interval, rate, rate, drift(times), widest(times), audio, span)
    return facts, times, times.size - pictures


def drift(times: NDArray[np.float64]) -> float:
    """Seconds by which frame number / average rate misses a presentation time at most; 0 for a constant rate."""
    return float(np.abs(times - np.linspace(times[0], times[-1], times.size)).max()) if times.size > 1 else 0.0


def widest(times: NDArray[np.float64]) -> float:
    """Seconds between two successive frames at most; 0 for a single one."""
    return float(np.diff(times).max()) if times.size > 1 else 0.0


def _audio_cover(info: MediaInfo, duration: float) -> tuple[AudioCover, tuple[float, float] | None]:
    if info.audio is None:
        return "none", None
    span = None
    if info.audio.duration is not None:
        span = (info.audio.start, info.audio.start + info.audio.duration)
    heard = _heard(info, duration)
    if heard != "whole" or span is None:
        return heard, span
    silent = max(0.0, span[0]) + max(0.0, duration - span[1])
    return ("partial" if silent > AUDIO_SLACK else "whole"), span


def _heard(info: MediaInfo, duration: float) -> Literal["unreadable", "silent", "whole"]:
    """Decodes up to the first thing that can be heard: a moment of most files, all of a silent one."""
    blocks = decode_audio(info.path, start=info.start, duration=duration)
    while True:
        try:
            if float(np.abs(next(blocks)).max(initial=0.0)) >= SILENT_PEAK:
                return "whole"
        except StopIteration as end:
            return "unreadable" if end.value.status in ("absent", "unreadable") else "silent"


def crop_facts(folders: Sequence[Path], times: NDArray[np.float64]) -> CropFacts:
    """Count crops against the video's frames, and open a few; `times` [N], none where the video cannot be used.

    Raises:
        OSError: a folder cannot be read.
    """
    crops = list_crops(folders)
    numbers = np.array(list(crops), np.int64)
    last = int(numbers[-1]) + 1 if numbers.size else 0
    damaged = tuple(path.name for path in some(list(crops.values()), OPENED_CROPS) if not _opens(path))
    if not times.size:
        return CropFacts(numbers.size, 0, 0, last, damaged=damaged)
    inside = numbers[numbers < times.size]
    there = np.zeros(times.size, bool)
    there[inside] = True
    longest = max((stop - start for start, stop in runs(~there)), default=0)
    shown = strip(times, there, float(times[-1]) + median_interval(times))
    beyond = numbers.size - inside.size
    return CropFacts(numbers.size, times.size - inside.size, beyond, last, longest, damaged, shown)


def some(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly from the first to the last."""
    chosen = np.unique(np.linspace(0, max(len(paths) - 1, 0), count).astype(int))
    return [paths[k] for k in chosen] if paths else []


def _opens(path: Path) -> bool:
    try:
        read_crop(path)
    except MediaError:
        return False
    return True
