"""Measure one clip: frames, audio, crops, labels and people, in numbers. `findings` interprets them.

People and cuts are looked for in a few short parts of each clip. Extraction looks at two frames of every second; a
check compares at most 52 frames of a clip and detects faces in eight: it sees short clips whole, and of long ones what
is usual. A cache that was extracted from the clip has counted all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from vaflow.cache import Cache
from vaflow.cache.schema import FACES
from vaflow.datasets.clip import Annotation, Clip, person_item
from vaflow.datasets.labels import clock_gap, clock_problem, on_clock
from vaflow.errors import MediaError
from vaflow.extract.audio import SILENT_PEAK, decode_audio
from vaflow.extract.container import audio_clock, decode, frame_times, opened
from vaflow.extract.decoding_pool import Failed, each
from vaflow.extract.faces.crops import MIN_CLEAR_SCORE, MIN_CLEAR_SIZE, quarter_turn
from vaflow.extract.faces.detection import shared_detector
from vaflow.extract.faces.tracking import CutDetector
from vaflow.extract.source_files import list_crops, open_stills, read_crop
from vaflow.extract.video import MediaInfo, VideoInfo, probe, to_rgb
from vaflow.timeline import median_interval

BINS = 240  # of a coverage bar
BORDER = 0.33  # of the regions, half-way between the default centers of `vaflow train` (0.66)
CELLS = 24  # of the density of labels, per dimension
AUDIO_SLACK = 0.5  # seconds of the video that may lack audio before the audio is called partial
OPENED_CROPS = 3  # of a clip: the first, the middle, the last
PARTS = 4  # of a clip, evenly distributed, in which people and cuts are looked for
PART_SECONDS = 6.0
STEP = 0.5  # seconds between two frames that are compared
DETECTED = (0, 4)  # of the frames of a part: those in which faces are detected
MAX_DECODED = 600  # frames of a part, with those between the keyframe before and its beginning
MAX_CLIPS = 100
_MICROSECONDS = 1_000_000


def coverage(times: NDArray[np.float64], flags: NDArray[np.bool_], duration: float) -> bytes:
    """[BINS] uint8: the share of true flags in each of `BINS` equal parts of a clip; a flag holds until the next.

    Args:
        times: [N] seconds, ascending, N >= 1.
        flags: [N].
        duration: seconds of the clip.
    """
    position = np.clip((times * (BINS / duration)).astype(np.int64), 0, BINS - 1)
    count = np.bincount(position, minlength=BINS)
    middles = (np.arange(BINS) + 0.5) * (duration / BINS)
    held = flags[np.clip(np.searchsorted(times, middles, "right") - 1, 0, None)]
    share = np.bincount(position, flags, minlength=BINS) / np.maximum(count, 1)
    return bytes(np.rint(255 * np.where(count > 0, share, held)).astype(np.uint8))


def spans(flags: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """(first, last + 1) of every sequence of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


@dataclass(frozen=True)
class LabelStats:
    """Sums over annotated frames, per dimension [2], per region [9] (3 * valence level + arousal level), and per cell.

    `density` [CELLS, CELLS] counts frames by valence (rows) and arousal (columns), both from -1 to 1.
    """

    count: NDArray[np.int64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    regions: NDArray[np.int64]
    density: NDArray[np.int64]


@dataclass(frozen=True)
class LabelFacts:
    """An annotation.

    Attributes:
        rows: rows of the file.
        clock: "row" (row k is frame k), "frame" or "time".
        end: 1 + the last row's frame number, or its time in seconds.
        unannotated: (first, last + 1) rows of every sequence without any annotation.
        half: rows annotated in one of two dimensions.
        constant: dimensions with one value throughout.
        frames: frames of the video, or rows if there are more.
        annotated: those of them that have a value in any dimension.
        stats: over these frames.
        coverage: [BINS] uint8, the annotated share of each part of the clip, 255 for all of it.
        clock_gap: largest distance in seconds of a frame's time from the one that the file states beside its number.
        problem: of `vaflow.datasets.labels.clock_problem`.
    """

    rows: int
    clock: Literal["row", "frame", "time"]
    end: float
    unannotated: tuple[tuple[int, int], ...]
    half: int
    constant: tuple[str, ...]
    frames: int
    annotated: int
    stats: LabelStats
    coverage: bytes
    clock_gap: float = 0.0
    problem: str = ""


def label_facts(annotation: Annotation, times: NDArray[np.float64]) -> LabelFacts:
    """Measure an annotation; `times` [N] are the clip's frame times, empty if the video cannot be used."""
    finite = np.isfinite(annotation.value)
    value = annotation.value.astype(np.float64)
    columns = zip(("valence", "arousal"), (column[np.isfinite(column)] for column in value.T), strict=True)
    constant = [name for name, known in columns if known.size > 1 and (known == known[0]).all()]
    clock: Literal["row", "frame", "time"] = "row"
    end = float(len(value))
    if annotation.time is not None:
        clock, end = "time", float(annotation.time[-1])
    elif annotation.frame is not None:
        clock = "row" if np.array_equal(annotation.frame, np.arange(len(value))) else "frame"
        end = float(annotation.frame[-1] + 1)
    on_frames = on_clock(annotation, times)
    clock_times, valid = on_frames["time"], np.asarray(on_frames["valid"].any(1))
    whole = float(clock_times[-1]) + median_interval(clock_times) if len(clock_times) else 0.0
    return LabelFacts(
        rows=len(value),
        clock=clock,
        end=end,
        unannotated=spans(np.asarray(np.isnan(value).all(1))),
        half=int((finite.sum(1) == 1).sum()) if len(annotation.targets) == 2 else 0,
        constant=tuple(name for name in constant if name in annotation.targets),
        frames=len(valid),
        annotated=int(valid.sum()),
        stats=label_stats(on_frames["value"].astype(np.float64)),
        coverage=coverage(clock_times, valid, whole) if len(valid) else b"",
        clock_gap=clock_gap(annotation, times),
        problem=clock_problem(annotation, times),
    )


def label_stats(value: NDArray[np.float64]) -> LabelStats:
    """Sums of [N, 2] labels, NaN where not annotated; a region counts frames that have both dimensions."""
    finite = np.isfinite(value)
    filled = np.where(finite, value, 0.0)
    both = value[finite.all(1)]
    stored = both.astype(np.float32)  # as in the cache: a label on a border is in the lower region, as in training
    level = (stored > -BORDER).astype(np.int64) + (stored > BORDER)
    cell = np.clip(np.floor((both + 1) * (CELLS / 2)), 0, CELLS - 1).astype(np.int64)
    return LabelStats(
        count=finite.sum(0),
        total=filled.sum(0),
        squares=(filled**2).sum(0),
        low=np.where(finite, value, np.inf).min(0, initial=np.inf),
        high=np.where(finite, value, -np.inf).max(0, initial=-np.inf),
        regions=np.bincount(3 * level[:, 0] + level[:, 1], minlength=9),
        density=np.bincount(CELLS * cell[:, 0] + cell[:, 1], minlength=CELLS**2).reshape(CELLS, CELLS),
    )


def merge_stats(parts: Sequence[LabelStats]) -> LabelStats:
    """The sums over several clips."""
    parts = [label_stats(np.empty((0, 2))), *parts]
    merge = {"low": np.min, "high": np.max}
    names = [field.name for field in fields(LabelStats)]
    return LabelStats(**{name: merge.get(name, np.sum)([getattr(part, name) for part in parts], 0) for name in names})


AudioCover = Literal["none", "unreadable", "silent", "partial", "whole"]


@dataclass(frozen=True)
class MediaFacts:
    """The media of a clip.

    Attributes:
        frames: frames that decode; of audio alone, rows of its clock.
        duration: seconds: the last frame's time and one median interval.
        interval: median seconds between frames.
        nominal_rate, average_rate: frames per second, as claimed and as counted.
        drift: seconds by which a frame's time differs at most from its number divided by the average rate.
        gap: seconds between two successive frames at most.
        audio: "partial" if more than half a second of the video is before or after the audio; "silent" if no sample
            reaches -80 dBFS; "unreadable" if nothing decodes.
        audio_span: (start, end) of the audio in seconds; None if it is missing or the container does not say.
        transfer: "PQ" or "HLG" for high dynamic range video, which is read without tone mapping.
        pixel_aspect: width / height of a stored pixel, as "4/3"; "1" for square pixels.
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
    transfer: str = ""
    pixel_aspect: str = "1"


@dataclass(frozen=True)
class CropFacts:
    """Face crops.

    Attributes:
        found: crop files; `beyond` of them lie after the video's last frame; `last` is the last one's number.
        missing: frames of the video without a crop; `longest` of them in a row.
        damaged: names of files that do not decode, of the few that were opened.
        coverage: [BINS] uint8, the share of frames with a crop in each part of the clip, 255 for all of them.
    """

    found: int
    missing: int
    beyond: int
    last: int
    longest: int = 0
    damaged: tuple[str, ...] = ()
    coverage: bytes = b""


def media_facts(path: Path, audio_path: Path | None = None) -> tuple[MediaFacts, NDArray[np.float64]]:
    """Facts and frame times [N] in seconds of a video, from its headers and packets. `audio_path`: a separate file.

    Raises:
        MediaError: it cannot be used.
    """
    info = probe(path)
    times = frame_times(path)
    average = (times.size - 1) / float(times[-1] - times[0]) if times[-1] > times[0] else None
    return _facts(times, info.video, average, info if audio_path is None else probe(audio_path)), times


def audio_facts(path: Path) -> tuple[MediaFacts, NDArray[np.float64]]:
    """As `media_facts`, for a file with audio alone, whose clock has `AUDIO_ROWS` rows per second."""
    times = audio_clock(path)
    return _facts(times, None, None, probe(path)), times


def still_facts(clip: Clip) -> tuple[MediaFacts, NDArray[np.float64], int]:
    """As `media_facts`, for a folder of numbered images; and how many frames up to the last one have no image."""
    info, times = open_stills(clip)
    images, rate = (info.video.frames, info.video.nominal_rate) if info.video else (0, None)
    return _facts(times, info.video, rate, probe(clip.audio) if clip.audio else None), times, times.size - images


def _facts(
    times: NDArray[np.float64], video: VideoInfo | None, average_rate: float | None, audio_of: MediaInfo | None
) -> MediaFacts:
    interval = median_interval(times)
    duration = float(times[-1]) + interval
    audio: AudioCover = "none"
    span = None
    if audio_of is not None and audio_of.audio is not None:
        audio, sound = _loudness_status(audio_of, duration), audio_of.audio
        if sound.duration is not None:
            span = (sound.start, sound.start + sound.duration)
            silent = max(0.0, span[0]) + max(0.0, duration - span[1])
            audio = "partial" if audio == "whole" and silent > AUDIO_SLACK else audio
    return MediaFacts(
        frames=times.size,
        duration=duration,
        interval=interval,
        nominal_rate=video.nominal_rate if video else None,
        average_rate=average_rate,
        drift=drift(times) if video else 0.0,
        gap=float(np.diff(times).max()) if video and times.size > 1 else 0.0,
        audio=audio,
        audio_span=span,
        transfer=video.transfer if video else "",
        pixel_aspect=str(video.pixel_aspect) if video else "1",
    )


def drift(times: NDArray[np.float64]) -> float:
    """Seconds by which frame number / average rate misses a presentation time at most; 0 for a constant rate."""
    return float(np.abs(times - np.linspace(times[0], times[-1], times.size)).max()) if times.size > 1 else 0.0


def _loudness_status(info: MediaInfo, duration: float) -> Literal["unreadable", "silent", "whole"]:
    """Decode up to the first audible sample: a moment of most files, all of a silent one."""
    blocks = decode_audio(info.path, start=info.start, duration=duration)
    while True:
        try:
            if float(np.abs(next(blocks)).max(initial=0.0)) >= SILENT_PEAK:
                return "whole"
        except StopIteration as end:
            return "unreadable" if end.value.status in ("absent", "unreadable") else "silent"


def crop_facts(folders: Sequence[Path], times: NDArray[np.float64]) -> CropFacts:
    """Count crops against the video's frames, and open a few; `times` [N] are empty if the video cannot be used.

    Raises:
        OSError: a folder cannot be read.
    """
    crops = list_crops(folders)
    numbers = np.array(list(crops), np.int64)
    last = int(numbers[-1]) + 1 if numbers.size else 0
    damaged: tuple[str, ...] = ()
    for path in some(list(crops.values()), OPENED_CROPS):
        try:
            read_crop(path)
        except MediaError:
            damaged += (path.name,)
    if not times.size:
        return CropFacts(numbers.size, 0, 0, last, damaged=damaged)
    inside = numbers[numbers < times.size]
    present = np.zeros(times.size, bool)
    present[inside] = True
    longest = max((stop - start for start, stop in spans(~present)), default=0)
    shown = coverage(times, present, float(times[-1]) + median_interval(times))
    beyond = numbers.size - inside.size
    return CropFacts(numbers.size, times.size - inside.size, beyond, last, longest, damaged, shown)


def some(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly from the first to the last."""
    chosen = np.unique(np.linspace(0, max(len(paths) - 1, 0), count).astype(int))
    return [paths[k] for k in chosen] if paths else []


@dataclass(frozen=True)
class PeopleFacts:
    """People and cuts of a clip.

    Attributes:
        people: most faces in one frame; of a cache, people with at least a tenth of the clear faces of the first.
        cuts: shot boundaries.
        frames: frames that were compared; 0: all sampled frames of an extraction.
        turned: degrees clockwise by which most faces are turned.
    """

    people: int
    cuts: int
    frames: int
    turned: int = 0


def look_at_people(clips: Sequence[tuple[Clip, float]], extracted: Cache | None = None) -> dict[str, PeopleFacts]:
    """Clip id -> its people and cuts, of at most `MAX_CLIPS` clips that are not in a cache, evenly chosen.

    Args:
        clips: with their durations in seconds; those with crops or without video are left out.
        extracted: a cache, whose stream of faces is taken where it has one.
    """
    known, rest = {}, []
    for clip, duration in clips:
        if clip.crops or clip.video is None:
            continue
        facts = None if extracted is None else _extracted_facts(extracted, clip.id)
        if facts is None:
            rest.append((clip.id, clip.video, duration))
        else:
            known[clip.id] = facts
    chosen = rest[:: -(-len(rest) // MAX_CLIPS)] if rest else []
    for number, looked in each(_look, chosen):
        if isinstance(looked, PeopleFacts):
            known[chosen[number][0]] = looked
    return known


def _extracted_facts(extracted: Cache, clip: str) -> PeopleFacts | None:
    if FACES not in extracted.streams():
        return None
    item = next((name for name in (clip, person_item(clip, 1)) if extracted.has(FACES, name)), None)
    meta = {} if item is None else extracted.record(FACES, item).meta
    people, cuts = meta.get("notable", meta.get("people")), meta.get("cuts")
    if item is None or not isinstance(people, int) or not isinstance(cuts, int):
        return None
    return PeopleFacts(people, cuts, 0, quarter_turn(extracted.read(FACES, item, ["landmarks"]).landmarks))


def _look(arguments: tuple[str, Path, float]) -> PeopleFacts | Failed | None:
    _, path, duration = arguments
    people = cuts = frames = 0
    landmarks = []
    try:
        for part in range(PARTS):
            cut, start = CutDetector(), part * duration / PARTS
            # The first frame of the next part belongs to this one as well: a cut may lie between them.
            end = start + min(PART_SECONDS, duration / PARTS) + STEP / 2
            for number, image in enumerate(_part(path, start, end)):
                cuts += cut.update(image) >= 1
                frames += 1
                if number in DETECTED:
                    faces = shared_detector().detect(image)
                    landmarks += [face.landmarks for face in faces]
                    people = max(people, sum(f.score >= MIN_CLEAR_SCORE and f.size >= MIN_CLEAR_SIZE for f in faces))
    except (MediaError, OSError, FFmpegError):
        return None  # the clip has a finding about it
    turned = quarter_turn(np.array(landmarks)) if landmarks else 0
    return PeopleFacts(people, cuts, frames, turned)


def _part(path: Path, start: float, end: float) -> Iterator[NDArray[np.uint8]]:
    """Frames of the clip from `start` to `end` seconds."""
    with opened(path) as media:  # opened again each time: a decoder must not seek once it runs
        stream = media.need_video()
        media.container.seek(round((start + media.start) * _MICROSECONDS))
        due = start
        for number, frame in enumerate(decode(media, stream)):
            time = -np.inf if frame.time is None else frame.time - media.start
            if time > end or number == MAX_DECODED:
                return
            if time >= due - 1e-6:
                due += STEP
                yield to_rgb(frame, media.pixel_aspect)
