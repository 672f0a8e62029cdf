"""Ragged batches with missing and unlabelled frames, and models for them: small enough to reason about, float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vaflow.train.batch import AUDIO, VISUAL, Batch, StreamSpec
from vaflow.train.heads import VAModel

PROTOTYPES = torch.randn(9, 6, generator=torch.Generator().manual_seed(7))
VISUAL_STREAM, AUDIO_STREAM = StreamSpec("see.it", VISUAL, 5), StreamSpec("hear/it", AUDIO, 7)
VISUAL_STREAM_2, AUDIO_STREAM_2 = StreamSpec("see.it/too", VISUAL, 4), StreamSpec("hear.it/too", AUDIO, 3)


def inside_mask(lengths: Sequence[int], size: int) -> Tensor:
    """[B] lengths -> [B, size] bool."""
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def toy_batch(
    frames: Sequence[int] = (6, 4, 1, 5),
    steps: Sequence[int] = (7, 5, 2, 6),
    streams: Sequence[StreamSpec] = (VISUAL_STREAM, AUDIO_STREAM),
    seed: int = 0,
) -> Batch:
    """Windows of the given frames and audio steps; some input is missing, some frames are unlabelled.

    Window 0 lacks one face and one step of sound, window 1 one of its two labels on one frame and both on another.
    """
    draw = torch.Generator().manual_seed(seed)
    size = {VISUAL: max(frames), AUDIO: max(steps)}
    inside = {VISUAL: inside_mask(frames, size[VISUAL]), AUDIO: inside_mask(steps, size[AUDIO])}
    time = {kind: torch.arange(size[kind], dtype=torch.float64).expand_as(inside[kind]) * 0.5 for kind in size}
    time[AUDIO] = time[AUDIO] + 0.29
    valid = {kind: inside[kind].clone() for kind in size}
    valid[VISUAL][0, 1] = valid[AUDIO][0, 2] = False
    labelled = inside[VISUAL].unsqueeze(-1).repeat(1, 1, 2)
    labelled[1, 0, 1] = labelled[1, 2, 0] = labelled[1, 2, 1] = False
    target = torch.rand(*labelled.shape, generator=draw, dtype=torch.float64) * 2 - 1
    kinds = {stream.name: stream.kind for stream in streams}
    return Batch(
        features={
            s.name: torch.randn(len(frames), size[s.kind], s.dim, generator=draw, dtype=torch.float64)
            * inside[s.kind].unsqueeze(-1)
            for s in streams
        },
        valid={name: valid[kind].clone() for name, kind in kinds.items()},
        feature_inside={name: inside[kind].clone() for name, kind in kinds.items()},
        feature_time={name: time[kind].clone() for name, kind in kinds.items()},
        inside=inside[VISUAL],
        time=time[VISUAL],
        target=torch.where(labelled, target, 0),
        labelled=labelled,
        window=torch.arange(len(frames)),
    )


def pad_more(batch: Batch, extra: int, junk: float) -> Batch:
    """The same windows with `extra` padding, and `junk` in all floating-point padding."""

    def grow(tensor: Tensor, inside: Tensor) -> Tensor:
        fill = False if tensor.dtype == torch.bool else junk
        tail = torch.full((tensor.shape[0], extra, *tensor.shape[2:]), fill, dtype=tensor.dtype)
        mask = torch.cat([inside, torch.zeros(len(inside), extra, dtype=torch.bool)], dim=1)
        grown = torch.cat([tensor, tail], dim=1)
        return torch.where(mask.view(*mask.shape, *[1] * (grown.ndim - 2)), grown, fill)

    def grow_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: grow(tensor, batch.feature_inside[name]) for name, tensor in tensors.items()}

    return replace(
        batch,
        features=grow_all(dict(batch.features)),
        valid=grow_all(dict(batch.valid)),
        feature_inside=grow_all(dict(batch.feature_inside)),
        feature_time=grow_all(dict(batch.feature_time)),
        inside=grow(batch.inside, batch.inside),
        time=grow(batch.time, batch.inside),
        target=grow(batch.target, batch.inside),
        labelled=grow(batch.labelled, batch.inside),
    )


def without(batch: Batch, name: str, windows: Sequence[int]) -> Batch:
    """The same batch with stream `name` missing (not padded) in the given windows."""
    valid = {key: mask.clone() for key, mask in batch.valid.items()}
    valid[name][list(windows)] = False
    return replace(batch, valid=valid)


def toy_model(streams: tuple[StreamSpec, ...] = (VISUAL_STREAM, AUDIO_STREAM), **options: Any) -> VAModel:
    """A small model in float64 whose learned vectors for missing input are not zero."""
    torch.manual_seed(0)
    model = VAModel(streams, PROTOTYPES, **{"hidden": 8, "attention_heads": 2, "dropout": 0.0, **options}).double()
    for branch in model.branches:
        nn.init.normal_(branch.missing)  # type: ignore[arg-type]
    return model
