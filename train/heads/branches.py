"""What becomes of one stream before fusion: normalise, project, fill in what is missing, look at the context.

Source: arXiv 2603.13415, section 3 (projection, eq. 1); normalisation and the vector for missing input are ours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.train.heads.fusion import Track
from vaflow.train.heads.spectrogram import Spectrogram
from vaflow.train.heads.temporal import TEMPORAL


class UnitLength(nn.Module):
    """[..., D] -> the same direction, length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return functional.normalize(x, dim=-1)


class Standardize(nn.Module):
    """(x - mean) / deviation per dimension, with numbers of the training split; the identity until they are set."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return (x - self.mean) / self.deviation.clamp(min=1e-6)


NORMALIZE: Mapping[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "l2": lambda dim: UnitLength(),
    "standard": Standardize,
    "none": lambda dim: nn.Identity(),
}


class Branch(nn.Module):
    """One stream: normalise, project to `hidden`, put the learned vector where input is missing, then its context.

    A spectrogram is standardised per band, whatever `normalize` says (a LayerNorm would take the loudness out of every
    frame, and with it much of what sound says about arousal), and a CNN makes steps of its frames first.

    Args:
        dim: width of the stream's features.
        hidden: width of the result.
        normalize: a key of `NORMALIZE`.
        temporal: a key of `TEMPORAL`.
        temporal_options: its keyword arguments.
        dropout: on what enters the temporal model.
        frames_per_step: of a spectrogram; 0: features are steps.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        normalize: str,
        temporal: str,
        temporal_options: Mapping[str, Any],
        dropout: float,
        frames_per_step: int = 0,
    ) -> None:
        super().__init__()
        self.normalize = NORMALIZE["standard" if frames_per_step else normalize](dim)
        self.spectrogram = Spectrogram(dim, frames_per_step) if frames_per_step else None
        if self.spectrogram is None:
            self.project: nn.Module = nn.Linear(dim, hidden)
        else:
            width = self.spectrogram.width
            self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.missing = nn.Parameter(torch.zeros(hidden))
        self.dropout = nn.Dropout(dropout)
        self.temporal = TEMPORAL[temporal](hidden, hidden, **temporal_options)

    def forward(self, x: Tensor, valid: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, dim], valid and inside [B, T] bool -> [B, T, hidden]; features that are not valid are not read."""
        return self._in_context(self.normalize(torch.where(valid.unsqueeze(-1), x, 0)), valid, inside)

    def track(self, x: Tensor, key: Tensor, inside: Tensor, time: Tensor) -> Track:
        """An audio stream, x [B, T, dim]; key, inside [B, T] bool; time [B, T] seconds. Frames become steps here."""
        if self.spectrogram is None:
            return Track(self(x, key, inside), time, inside, key)
        steps = self.spectrogram(self.normalize(x), key, inside, time)
        value = self._in_context(steps.value, steps.valid, steps.inside)
        return Track(value, steps.time, steps.inside, steps.valid)

    def _in_context(self, x: Tensor, valid: Tensor, inside: Tensor) -> Tensor:
        projected = torch.where(valid.unsqueeze(-1), self.project(x), self.missing)
        result: Tensor = self.temporal(self.dropout(projected), inside)
        return result
