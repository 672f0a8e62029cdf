"""Quality of faces and speech activity of cached clips: masks of training inputs, and columns of predictions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import FACES, LOGMEL, Item
from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats, median_interval

HOP = 0.01  # seconds between two values of speech activity, as between log-Mel frames
GOOD_SIZE = 48.0  # pixels of the frame
GOOD_SHARPNESS = 8.0  # gray levels


@dataclass(frozen=True)
class InputMasks:
    """Valid inputs that a run masks.

    Attributes:
        min_face_quality: faces below this quality count as missing.
        speech: audio without speech counts as missing.
    """

    min_face_quality: float = 0.0
    speech: bool = False

    def valid(self, cache: Cache, stream: str, kind: str, data: Item) -> np.ndarray:
        """`data.valid` of an item of a stream, without what is left out.

        Raises:
            UsageError: the cache does not hold what a setting requires.
        """
        if kind == "visual" and self.min_face_quality > 0:
            quality = face_quality(cache, stream, data.item, data)
            if quality is None:
                raise _missing("min_face_quality", "face quality", cache, data.item, " with --person main")
            return data.valid & (quality >= self.min_face_quality)
        if kind != "visual" and self.speech:
            speech = speech_activity(cache, data.item)
            if speech is None:
                raise _missing("speech_mask", "speech activity", cache, data.item, "")
            if kind == LOGMEL:
                return data.valid & speech[: len(data.valid)]
            return data.valid & during_speech(speech, data.time, median_interval(data.time[:1].ravel()))
        return data.valid


def face_quality(cache: Cache, stream: str, item: str, data: Item) -> Floats | None:
    """Quality of the face at each visual sample, [T], 0 (no face) to 1; None if the cache does not hold it.

    The product of the detector's score, the cosine of the yaw, and size and sharpness as shares of a good face's.

    Args:
        data: the item of the visual stream, with its array `frame`.
    """
    person = cache.record(stream, item).meta.get("person")
    frame = data.arrays.get("frame")
    if not isinstance(person, int) or frame is None or FACES not in cache.streams() or not cache.has(FACES, item):
        return None
    faces = cache.read(FACES, item, ["frame", "person", "size", "sharpness", "yaw", "score"])
    mine = np.flatnonzero(faces.person == person)
    value = (
        faces.score
        * np.minimum(faces.size / GOOD_SIZE, 1)
        * np.minimum(faces.sharpness / GOOD_SHARPNESS, 1)
        * np.maximum(np.cos(np.radians(faces.yaw)), 0)
    )[mine]
    quality = np.zeros(len(frame))
    if len(mine):
        place = np.minimum(np.searchsorted(faces.frame[mine], frame), len(mine) - 1)
        same = faces.frame[mine][place] == frame
        quality[same] = value[place][same]
    return quality


def speech_activity(cache: Cache, item: str) -> Bools | None:
    """[F] True where there is speech, one per `HOP` seconds from 0; None if the cache does not hold it."""
    if LOGMEL not in cache.streams() or not cache.has(LOGMEL, item):
        return None
    if "speech" not in cache.record(LOGMEL, item).arrays:
        return None
    speech: Bools = cache.read(LOGMEL, item, ["speech"]).arrays["speech"]
    return speech


def during_speech(speech: Bools, time: np.ndarray, length: float) -> Bools:
    """True where at least half of `length` seconds around each time is speech."""
    sums = np.concatenate([[0], np.cumsum(speech)])
    first, last = (
        np.clip(np.rint((time + sign * length / 2) / HOP).astype(np.int64), 0, len(speech)) for sign in (-1, 1)
    )
    result: Bools = 2 * (sums[last] - sums[first]) >= max(round(length / HOP), 1)
    return result


def _missing(setting: str, what: str, cache: Cache, item: str, options: str) -> UsageError:
    return UsageError(
        explain(
            f"{setting} requires {what}, which {cache.place} does not hold for clip {item!r}",
            expected=f"features of detected faces, extracted{options}" if options else "log-Mel with speech activity",
            remedy=f"Extract the videos{options} into a new cache, or leave {setting} out",
        )
    )


def frame_columns(cache: Cache, visual: Iterable[str], item: str, time: Floats) -> dict[str, Any]:
    """`face_quality` and `speech` at the frames of a clip, as far as the cache holds them.

    Args:
        visual: visual streams; the first one that holds the clip is taken.
        time: [R] seconds of the frames.
    """
    columns: dict[str, Any] = {}
    for stream in visual:
        if stream in cache.streams() and cache.has(stream, item):
            data = cache.read(stream, item, [n for n in ("time", "frame") if n in cache.record(stream, item).arrays])
            quality = face_quality(cache, stream, item, data)
            if quality is not None and len(quality):
                edges = (data.time[1:] + data.time[:-1]) / 2
                columns["face_quality"] = quality[np.searchsorted(edges, time)]
            break
    speech = speech_activity(cache, item)
    if speech is not None and len(speech):
        columns["speech"] = speech[np.clip(np.floor(time / HOP + 1e-6).astype(np.int64), 0, len(speech) - 1)]
    return columns
