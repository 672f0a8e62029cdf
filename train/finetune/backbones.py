"""The backbones of a fine-tuning run: their encoders, loaded, frozen in part, and saved; and their stored inputs.

Source: arXiv 2603.13415 trains the backbones with a learning rate of 3e-6 and gives no further details. The encoders
stay in evaluation mode (neither family uses dropout), so that training and `vaflow extract` compute the same features.

The inputs are the cached images and log-Mel of a split. Row r of a stream's packed tensor was encoded from unit
(r - 1) // per_unit: an image, or a window of log-Mel. The tables of a `WindowSet` therefore also select the inputs.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaflow.cache import Cache
from vaflow.cache.layout import fingerprint
from vaflow.cache.schema import LOGMEL, PIXELS, escape
from vaflow.encoders import build_encoder
from vaflow.encoders.base import cut, recorded_identity
from vaflow.encoders.logmel import HOP, RATE
from vaflow.encoders.preprocessing import Preparation, decode_image
from vaflow.errors import DataError, FingerprintError, UsageError, WeightsError, command, examples, explain
from vaflow.train.batch import VISUAL
from vaflow.train.data import default_budget, make_packs, mapped_zeros
from vaflow.train.inputs import InputStream, sampling
from vaflow.train.training_loop import seed_from
from vaflow.train.windows import WindowSet

log = logging.getLogger(__name__)

# Encoder family -> attribute path of its blocks, and the modules and parameters before them.
LAYOUTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "clip": ("transformer.resblocks", ("conv1", "class_embedding", "positional_embedding", "ln_pre")),
    "ast": ("layers", ("embeddings",)),
}


@dataclass(frozen=True)
class Backbone:
    """A trainable encoder of a stream.

    Attributes:
        stream: the stream of its features.
        encoder: has `features`, `encode` and `save`; its network is `module`.
        window: seconds of an audio window.
        per_unit: vectors per image (1) or per audio window (its steps).
    """

    stream: InputStream
    encoder: Any
    window: float
    per_unit: int

    @property
    def module(self) -> nn.Module:
        """The network."""
        module: nn.Module = self.encoder.module
        return module

    def features(self, inputs: Tensor) -> Tensor:
        """Images [U, S, S, 3] or log-Mel [U, frames, bins] -> [U * per_unit, D] float32, with gradients."""
        if self.stream.kind == VISUAL:
            rows: Tensor = self.encoder.features(inputs)
            return rows.float()
        steps: Tensor = self.encoder.features(inputs, window=self.window, steps=self.per_unit)
        return steps.float().flatten(0, 1)


def tunable(streams: Iterable[InputStream]) -> tuple[InputStream, ...]:
    """The streams whose encoders can be fine-tuned; the cached features of the others are used unchanged.

    Raises:
        UsageError: no stream can be fine-tuned.
    """
    streams = tuple(streams)
    trainable = tuple(s for s in streams if s.identity.get("encoder") in LAYOUTS and "blocks" not in s.identity)
    if not trainable:
        problem = "None of the run's streams can be fine-tuned"
        expected = "a stream of a CLIP image encoder or an Audio Spectrogram Transformer without @LAYER"
        raise UsageError(explain(problem, expected=expected, got=", ".join(stream.name for stream in streams)))
    for stream in streams:
        if stream not in trainable:
            log.info("%s is not fine-tuned: its cached features are used", stream.name)
    return trainable


def build_backbones(
    streams: Sequence[InputStream], weights: Mapping[str, Path], device: torch.device
) -> tuple[Backbone, ...]:
    """Build the encoders of these streams.

    Args:
        streams: streams from `tunable`.
        weights: stream name -> local file or folder, instead of the hub.

    Raises:
        UsageError: weights are given for a stream that is not trained.
        FingerprintError: an encoder differs from the one that made the cache's stream.
        WeightsError: weights cannot be loaded.
    """
    names = [stream.name for stream in streams]
    for name in weights:
        if name not in names:
            raise UsageError(explain(f"--weights {name}=...: the stream is not fine-tuned", got=name, choices=names))
    backbones = []
    for stream in streams:
        encoder = build_encoder(stream.name, weights=weights.get(stream.name), device=str(device))
        identity, recorded = encoder.identity, recorded_identity(stream.identity)
        differing = [key for key, value in identity.items() if recorded.get(key) != value]
        if differing:
            problem = f"{stream.name} is not the encoder that made the cache's stream"
            expected = "; ".join(f"{key} {stream.identity.get(key)}" for key in differing)
            got = "; ".join(f"{key} {identity[key]}" for key in differing)
            remedy = f"Pass the weights of the extraction: --weights {stream.name}=PATH"
            raise FingerprintError(explain(problem, expected=expected, got=got, remedy=remedy))
        layout = sampling(stream.identity)
        steps = 1 if stream.kind == VISUAL else int(layout["audio_steps"])
        backbones.append(Backbone(stream, encoder, layout["window"], steps))
    return tuple(backbones)


def choose_trained(backbone: Backbone, blocks: int | None) -> list[nn.Parameter]:
    """Freeze all but the last `blocks` blocks and the layers after them; returns the trainable parameters.

    `blocks` None trains the whole network, 0 nothing.

    Raises:
        UsageError: the network has no transformer blocks, or fewer.
    """
    module = backbone.module
    module.requires_grad_(blocks is None)
    if blocks:
        stack, before = _blocks(backbone), LAYOUTS[backbone.stream.identity["encoder"]][1]
        if blocks > len(stack):
            problem = f"finetune_blocks={blocks}: {backbone.stream.name} has fewer blocks"
            raise UsageError(explain(problem, expected=f"<= {len(stack)}"))
        frozen = {id(p) for block in stack[: len(stack) - blocks] for p in block.parameters()}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(id(parameter) not in frozen and name.partition(".")[0] not in before)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def recompute(backbone: Backbone) -> None:
    """Recompute the activations inside the blocks in the backward pass instead of storing them.

    Raises:
        UsageError: the network has no transformer blocks.
    """
    for block in _blocks(backbone):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(backbone: Backbone) -> nn.ModuleList:
    module: Any = backbone.module
    for name in LAYOUTS[backbone.stream.identity["encoder"]][0].split("."):
        module = getattr(module, name, None)
    if not isinstance(module, nn.ModuleList):
        problem = f"The network of {backbone.stream.name} is not a stack of transformer blocks"
        expected = "a vision transformer, for finetune_blocks and checkpointing"
        raise UsageError(explain(problem, expected=expected, got=type(backbone.module).__name__))
    return module


def save_backbones(backbones: Iterable[Backbone], folder: Path, cache: Cache) -> tuple[InputStream, ...]:
    """Write each encoder in the form that `vaflow extract --weights` reads; returns the streams of their features.

    Each encoder is loaded again from its file: the new identity is that of the file.

    Raises:
        WeightsError: a file cannot be written.
    """
    known, streams = cache.streams(), []
    for backbone in backbones:
        stream = backbone.stream
        path = backbone.encoder.save(folder, escape(stream.name))
        identity = {key: value for key, value in stream.identity.items() if key != "precision"}
        identity |= build_encoder(stream.name, weights=path).identity
        info = replace(known[stream.name], identity=identity)
        streams.append(replace(stream, identity=identity, fingerprint=fingerprint(info)))
    return tuple(streams)


def saved_weights(folder: Path, streams: Iterable[InputStream]) -> dict[str, Path]:
    """Stream name -> the file or folder that `save_backbones` wrote.

    Raises:
        WeightsError: one is missing.
    """
    weights = {}
    for stream in streams:
        stem = escape(stream.name)
        paths = [path for path in (folder / f"{stem}.safetensors", folder / stem) if path.exists()]
        if not paths:
            raise WeightsError(explain(f"The run's encoder for {stream.name} is missing", expected=folder / stem))
        weights[stream.name] = paths[0]
    return weights


THREADS = min(8, cpu_count() or 1)
FLIPPED = 0.5  # share of clips
SMALLEST_CROP = 0.9  # fraction of the edge; the crops are already tight around the face
COLOUR = 0.2  # brightness, contrast and saturation are multiplied by 1 - COLOUR .. 1 + COLOUR
BANDS, FRAMES = 24, 100  # widest log-Mel strips that are masked: of 128 bands, of time (100 frames: 1 s)


@dataclass(frozen=True)
class Augment:
    """Augmentation of one training step, which keeps the expression.

    All images of one clip in one batch get the same change: each window stays consistent, and frames that windows share
    are still encoded once. The random numbers depend on the step and the clip only, not on the reading order or on the
    number of processes.

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
    names = [word for stream in streams for word in (f"--{stream.kind}", stream.name)]
    for stream in streams:
        source = _source_of(stream)
        if source not in known:
            problem = f"{cache.place} has no {source}, which fine-tuning of {stream.name} requires"
            expected = f"a cache that was extracted with --{PIXELS}"
            extraction = command("extract", "ROOT", *names, "--pixels", "--out", cache.place)
            remedy = f"Add them with `{extraction}` and the other options of the extraction"
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
            again = command("extract", "ROOT", *names, "--pixels", "--out", "NEW_CACHE")
            remedy = f"Extract both into a new cache: {again}"
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
            remedy = f"Complete the extraction: {command('extract', 'ROOT', '--out', cache.place, '--pixels')}"
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
