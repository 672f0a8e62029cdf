"""The media and the data of one clip for its page: file, audio level, masks, face boxes, scores and traces."""

import base64
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import ArrayLike, NDArray

from vaflow.cache import Cache
from vaflow.cache.schema import FACES
from vaflow.datasets.clip import clip_and_person
from vaflow.datasets.files import walk
from vaflow.errors import CacheError
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.video import to_rgb
from vaflow.timeline import Floats, median_interval
from vaflow.train.metrics import concordance, rmse
from vaflow.viewer import DIMENSIONS, PredictedClip, Predictions

log = logging.getLogger(__name__)

# fmt: off
EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp", ".ogv",
    ".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus",
)
# fmt: on
CONTAINERS = frozenset({"mp4", "webm", "wav", "mp3", "ogg", "flac"})  # that Chromium, Firefox and Safari open
VIDEO_CODECS = frozenset({"h264", "vp8", "vp9", "av1"})
AUDIO_CODECS = frozenset({"aac", "mp3", "opus", "vorbis", "flac", "pcm_s16le"})
RATE = 16_000  # samples per second for the waveform
HOP = 320  # samples per waveform column: 20 ms
_MIN_RANGE, _QUIET = 10.0, -50.0  # dB: a smaller range has no pauses; a lower level is silence
STEP = 0.5  # seconds between detections, as in the default sampling of `vaflow extract`
UNREADABLE = (OSError, av.FFmpegError)


@dataclass(frozen=True)
class Facts:
    """Facts from a container: codecs ("" for a missing stream), pixel format, duration."""

    container: str
    video: str
    audio: str
    pixels: str
    seconds: float

    @property
    def playable(self) -> bool:
        """Whether current browsers play the file as it is."""
        return (
            not CONTAINERS.isdisjoint(self.container.split(","))
            and self.container.split(",")[0] != "matroska"
            and (not self.video or (self.video in VIDEO_CODECS and self.pixels in ("yuv420p", "yuvj420p")))
            and (not self.audio or self.audio in AUDIO_CODECS)
        )


class MediaIndex:
    """Media files below some directories, by name. Files are compared by the size that the cache recorded."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self._by_name: dict[str, list[Path]] = {}
        for root in roots:
            paths = [root]
            if not root.is_file():
                entries = ((folder, entry.name) for folder, files in walk(root) for entry in files)
                paths = [folder / name for folder, name in entries if name.lower().endswith(EXTENSIONS)]
            for path in paths:
                self._by_name.setdefault(path.name, []).append(path)

    @property
    def files(self) -> list[Path]:
        """All files, sorted."""
        return sorted(path for paths in self._by_name.values() for path in paths)

    def find(self, clip: PredictedClip) -> Path | None:
        """Return the clip's media file, or None.

        In this order: the path that `predict` recorded, a file with the name and size that the cache recorded, a file
        whose stem is the clip's id.
        """
        recorded = clip.source.get("media")
        if isinstance(recorded, str) and Path(recorded).is_file():
            return Path(recorded)
        for source in clip.records():
            for facts in (source.get("video"), source.get("audio")):
                if isinstance(facts, Mapping):
                    for path in self._by_name.get(str(facts.get("name")), ()):
                        if path.stat().st_size == facts.get("size"):
                            return path
        stems = {name.rsplit("/", 1)[-1] for name in (clip.item, clip_and_person(clip.item)[0])}
        same = [path for name, paths in self._by_name.items() if stems & {name, Path(name).stem} for path in paths]
        return same[0] if len(same) == 1 and not any(clip.records()) else None


def probe(path: Path) -> Facts:
    """Return the codecs, pixel format and duration of a media file.

    Raises:
        OSError, av.FFmpegError: the file cannot be opened.
    """
    with av.open(str(path), metadata_errors="replace") as media:
        audio = media.streams.audio[0].codec_context.codec.canonical_name if media.streams.audio else ""
        name = media.format.name
        if "matroska" in name:
            name = "webm" if path.suffix.lower() == ".webm" else "matroska"
        context = media.streams.video[0].codec_context if media.streams.video else None
        video, pixels = ("", "") if context is None else (context.codec.canonical_name, str(context.pix_fmt))
        return Facts(name, video, audio, pixels, (media.duration or 0) / av.time_base)


def decoded(media: Any, streams: Any) -> Iterator[tuple[Any, Any]]:
    """Every frame of some streams of an open file, after its stream; damaged packets are skipped, as browsers do."""
    for packet in media.demux(streams):
        try:
            frames: list[Any] = list(packet.decode())
        except av.FFmpegError:
            continue
        for frame in frames:
            yield packet.stream, frame


@dataclass(frozen=True)
class AudioLevel:
    """The audio of a clip in columns of 20 ms.

    Attributes:
        low, high: [N] int8, extreme samples of each column, full scale at 127.
        speech: [M, 2] seconds: spans whose energy is above the threshold.
    """

    low: NDArray[np.int8]
    high: NDArray[np.int8]
    speech: Floats


def audio_level(path: Path) -> AudioLevel | None:
    """Return waveform extremes and spans of speech-like energy; None without audio.

    Raises:
        OSError, av.FFmpegError: the file cannot be opened.
    """
    low: list[NDArray[np.int16]] = []
    high: list[NDArray[np.int16]] = []
    power: list[Floats] = []
    for block in _blocks(path):
        columns = block[: len(block) // HOP * HOP].reshape(-1, HOP)
        low.append(columns.min(axis=1))
        high.append(columns.max(axis=1))
        power.append(np.square(columns.astype(np.float64) / 32768).mean(axis=1))
    if not low:
        return None
    lowest, highest = (np.round(np.concatenate(x) / 32768 * 127).astype(np.int8) for x in (low, high))
    return AudioLevel(lowest, highest, speech_spans(np.concatenate(power), HOP / RATE))


def _blocks(path: Path) -> Iterator[NDArray[np.int16]]:
    """Mono samples from the start of the clip in blocks of whole columns; gaps at the start are zeros."""
    with av.open(str(path), metadata_errors="replace") as media:
        if not media.streams.audio:
            return
        resampler = AudioResampler(format="s16", layout="mono", rate=RATE)
        rest: list[NDArray[np.int16]] = []
        first = True
        for _, frame in decoded(media, media.streams.audio[0]):
            if first and frame.time is not None:
                lead = round((frame.time - (media.start_time or 0) / av.time_base) * RATE)
                rest.append(np.zeros(min(max(0, lead), 3600 * RATE), np.int16))
                first = False
            rest += [piece.to_ndarray().reshape(-1).astype(np.int16) for piece in resampler.resample(frame)]
            if sum(map(len, rest)) >= 60 * RATE:
                block = np.concatenate(rest)
                whole = len(block) // HOP * HOP
                yield block[:whole]
                rest = [block[whole:]]
        if rest:
            yield np.concatenate(rest)


def speech_spans(power: Floats, step: float) -> Floats:
    """Spans whose energy is high for this clip, [M, 2] seconds.

    The threshold lies at 40 % between the 10th and the 95th percentile of the level in dB. Pauses under 0.3 s are
    closed and bursts under 0.1 s dropped. This detects energy, not voices: music counts.

    Args:
        power: [N] mean square of each column.
        step: seconds per column.
    """
    level = 10 * np.log10(np.maximum(power, 1e-10))
    floor, top = np.percentile(level, (10, 95)) if level.size else (0.0, 0.0)
    threshold = floor + 0.4 * (top - floor) if top - floor >= _MIN_RANGE else _QUIET
    active = level > max(threshold, _QUIET)
    spans = runs(active)
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and (begin - merged[-1][1]) * step < 0.3:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return np.array([(b * step, e * step) for b, e in merged if (e - b) * step >= 0.1], np.float64).reshape(-1, 2)


def runs(flag: Sequence[bool] | NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Half-open ranges of indices where `flag` is True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(flag, bool), [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def stored_boxes(cache: Cache, item: str) -> Floats | None:
    """Return the box of the person whose features a cache holds, as `detect_boxes`; None if it holds no boxes.

    Raises:
        CacheError: an array cannot be read.
    """
    known = cache.streams()
    visual = [name for name, info in known.items() if info.kind in ("visual", "pixels") and cache.has(name, item)]
    if not visual or FACES not in known or not cache.has(FACES, item):
        return None
    made, meta = cache.record(visual[0], item), cache.meta(item)
    person, sides = made.meta.get("person"), [float(meta.get(name) or 0) for name in ("width", "height")]
    if not isinstance(person, int) or "frame" not in made.arrays or not all(sides):
        return None
    samples = cache.read(visual[0], item, ["time", "frame"])
    faces = cache.read(FACES, item, ["frame", "person", "box"])
    box = np.full((len(samples.frame), 4), np.nan)
    mine = np.flatnonzero(faces.person == person)
    if len(mine):
        place = np.minimum(np.searchsorted(faces.frame[mine], samples.frame), len(mine) - 1)
        seen = faces.frame[mine][place] == samples.frame
        box[seen] = faces.box[mine][place][seen]
    return np.column_stack([samples.time, box / (sides * 2)])


def detect_boxes(path: Path) -> Floats:
    """Return the box of the person that extraction follows, [T, 5]: seconds, then x0, y0, x1, y1.

    Coordinates are shares of the frame's width and height, NaN for frames without a face. Detector and tracker are
    those of `vaflow extract`.

    Raises:
        OSError, av.FFmpegError: the file cannot be opened.
    """
    detector, tracker = CenterFace(), PersonTracker()
    rows: list[tuple[float, ...]] = []
    with av.open(str(path), metadata_errors="replace") as media:
        if not media.streams.video:
            return np.empty((0, 5))
        stream = media.streams.video[0]
        stream.thread_type = "AUTO"
        start = (media.start_time or 0) / av.time_base
        due = -np.inf
        for _, frame in decoded(media, stream):
            if frame.time is None or frame.time - start < due - 1e-6:
                continue
            time = frame.time - start
            due = (np.floor(time / STEP + 1e-6) + 1) * STEP
            image = to_rgb(frame)
            face = tracker.update(detector.detect(image), time)
            box = np.full(4, np.nan) if face is None else np.asarray(face.box)
            height, width = image.shape[:2]
            rows.append((time, *(box / (width, height, width, height)).tolist()))
    return np.array(rows, np.float64).reshape(-1, 5)


@dataclass(frozen=True)
class ClipMasks:
    """Missing input of a clip. Spans are [M, 2] seconds; None: unknown.

    Attributes:
        no_face, no_audio: without a face, without audio samples.
        boxes: [T, 5]: seconds, then x0, y0, x1, y1 in shares of the frame, NaN without a face; None: the cache has
            no boxes.
    """

    no_face: Floats | None = None
    no_audio: Floats | None = None
    boxes: Floats | None = None


def masks_of(table: Predictions, cache: Cache | None, item: str, streams: Iterable[str]) -> ClipMasks:
    """Return the missing faces and audio of a clip, from its predictions or else from the cache."""
    no_face = None if table.face is None else spans(~table.face, table.time)
    no_audio = None if table.audio is None else spans(~table.audio, table.time)
    boxes = None
    known = {} if cache is None else cache.streams()
    for name in [*streams, FACES]:
        if cache is None or name not in known or not cache.has(name, item):
            continue
        try:
            if name == FACES:
                boxes = stored_boxes(cache, item)
            elif known[name].kind == "visual" and no_face is None:
                read = cache.read(name, item, ["time", "valid"])
                no_face = spans(~read.valid, read.time)
            elif known[name].kind == "audio" and no_audio is None:
                read = cache.read(name, item, ["time", "valid"])
                time, where = np.unique(read.time, return_inverse=True)
                valid = np.zeros(len(time), bool)
                np.logical_or.at(valid, where.ravel(), read.valid.ravel())
                no_audio = spans(~valid, time, table.time[-1])
        except CacheError:
            continue  # a damaged item has no masks; its predictions are still shown
    return ClipMasks(no_face, no_audio, boxes)


def with_boxes(masks: ClipMasks, media: Path | None, detect: bool) -> tuple[ClipMasks, str]:
    """The masks with face boxes, detected where `detect` is set and the cache has none; and a note about them."""
    if masks.boxes is not None:
        return masks, ""
    if not detect or media is None:
        return masks, "No face boxes are drawn: the cache stores none. vaflow view --boxes detects them."
    try:
        boxes = detect_boxes(media)
    except UNREADABLE as error:
        log.warning("No face boxes of %s: %s", media, error)
        return masks, "Face boxes could not be detected."
    note = f"Face boxes were detected for this page, every {STEP:g} s, with the detector of vaflow extract."
    if not np.isfinite(boxes[:, 1:]).any():
        note = "No face box is drawn: the face detector detected no face in this clip."
    return replace(masks, boxes=boxes), note


def spans(flag: ArrayLike, time: Floats, end: float | None = None) -> Floats:
    """[M, 2] seconds where `flag` holds; each row lasts until the next one. Spans begin at 0 at the earliest."""
    if not len(time):
        return np.empty((0, 2))
    after = np.append(time[1:], time[-1] + median_interval(time))
    if end is not None:
        after = np.minimum(after, max(end, time[-1]))
    intervals = np.array([(time[a], after[b - 1]) for a, b in runs(np.asarray(flag, bool))], np.float64).reshape(-1, 2)
    return np.maximum(intervals, 0)


@dataclass(frozen=True)
class ClipScores:
    """One row of the list of clips.

    Attributes:
        seconds, frames: length.
        ccc, rmse: [2] and their mean, per dimension; empty without labels.
        missing_face: share of the time without a face; None: unknown.
        mean: [2] of the prediction; None without one.
        std: [2] mean standard deviation of the prediction; None without.
        far: share of the rows that are far from the training features; None: unknown.
    """

    seconds: float
    frames: int
    mean: tuple[float, float] | None
    ccc: Mapping[str, float] = field(default_factory=dict)
    rmse: Mapping[str, float] = field(default_factory=dict)
    missing_face: float | None = None
    std: tuple[float, float] | None = None
    far: float | None = None


def scores_of(table: Predictions, masks: ClipMasks) -> ClipScores:
    """Return length, agreement with the labels, and the share of time without a face."""
    seconds = float(table.time[-1] - min(0.0, table.time[0]) + median_interval(table.time))
    scores: dict[str, dict[str, float]] = {}
    if table.label is not None and np.asarray(np.isfinite(table.label), bool).any():
        valid = np.asarray(np.isfinite(table.label), bool)
        for name, measured in (("ccc", concordance), ("rmse", rmse)):
            values = measured(table.va, np.where(valid, table.label, 0), valid)
            both = {d: float(v) for d, v in zip(DIMENSIONS, values, strict=True) if np.isfinite(v)}
            scores[name] = {**both, "mean": float(np.mean(list(both.values())))}
    missing = None
    if masks.no_face is not None:
        missing = min(1.0, float(np.diff(masks.no_face, axis=1).sum()) / seconds) if seconds else 0.0
    mean = table.va.mean(axis=0)
    point = (float(mean[0]), float(mean[1])) if np.isfinite(mean).all() else None
    std = None if table.std is None else (float(table.std[:, 0].mean()), float(table.std[:, 1].mean()))
    far = None if table.far is None else float(table.far.mean())
    return ClipScores(seconds, len(table.time), point, missing_face=missing, std=std, far=far, **scores)


def payload(table: Predictions, masks: ClipMasks, level: AudioLevel | None) -> dict[str, Any]:
    """Return the JSON that the page's scripts draw from; arrays are base64 of little-endian numbers."""
    document: dict[str, Any] = {
        "time": _clock(table.time),
        "value": [packed(column, "<f4") for column in table.va.T],
        "noFace": _rounded(masks.no_face),
        "noAudio": _rounded(masks.no_audio),
        "boxes": None if masks.boxes is None else packed(masks.boxes, "<f4"),
    }
    if table.label is not None and np.asarray(np.isfinite(table.label), bool).any():
        document["label"] = [packed(column, "<f4") for column in table.label.T]
        document["unlabelled"] = _rounded(spans(np.isnan(table.label).any(axis=1), table.time))
    if table.std is not None:
        document["std"] = [packed(column, "<f4") for column in table.std.T]
    if table.far is not None:
        document["far"] = _rounded(spans(table.far, table.time))
    if table.interpolated is not None:
        document["interpolated"] = packed(table.interpolated, "u1")
    if level is not None:
        document["low"], document["high"] = packed(level.low, "i1"), packed(level.high, "i1")
        document["speech"] = _rounded(level.speech)
    return document


def _clock(time: Floats) -> dict[str, Any]:
    """Times as a start and a step where that is exact to a microsecond, else as numbers."""
    if len(time) > 1:
        step = (time[-1] - time[0]) / (len(time) - 1)
        if np.abs(time[0] + step * np.arange(len(time)) - time).max() < 1.5e-6:
            return {"start": float(time[0]), "step": float(step), "count": len(time)}
    return {"values": packed(time, "<f8")}


def packed(values: NDArray[Any], dtype: str) -> str:
    """Base64 of the array's bytes."""
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(dtype)).tobytes()).decode("ascii")


def _rounded(values: Floats | None) -> list[list[float]] | None:
    return None if values is None else [[round(a, 4), round(b, 4)] for a, b in values.tolist()]
