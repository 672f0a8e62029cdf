"""Masks of inputs: face quality, speech activity, modality dropout; and the columns of predictions that show them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vaflow.cache import Cache
from vaflow.cache.schema import FACES, LOGMEL, Item
from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats, median_interval
from vaflow.train.batch import AUDIO, VISUAL, Batch, StreamSpec
from vaflow.train.inputs import LOGMEL_INTERVAL
from vaflow.train.windows import WindowSet

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
                problem = f"min_face_quality requires face quality; {cache.place} has none for clip {data.item!r}"
                expected = "features of detected faces, extracted with --person main"
                remedy = "Extract the videos with --person main into a new cache, or leave min_face_quality out"
                raise UsageError(explain(problem, expected=expected, remedy=remedy))
            return data.valid & (quality >= self.min_face_quality)
        if kind != "visual" and self.speech:
            speech = speech_activity(cache, data.item)
            if speech is None:
                problem = f"speech_mask requires speech activity; {cache.place} has none for clip {data.item!r}"
                remedy = "Extract the videos into a new cache, or leave speech_mask out"
                raise UsageError(explain(problem, expected="log-Mel with speech activity", remedy=remedy))
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
    """[F] True where there is speech, one per `LOGMEL_INTERVAL` seconds from 0; None if the cache does not hold it."""
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
        np.clip(np.rint((time + sign * length / 2) / LOGMEL_INTERVAL).astype(np.int64), 0, len(speech))
        for sign in (-1, 1)
    )
    result: Bools = 2 * (sums[last] - sums[first]) >= max(round(length / LOGMEL_INTERVAL), 1)
    return result


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
        columns["speech"] = speech[
            np.clip(np.floor(time / LOGMEL_INTERVAL + 1e-6).astype(np.int64), 0, len(speech) - 1)
        ]
    return columns


def drop_modality(
    batch: Batch, streams: Sequence[StreamSpec], share: float, generator: torch.Generator | None = None
) -> Batch:
    """Mark all streams of one modality as missing in about `share` of the windows, never both modalities.

    The windows and the modality (each with equal probability) follow from torch's generator.

    Args:
        share: probability that a window loses a modality, in [0, 1).
        generator: of random numbers, on the device; None: torch's own.

    Returns:
        The batch with other `valid` masks; the batch itself where the model reads one modality only.
    """
    if not share or {stream.kind for stream in streams} != {VISUAL, AUDIO}:
        return batch
    draw = torch.rand(len(batch.inside), device=batch.inside.device, generator=generator)
    lost = {VISUAL: draw < share / 2, AUDIO: (draw >= share / 2) & (draw < share)}
    valid = {stream.name: batch.valid[stream.name] & ~lost[stream.kind].unsqueeze(1) for stream in streams}
    return replace(batch, valid={**batch.valid, **valid})


def without_modality(windows: WindowSet, modality: str) -> WindowSet:
    """The same windows with every stream of a modality marked as missing.

    Raises:
        UsageError: not a modality, the windows have no stream of it, or no other stream.
    """
    if modality not in (VISUAL, AUDIO):
        raise UsageError(explain("Unknown modality", got=modality, choices=(VISUAL, AUDIO)))
    names = {stream.name for stream in windows.streams if stream.kind == modality}
    if not names or len(names) == len(windows.streams):
        problem = f"--without {modality} leaves the run without input"
        got = "one that reads " + ", ".join(f"{s.name} ({s.kind})" for s in windows.streams)
        raise UsageError(explain(problem, expected="a run that reads a visual and an audio stream", got=got))
    return windows.without(frozenset(names))
