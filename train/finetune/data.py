"""What backbones read, laid beside the windows of a split: row r of a stream's packed tensor was made of unit
(r - 1) // per_unit: a picture, or a window of sound. So the index tables of a `WindowSet` serve here unchanged."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaflow import images as pictures
from vaflow.cache import Cache
from vaflow.cache.documents import fingerprint
from vaflow.cache.schema import LOGMEL, PIXELS
from vaflow.encoders.base import cut
from vaflow.encoders.images import Preparation
from vaflow.encoders.logmel import HOP, RATE
from vaflow.errors import DataError, UsageError, explain
from vaflow.train.batch import VISUAL
from vaflow.train.data import default_budget, make_packs, mapped_zeros
from vaflow.train.finetune.augment import Augment
from vaflow.train.finetune.backbones import Backbone
from vaflow.train.inputs import InputStream
from vaflow.train.windows import WindowSet

THREADS = min(8, cpu_count() or 1)  # that decode pictures: Pillow lets go of the interpreter meanwhile


@dataclass(frozen=True)
class Pictures:
    """The stored pictures of a stream; unit u is sample u of all clips laid end to end.

    Attributes:
        data: [bytes] uint8, the files; offset: [U + 1] int64, file u is data[offset[u]:offset[u + 1]].
        clip: [U] int64 which clip of the split.
        preparation: from a picture to the encoder's input.
    """

    data: Tensor
    offset: Tensor
    clip: Tensor
    preparation: Preparation

    def read(self, units: Tensor, augment: Augment | None = None) -> Tensor:
        """[k] units -> [k, S, S, 3] uint8, as the encoder saw them when the cache was made."""
        with ThreadPoolExecutor(THREADS) as pool:
            images = list(pool.map(self._decode, units.tolist()))
        pictures = torch.from_numpy(np.stack(images))
        return pictures if augment is None else augment.pictures(pictures, self.clip[units])

    def _decode(self, unit: int) -> np.ndarray:
        first, last = self.offset[unit : unit + 2].tolist()
        return self.preparation(pictures.decode(self.data[first:last].numpy().tobytes(), "A picture of the cache"))


@dataclass(frozen=True)
class Sounds:
    """The log-Mel under every window of an audio stream; unit u is window u of all clips laid end to end.

    Attributes:
        frames: [F, bands], of all clips laid end to end, as stored.
        first, last: [U] int64 where the clip of each window begins and ends in `frames`.
        start: [U] int64 frames from the clip's start to the window's.
        count: frames of a window; padding: what stands beyond a clip's end.
    """

    frames: Tensor
    first: Tensor
    last: Tensor
    start: Tensor
    count: int
    padding: float

    def read(self, units: Tensor, augment: Augment | None = None) -> Tensor:
        """[k] units -> [k, count, bands] float32, unnormalised."""
        cuts = [self._cut(unit) for unit in units.tolist()]
        sounds = torch.from_numpy(np.stack(cuts))
        return sounds if augment is None else augment.sounds(sounds, units)

    def _cut(self, unit: int) -> np.ndarray:
        own = self.frames[int(self.first[unit]) : int(self.last[unit])].numpy()
        return cut(own, int(self.start[unit]), self.count, self.padding)


Source = Pictures | Sounds


def check_sources(cache: Cache, streams: Sequence[InputStream]) -> None:
    """The cache holds what these streams were made of: pixels of the same samples and faces, log-Mel as it was read.

    Raises:
        UsageError: it does not; the command that changes that is named.
    """
    known = cache.streams()
    names = " ".join(f"--{stream.kind} {stream.name}" for stream in streams)
    command = f"`vaflow extract ROOT {names} --pixels --out"
    for stream in streams:
        source = _source_of(stream)
        if source not in known:
            raise UsageError(
                explain(
                    f"{cache.place} has no {source}, which fine-tuning of {stream.name} reads",
                    expected=f"a cache that was extracted with --{PIXELS}",
                    got=", ".join(known),
                    remedy=f"{command} {cache.place}` and the other options as before adds them, nothing else",
                )
            )
        other = _other_origin(stream, known[source].identity, known[source].dtype)
        if other:
            raise UsageError(
                explain(
                    f"The {source} in {cache.place} are not what {stream.name} was made of",
                    expected="the same samples, faces and precision",
                    got=other,
                    remedy=f"{command} NEW_CACHE` makes both alike",
                )
            )


def _other_origin(stream: InputStream, source: Mapping[str, Any], dtype: str) -> str:
    if stream.kind == VISUAL:
        mine = {"sampling": _times(stream.identity), "faces": stream.identity.get("picture", {}).get("faces")}
        theirs = {"sampling": _times(source), "faces": source.get("picture", {}).get("faces")}
    else:
        mine, theirs = {"sound": stream.identity.get("sound")}, {"sound": f"{LOGMEL} {dtype}"}
    return "; ".join(f"{key} {theirs[key]}, not {mine[key]}" for key in mine if mine[key] != theirs[key])


def _times(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the sampling that determines the times of images."""
    return {key: value for key, value in identity.get("sampling", {}).items() if key != "audio_steps"}


def load_sources(
    cache: Cache, windows: WindowSet, backbones: Sequence[Backbone], scratch: Path | None = None
) -> dict[str, Source]:
    """Stream -> what its backbone reads of the clips of a split, whole, in memory or in a scratch file.

    Raises:
        DataError: a clip has embeddings but not the pixels or the log-Mel that they were made of.
        CacheError: an array cannot be read.
    """
    loaded: dict[str, Source] = {}
    for backbone in backbones:
        stream = backbone.stream
        own = [(k, clip.item) for k, clip in enumerate(windows.clips) if stream.name not in clip.missing]
        lacking = [item for _, item in own if not cache.has(_source_of(stream), item)]
        if lacking:
            raise DataError(
                explain(
                    f"{len(lacking)} clips have {stream.name} but no {_source_of(stream)}: {', '.join(lacking[:5])}",
                    expected="what every embedding was made of",
                    remedy=f"Run `vaflow extract ROOT --out {cache.place} --pixels` to its end",
                )
            )
        load = _load_pictures if stream.kind == VISUAL else _load_sounds
        loaded[stream.name] = load(cache, backbone, own, scratch)
    return loaded


def _source_of(stream: InputStream) -> str:
    return PIXELS if stream.kind == VISUAL else LOGMEL


def _load_pictures(cache: Cache, backbone: Backbone, own: list[tuple[int, str]], scratch: Path | None) -> Pictures:
    size = sum(int(cache.record(PIXELS, item).arrays["data"]["shape"][0]) for _, item in own)
    fits = size <= default_budget(torch.device("cpu"))
    data = torch.zeros(size, dtype=torch.uint8) if fits else mapped_zeros((size, 1), torch.uint8, scratch).view(size)
    offsets, clips, filled = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], 0
    for number, item in own:
        pixels = cache.read(PIXELS, item)
        _check_samples(cache, backbone.stream, item, pixels.time, pixels.valid)
        data[filled : filled + len(pixels.data)] = torch.from_numpy(pixels.data.copy())
        offsets.append(filled + pixels.offset[1:])
        clips.append(np.full(len(pixels.time), number))
        filled += len(pixels.data)
    offset, clip = torch.from_numpy(np.concatenate(offsets)), torch.from_numpy(np.concatenate(clips))
    return Pictures(data, offset, clip, backbone.encoder.preparation)


def _check_samples(cache: Cache, stream: InputStream, item: str, time: np.ndarray, valid: np.ndarray) -> None:
    made = cache.read(stream.name, item, ["time", "valid"])
    if not np.array_equal(made.time, time) or (made.valid & ~valid).any():
        raise DataError(
            explain(
                f"The pixels of clip {item!r} are not those that {stream.name} was made of",
                expected=f"{len(made.time)} samples, {int(made.valid.sum())} with a face",
                got=f"{len(time)} samples, {int(valid.sum())} with a face",
                remedy="Extract the clip again with --pixels",
            )
        )


def _load_sounds(cache: Cache, backbone: Backbone, own: list[tuple[int, str]], scratch: Path | None) -> Sounds:
    info = cache.streams()[LOGMEL]
    stream = InputStream(LOGMEL, info.kind, info.dim, 1, fingerprint(info), info.identity)
    pack = make_packs(cache, [item for _, item in own], [stream], torch.device("cpu"), None, scratch)[LOGMEL]
    parts = [np.zeros((3, 0), np.int64)]
    for _, item in own:
        mel = cache.read(LOGMEL, item, ["embedding"]).embedding
        start = cache.read(backbone.stream.name, item, ["start"]).start
        first = pack.append(mel)
        edges = np.array([[first], [first + len(mel)]])
        parts.append(np.vstack([np.repeat(edges, len(start), axis=1), np.rint(start * RATE / HOP).astype(np.int64)]))
    first, last, start = torch.from_numpy(np.concatenate(parts, axis=1))
    segments = backbone.encoder.segments(backbone.window, backbone.per_unit)
    return Sounds(pack.rows, first, last, start, segments.frames, backbone.encoder.front_end.padding)
