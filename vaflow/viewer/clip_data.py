"""The data of one clip for its page: traces, masks, waveform, scores, and face boxes (stored, or detected again)."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import ArrayLike, NDArray

from vaflow.cache import Cache
from vaflow.cache.schema import FACES
from vaflow.errors import CacheError
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.video import to_rgb
from vaflow.timeline import Floats, median_interval
from vaflow.train.metrics import concordance, rmse
from vaflow.viewer.media import AudioLevel, runs
from vaflow.viewer.predictions import DIMENSIONS, Predictions

STEP = 0.5  # seconds between detections, as in the default sampling of `vaflow extract`


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


def detect_boxes(path: Path, step: float = STEP) -> Floats:
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
        for packet in media.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                if not isinstance(frame, av.VideoFrame) or frame.time is None or frame.time - start < due - 1e-6:
                    continue
                time = frame.time - start
                due = (np.floor(time / step + 1e-6) + 1) * step
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
