"""Load the encoders of a cache's streams for fine-tuning, freeze parts of them, and save them.

Source: arXiv 2603.13415 trains the backbones with a learning rate of 3e-6 and gives no further details. The encoders
stay in evaluation mode (neither family uses dropout), so that training and `vaflow extract` compute the same features.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaflow.cache import Cache
from vaflow.cache.documents import fingerprint
from vaflow.cache.schema import escape
from vaflow.encoders import build_encoder
from vaflow.errors import FingerprintError, UsageError, WeightsError, explain
from vaflow.train.batch import VISUAL
from vaflow.train.inputs import InputStream, sampling

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
        identity = encoder.identity
        differing = [key for key, value in identity.items() if stream.identity.get(key) != value]
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
