"""Inputs of the backbones: the stored images and log-Mel of a split, and their augmentation.

Row r of a stream's packed tensor was encoded from unit (r - 1) // per_unit: an image, or a window of log-Mel. The index
tables of a `WindowSet` therefore also select the inputs.

Augmentation keeps the expression. All images of one clip in one batch get the same change: each window stays
consistent, and frames that windows share are still encoded once. The random numbers depend on the step and the clip
only, not on the reading order or on the number of processes.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaflow.cache import Cache
from vaflow.cache.documents import fingerprint
from vaflow.cache.schema import LOGMEL, PIXELS
from vaflow.datasets.files import examples
from vaflow.encoders.base import cut
from vaflow.encoders.preprocessing import HOP, RATE, Preparation, decode_image
from vaflow.errors import DataError, UsageError, explain
from vaflow.train.batch import VISUAL
from vaflow.train.data import default_budget, make_packs, mapped_zeros
from vaflow.train.finetune.backbones import Backbone
from vaflow.train.inputs import InputStream
from vaflow.train.loop import seed_from
from vaflow.train.windows import WindowSet

THREADS = min(8, cpu_count() or 1)
FLIPPED = 0.5  # share of clips
SMALLEST_CROP = 0.9  # fraction of the edge; the crops are already tight around the face
COLOUR = 0.2  # brightness, contrast and saturation are multiplied by 1 - COLOUR .. 1 + COLOUR
BANDS, FRAMES = 24, 100  # widest log-Mel strips that are masked: of 128 bands, of time (100 frames: 1 s)


@dataclass(frozen=True)
class Augment:
    """Augmentation of one training step.

    Attributes:
        numbers: seed, epoch and step, which seed the random numbers.
    """

    numbers: tuple[int, ...]

    def images(self, images: Tensor, clips: Tensor) -> Tensor:
        """Augment images [U, S, S, 3] of the clips [U]; same shape."""
        changed = torch.empty_like(images)

        def augment_clip(clip: int) -> None:
            of_clip = clips == clip
            changed[of_clip] = augment_images(images[of_clip], self._generator(0, clip))

        with ThreadPoolExecutor(THREADS) as pool:  # torch's operators release the interpreter lock
            list(pool.map(augment_clip, torch.unique(clips).tolist()))
        return changed

    def logmel(self, logmel: Tensor, units: Tensor) -> Tensor:
        """Mask a strip of bands and a strip of time in each window [U, frames, bands] of the units [U]; same shape."""
        generators = [self._generator(1, unit) for unit in units.tolist()]
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(augment_logmel, logmel, generators)))

    def _generator(self, *more: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(*self.numbers, *more))


def augment_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply the same flip, crop and colours to all images of a clip, [U, S, S, 3] uint8, or float32 in 0..1."""
    from torchvision.transforms.v2 import functional

    draw = torch.rand(7, generator=generator).tolist()
    edge = images.shape[1]
    size = round(edge * (SMALLEST_CROP + (1 - SMALLEST_CROP) * draw[1]))
    top, left = (round((edge - size) * share) for share in draw[2:4])
    channels = images.permute(0, 3, 1, 2)
    if draw[0] < FLIPPED:
        channels = functional.horizontal_flip(channels)
    channels = functional.resized_crop(channels, top, left, size, size, [edge, edge], antialias=True)
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for change, share in zip(changes, draw[4:], strict=True):
        channels = change(channels, 1 + COLOUR * (2 * share - 1))
    return channels.permute(0, 2, 3, 1)


def augment_logmel(logmel: Tensor, generator: torch.Generator) -> Tensor:
    """SpecAugment of [frames, bands] without time warping; masked strips take the window's mean.

    Source: Park et al. 2019, arXiv 1904.08779.
    """
    draw = torch.rand(4, generator=generator).tolist()
    changed, mean = logmel.clone(), logmel.mean()
    frames, bands = logmel.shape
    width, length = int(draw[0] * (min(BANDS, bands) + 1)), int(draw[1] * (min(FRAMES, frames) + 1))
    low, begin = int(draw[2] * (bands - width + 1)), int(draw[3] * (frames - length + 1))
    changed[:, low : low + width] = mean
    changed[begin : begin + length] = mean
    return changed


@dataclass(frozen=True)
class StoredImages:
    """The stored images of a stream; unit u is sample u of all clips end to end.

    Attributes:
        data: [bytes] uint8, the files; offset: [U + 1] int64, file u is data[offset[u]:offset[u + 1]].
        clip: [U] int64 number of the clip in the split.
        preparation: turns an image into the encoder's input.
    """

    data: Tensor
    offset: Tensor
    clip: Tensor
    preparation: Preparation

    def read(self, units: Tensor, augment: Augment | None = None) -> Tensor:
        """Images of [k] units, [k, S, S, 3], as the encoder read them in the extraction."""
        with ThreadPoolExecutor(THREADS) as pool:  # Pillow releases the interpreter lock
            arrays = list(pool.map(self.decode, units.tolist()))
        images = torch.from_numpy(np.stack(arrays))
        return images if augment is None else augment.images(images, self.clip[units])

    def decode(self, unit: int) -> np.ndarray:
        """One image, [S, S, 3] uint8 or float32, as the encoder requires."""
        first, last = self.offset[unit : unit + 2].tolist()
        return self.preparation(decode_image(self.data[first:last].numpy().tobytes(), "An image of the cache"))


@dataclass(frozen=True)
class StoredLogmel:
    """The log-Mel of every window of an audio stream; unit u is window u of all clips end to end.

    Attributes:
        frames: [F, bands], of all clips end to end, as stored.
        first, last: [U] int64 rows of `frames` that hold the clip of each window: first .. last - 1.
        start: [U] int64 frames from the clip's start to the window's.
        count: frames of a window; padding: value beyond a clip's end.
    """

    frames: Tensor
    first: Tensor
    last: Tensor
    start: Tensor
    count: int
    padding: float

    def read(self, units: Tensor, augment: Augment | None = None) -> Tensor:
        """Log-Mel of [k] units, [k, count, bands] float32, not normalized."""
        segments = []
        for unit in units.tolist():
            clip = self.frames[int(self.first[unit]) : int(self.last[unit])].numpy()
            segments.append(cut(clip, int(self.start[unit]), self.count, self.padding))
        logmel = torch.from_numpy(np.stack(segments))
        return logmel if augment is None else augment.logmel(logmel, units)


Source = StoredImages | StoredLogmel


def check_sources(cache: Cache, streams: Sequence[InputStream]) -> None:
    """Check that the cache holds the inputs of these streams: pixels of the same samples and faces, same log-Mel.

    Raises:
        UsageError: an input is missing or differs; the message contains the command that extracts it.
    """
    known = cache.streams()
    names = " ".join(f"--{stream.kind} {stream.name}" for stream in streams)
    command = f"vaflow extract ROOT {names} --pixels --out"
    for stream in streams:
        source = _source_of(stream)
        if source not in known:
            problem = f"{cache.place} has no {source}, which fine-tuning of {stream.name} requires"
            expected = f"a cache that was extracted with --{PIXELS}"
            remedy = f"Add them with `{command} {cache.place}` and the other options of the extraction"
            raise UsageError(explain(problem, expected=expected, got=", ".join(known), remedy=remedy))
        if stream.kind == VISUAL:
            stored_origin, used_origin = _origin(known[source].identity), _origin(stream.identity)
            pairs = {key: (stored_origin[key], used_origin[key]) for key in used_origin}
        else:
            pairs = {"audio": (f"{LOGMEL} {known[source].dtype}", stream.identity.get("sound"))}
        differences = [f"{key} {stored}, not {used}" for key, (stored, used) in pairs.items() if stored != used]
        if differences:
            problem = f"The {source} in {cache.place} are not the inputs that {stream.name} was encoded from"
            expected = "the same samples, faces and precision"
            remedy = f"Extract both into a new cache: {command} NEW_CACHE"
            raise UsageError(explain(problem, expected=expected, got="; ".join(differences), remedy=remedy))


def _origin(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a visual stream's identity that determines its images: times and faces."""
    times = {key: value for key, value in identity.get("sampling", {}).items() if key != "audio_steps"}
    return {"sampling": times, "faces": identity.get("picture", {}).get("faces")}


def load_sources(
    cache: Cache, windows: WindowSet, backbones: Sequence[Backbone], scratch: Path | None = None
) -> dict[str, Source]:
    """Load the inputs of each backbone, in memory or in a scratch file; returns stream name -> inputs.

    Raises:
        DataError: a clip has embeddings but lacks the pixels or the log-Mel that they were encoded from.
        CacheError: an array cannot be read.
    """
    loaded: dict[str, Source] = {}
    for backbone in backbones:
        stream = backbone.stream
        clips = {clip.item: k for k, clip in enumerate(windows.clips) if stream.name not in clip.missing}
        lacking = [item for item in clips if not cache.has(_source_of(stream), item)]
        if lacking:
            problem = f"{len(lacking)} clips have {stream.name} but no {_source_of(stream)}: {examples(lacking)}"
            remedy = f"Complete the extraction: vaflow extract ROOT --out {cache.place} --pixels"
            raise DataError(explain(problem, expected="the input of every embedding", remedy=remedy))
        load = _load_images if stream.kind == VISUAL else _load_logmel
        loaded[stream.name] = load(cache, backbone, clips, scratch)
    return loaded


def _source_of(stream: InputStream) -> str:
    return PIXELS if stream.kind == VISUAL else LOGMEL


def _load_images(cache: Cache, backbone: Backbone, clips: Mapping[str, int], scratch: Path | None) -> StoredImages:
    """Images of `clips` (clip id -> its number in the split)."""
    stream = backbone.stream.name
    size = sum(int(cache.record(PIXELS, item).arrays["data"]["shape"][0]) for item in clips)
    fits = size <= default_budget(torch.device("cpu"))
    data = torch.zeros(size, dtype=torch.uint8) if fits else mapped_zeros((size, 1), torch.uint8, scratch).view(size)
    offsets, numbers, filled = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)], 0
    for item, number in clips.items():
        pixels, features = cache.read(PIXELS, item), cache.read(stream, item, ["time", "valid"])
        if not np.array_equal(features.time, pixels.time) or (features.valid & ~pixels.valid).any():
            problem = f"The pixels of clip {item!r} are not the images that {stream} was encoded from"
            expected = f"{len(features.time)} samples, {int(features.valid.sum())} with a face"
            got = f"{len(pixels.time)} samples, {int(pixels.valid.sum())} with a face"
            raise DataError(explain(problem, expected=expected, got=got, remedy="Extract the clip again with --pixels"))
        data[filled : filled + len(pixels.data)] = torch.from_numpy(pixels.data.copy())
        offsets.append(filled + pixels.offset[1:])
        numbers.append(np.full(len(pixels.time), number))
        filled += len(pixels.data)
    offset, clip = torch.from_numpy(np.concatenate(offsets)), torch.from_numpy(np.concatenate(numbers))
    return StoredImages(data, offset, clip, backbone.encoder.preparation)


def _load_logmel(cache: Cache, backbone: Backbone, clips: Mapping[str, int], scratch: Path | None) -> StoredLogmel:
    """Log-Mel of `clips` (clip id -> its number in the split)."""
    info = cache.streams()[LOGMEL]
    stream = InputStream(LOGMEL, info.kind, info.dim, 1, fingerprint(info), info.identity)
    pack = make_packs(cache, list(clips), [stream], torch.device("cpu"), None, scratch)[LOGMEL]
    parts = [np.zeros((3, 0), np.int64)]
    for item in clips:
        logmel = cache.read(LOGMEL, item, ["embedding"]).embedding
        start = cache.read(backbone.stream.name, item, ["start"]).start
        first = pack.append(logmel)
        edges = np.array([[first], [first + len(logmel)]])
        parts.append(np.vstack([np.repeat(edges, len(start), axis=1), np.rint(start * RATE / HOP).astype(np.int64)]))
    first, last, start = torch.from_numpy(np.concatenate(parts, axis=1))
    segments = backbone.encoder.segments(backbone.window, backbone.per_unit)
    return StoredLogmel(pack.rows, first, last, start, segments.frames, backbone.encoder.front_end.padding)
