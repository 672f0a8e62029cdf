"""The encoders that made a cache's streams, opened for training: which can be, from which weights, how much of each.

Source: arXiv 2603.13415 gives backbones a learning rate of their own, 3e-6, and says no more. Encoders stay in
evaluation mode (neither family has dropout in it), so that what trains is what `vaflow extract` runs.
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

# Family -> where its blocks are, and what comes before them.
LAYOUTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "clip": ("transformer.resblocks", ("conv1", "class_embedding", "positional_embedding", "ln_pre")),
    "ast": ("layers", ("embeddings",)),
}


@dataclass(frozen=True)
class Backbone:
    """An encoder, and what it makes one vector, or one window's vectors, of.

    Attributes:
        stream: that it makes.
        encoder: with `features`, `encode` and `save`; its network is `module`.
        window: seconds of an audio window; per_unit: vectors of one picture (1) or one audio window (its steps).
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
        """Pictures [U, S, S, 3] uint8 or log-Mel [U, frames, bins] -> [U * per_unit, D] float32, with gradients."""
        if self.stream.kind == VISUAL:
            rows: Tensor = self.encoder.features(inputs)
            return rows.float()
        steps: Tensor = self.encoder.features(inputs, window=self.window, steps=self.per_unit)
        return steps.float().flatten(0, 1)


def tunable(streams: Iterable[InputStream]) -> tuple[InputStream, ...]:
    """The streams whose encoders can be trained; the others are read from the cache as they are.

    Raises:
        UsageError: there is none.
    """
    streams = tuple(streams)
    found = tuple(stream for stream in streams if stream.identity.get("encoder") in LAYOUTS)
    if not found:
        raise UsageError(
            explain(
                "None of the run's streams can be fine-tuned",
                expected="a stream of a CLIP image encoder or an Audio Spectrogram Transformer",
                got=", ".join(stream.name for stream in streams),
            )
        )
    for stream in streams:
        if stream not in found:
            log.info("%s is not fine-tuned: it is read from the cache as it is", stream.name)
    return found


def build_backbones(
    streams: Sequence[InputStream], weights: Mapping[str, Path], device: torch.device
) -> tuple[Backbone, ...]:
    """The encoders that made these streams, built anew.

    Args:
        streams: as `tunable` gives them.
        weights: stream -> local file or folder, instead of the hub.
        device: where.

    Raises:
        UsageError: weights are given for a stream that is not trained.
        FingerprintError: the encoder is not the one that made the cache's stream.
        WeightsError: weights cannot be had or do not fit.
    """
    names = [stream.name for stream in streams]
    for name in weights:
        if name not in names:
            raise UsageError(explain("Weights were given for a stream that is not trained", got=name, choices=names))
    return tuple(_build(stream, weights.get(stream.name), device) for stream in streams)


def _build(stream: InputStream, weights: Path | None, device: torch.device) -> Backbone:
    encoder = build_encoder(stream.name, weights=weights, device=str(device))
    made = encoder.identity
    wrong = [key for key, value in made.items() if stream.identity.get(key) != value]
    if wrong:
        raise FingerprintError(
            explain(
                f"{stream.name} is not the encoder that made the cache's stream",
                expected="; ".join(f"{key} {stream.identity.get(key)}" for key in wrong),
                got="; ".join(f"{key} {made[key]}" for key in wrong),
                remedy=f"Name the weights that it was extracted with: --weights {stream.name}=PATH",
            )
        )
    return _backbone(stream, encoder)


def _backbone(stream: InputStream, encoder: Any) -> Backbone:
    said = sampling(stream.identity)
    steps = 1 if stream.kind == VISUAL else int(said["audio_steps"])
    return Backbone(stream, encoder, said["window"], steps)


def choose_trained(backbone: Backbone, blocks: int | None) -> list[nn.Parameter]:
    """Let the last `blocks` blocks learn with all that follows them, freeze the rest; None: all learns, 0: nothing.

    Raises:
        UsageError: the network has no such blocks, or fewer.
    """
    module = backbone.module
    module.requires_grad_(blocks is None)
    if blocks:
        stack, before = _blocks(backbone), LAYOUTS[backbone.stream.identity["encoder"]][1]
        if blocks > len(stack):
            raise UsageError(
                explain(f"{backbone.stream.name} has fewer blocks", expected=f"at most {len(stack)}", got=blocks)
            )
        frozen = {id(p) for block in stack[: len(stack) - blocks] for p in block.parameters()}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(id(parameter) not in frozen and name.partition(".")[0] not in before)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def recompute(backbone: Backbone) -> None:
    """Keep no activations inside the blocks: they are computed again for the gradients.

    Raises:
        UsageError: the network has no blocks.
    """
    for block in _blocks(backbone):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(backbone: Backbone) -> nn.ModuleList:
    found: Any = backbone.module
    for name in LAYOUTS[backbone.stream.identity["encoder"]][0].split("."):
        found = getattr(found, name, None)
    if not isinstance(found, nn.ModuleList):
        raise UsageError(
            explain(
                f"The network of {backbone.stream.name} is not a stack of transformer blocks",
                expected="a vision transformer, for finetune_blocks and checkpointing",
                got=type(backbone.module).__name__,
            )
        )
    return found


def save_backbones(backbones: Iterable[Backbone], folder: Path, cache: Cache) -> tuple[InputStream, ...]:
    """Write each encoder as `vaflow extract --weights` takes it; returns the streams that they make.

    Each is built again from what was written, which is what its new identity is read from.

    Raises:
        WeightsError: the disk refuses.
    """
    known, made = cache.streams(), []
    for backbone in backbones:
        stream = backbone.stream
        path = backbone.encoder.save(folder, escape(stream.name))
        identity = {key: value for key, value in stream.identity.items() if key != "precision"}
        identity |= build_encoder(stream.name, weights=path).identity
        info = replace(known[stream.name], identity=identity)
        made.append(replace(stream, identity=identity, fingerprint=fingerprint(info)))
    return tuple(made)


def saved_weights(folder: Path, streams: Iterable[InputStream]) -> dict[str, Path]:
    """Stream -> the file or folder that `save_backbones` wrote.

    Raises:
        WeightsError: one is missing.
    """
    found = {}
    for stream in streams:
        stem = escape(stream.name)
        paths = [path for path in (folder / f"{stem}.safetensors", folder / stem) if path.exists()]
        if not paths:
            raise WeightsError(explain(f"The run's encoder for {stream.name} is missing", expected=folder / stem))
        found[stream.name] = paths[0]
    return found


def load_tuned(folder: Path, streams: Sequence[InputStream], device: torch.device) -> tuple[Backbone, ...]:
    """A run's own encoders, for the streams that they make.

    Raises:
        WeightsError, FingerprintError: they are missing, damaged, or not those that the run wrote.
    """
    return build_backbones(streams, saved_weights(folder, streams), device)
