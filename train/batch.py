"""One batch of windows, as the model and the losses see it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

VISUAL, AUDIO = "visual", "audio"


@dataclass(frozen=True)
class StreamSpec:
    """A stream that the model reads.

    Attributes:
        name: of the stream.
        kind: `VISUAL` (one vector per frame) or `AUDIO` (per step).
        dim: width of a vector.
        frames_per_step: of a spectrogram, how many of its frames a CNN makes one step of; 0: vectors are steps.
    """

    name: str
    kind: str
    dim: int
    frames_per_step: int = 0


@dataclass(frozen=True)
class Batch:
    """B windows with F frames each; every audio stream has its own number of steps S.

    The three masks are never mixed: `inside` (not padding), `valid` (input present), `labelled` (annotated).

    Attributes:
        features: stream name -> [B, F, D] (visual) or [B, S, D] (audio), float32.
        valid: stream name -> [B, F] or [B, S] bool: the input is there. False where padded, too.
        feature_inside: stream name -> [B, F] or [B, S] bool: within the clip. False entries are a suffix.
        feature_time: stream name -> [B, F] or [B, S] float32 seconds after the window's start.
        inside: [B, F] bool: output frames within the clip. False entries are a suffix; the first is always True.
        time: [B, F] float32 seconds after the window's start, of the output frames.
        target: [B, F, 2] float32, 0 where not annotated.
        labelled: [B, F, 2] bool; only ever True inside.
        window: [B] int64 which window of the split this is.
    """

    features: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    feature_inside: Mapping[str, Tensor]
    feature_time: Mapping[str, Tensor]
    inside: Tensor
    time: Tensor
    target: Tensor
    labelled: Tensor
    window: Tensor


@dataclass(frozen=True)
class Output:
    """What the model says.

    Attributes:
        va: [B, F, 2] in [-1, 1], valence and arousal.
        region_logits: [B, F, 9] scaled cosines to the prototypes, or None without a prompt head.
    """

    va: Tensor
    region_logits: Tensor | None


def lengths(inside: torch.Tensor) -> torch.Tensor:
    """[B, T] bool with its False entries at the end -> [B] int64 on the CPU, as packed sequences want them."""
    return inside.sum(dim=1).to("cpu", torch.int64)
