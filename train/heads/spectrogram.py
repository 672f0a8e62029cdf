"""A small CNN over the cached log-Mel spectrogram, trained with the heads.

It stands for the "CNN-based audio" of arXiv 2603.13415, table 1, and the log-Mel branch of arXiv 2503.10523, which
neither paper specifies. Three 3x3 convolutions halve the bands each and shorten time at most to a quarter; the frames
of each step are then averaged per band. Missing and padded frames are zero before and after every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

CHANNELS = (16, 32, 64)


@dataclass(frozen=True)
class Steps:
    """Steps that the frames were pooled into.

    Attributes:
        value: [B, S, width]; zeros for steps without a valid frame.
        valid: [B, S] bool: at least half of the step's frames within the clip are valid.
        inside: [B, S] bool: the step begins within the clip.
        time: [B, S] seconds: the mean of the frames' times.
    """

    value: Tensor
    valid: Tensor
    inside: Tensor
    time: Tensor


class Spectrogram(nn.Module):
    """Pool log-Mel frames into one vector per step.

    Args:
        bands: width of a frame.
        frames_per_step: number of frames pooled into one step.
        channels: of the three convolutions.

    Attributes:
        width: of a step's vector.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, bands: int, frames_per_step: int, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        if bands < 1 or frames_per_step < 1:
            raise ValueError(f"bands and frames per step must be positive; got {bands} and {frames_per_step}")
        self.bands, self.frames_per_step = bands, frames_per_step
        # Time shrinks no further than a step is long, so that each step keeps a frame.
        self.shrink = [2 if frames_per_step >= 2 ** (layer + 1) and layer < 2 else 1 for layer in range(len(channels))]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=(stride, 2), padding=1)
            for before, after, stride in zip((1, *channels), channels, self.shrink, strict=False)
        )
        for layer in self.layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        for _ in channels:
            bands = (bands + 1) // 2
        self.width = channels[-1] * bands

    def forward(self, frames: Tensor, valid: Tensor, inside: Tensor, time: Tensor) -> Steps:
        """frames [B, T, bands], standardised; valid, inside [B, T] bool; time [B, T] -> T / frames_per_step steps.

        Raises:
            ValueError: shapes disagree, or T is not a multiple of `frames_per_step`.
        """
        count, per_step = inside.shape[1], self.frames_per_step
        if tuple(frames.shape) != (*inside.shape, self.bands) or count % per_step:
            raise ValueError(
                f"expected frames [B, T, {self.bands}], T a multiple of {per_step}; "
                f"got {[*frames.shape]} with masks {[*inside.shape]}"
            )
        mask = valid & inside
        value, pooled = self._pool(*self._convolve(frames, mask), count // per_step)
        by_step = (inside.shape[0], count // per_step, per_step)
        enough = 2 * mask.view(by_step).sum(dim=2) >= inside.view(by_step).sum(dim=2)
        return Steps(value, enough & pooled, inside.view(by_step)[:, :, 0], time.reshape(by_step).mean(dim=2))

    def _convolve(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, bands], [B, T] -> [B, T', width] and [B, T'], both of every `shrink`-th frame."""
        maps = torch.where(mask.unsqueeze(-1), frames, 0).unsqueeze(1)
        for layer, stride in zip(self.layers, self.shrink, strict=True):
            mask = mask[:, ::stride]  # of the frame under the middle tap
            maps = torch.relu(layer(maps)) * mask[:, None, :, None]
        return maps.transpose(1, 2).flatten(2), mask

    def _pool(self, maps: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Masked mean of the maps of each step, and whether any entry was unmasked."""
        stride = prod(self.shrink)
        step = torch.arange(mask.shape[1], device=mask.device) * stride // self.frames_per_step
        member = (step == torch.arange(steps, device=mask.device).unsqueeze(1)).to(maps)  # [S, T']
        counts = torch.einsum("st,bt->bs", member, mask.to(maps))
        sums = torch.einsum("st,btd->bsd", member, maps)
        return sums / counts.clamp(min=1).unsqueeze(-1), counts > 0
