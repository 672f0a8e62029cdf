"""A small CNN over the cached log-Mel, trained with the heads: the "CNN-based audio" of arXiv 2603.13415, table 1, and
the log-Mel branch of arXiv 2503.10523. Neither paper says more; this one is as small as the data is.

Three 3x3 convolutions halve the bands each time, and time at most to a quarter; then the frames under each step are
averaged, bands kept apart. What is missing or padding is zero before and after every layer, so it never speaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

CHANNELS = (16, 32, 64)


@dataclass(frozen=True)
class Steps:
    """What frames become.

    Attributes:
        value: [B, S, width]; zeros where there is no valid frame.
        valid: [B, S] bool: at least half of the step's frames are.
        inside: [B, S] bool: the step begins within the clip.
        time: [B, S] seconds: the mean of the frames' times.
    """

    value: Tensor
    valid: Tensor
    inside: Tensor
    time: Tensor


class Spectrogram(nn.Module):
    """Log-Mel frames -> one vector per step.

    Args:
        bands: width of a frame.
        frames_per_step: how many frames become one step.
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
        # A step keeps a frame of its own at the end: time shrinks no further than a step is long.
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
        count, each = inside.shape[1], self.frames_per_step
        if tuple(frames.shape) != (*inside.shape, self.bands) or count % each:
            raise ValueError(
                f"expected frames [B, T, {self.bands}], T a multiple of {each}; "
                f"got {[*frames.shape]} with masks {[*inside.shape]}"
            )
        there = valid & inside
        maps, mask = self._convolve(frames, there)
        value, found = self._pool(maps, mask, count // each)
        by_step = (inside.shape[0], count // each, each)
        enough = 2 * there.view(by_step).sum(dim=2) >= each
        return Steps(value, enough & found, inside.view(by_step)[:, :, 0], time.reshape(by_step).mean(dim=2))

    def _convolve(self, frames: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, bands], [B, T] -> [B, T', width] and [B, T'], both of every `shrink`-th frame."""
        maps = torch.where(there.unsqueeze(-1), frames, 0).unsqueeze(1)
        mask = there
        for layer, stride in zip(self.layers, self.shrink, strict=True):
            mask = mask[:, ::stride]  # the frame that a tap's middle lies on
            maps = torch.relu(layer(maps)) * mask[:, None, :, None]
        return maps.transpose(1, 2).flatten(2), mask

    def _pool(self, maps: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Mean of the maps under each step where the mask is set, and whether there was one."""
        stride = prod(self.shrink)
        step = torch.arange(mask.shape[1], device=mask.device) * stride // self.frames_per_step
        member = (step == torch.arange(steps, device=mask.device).unsqueeze(1)).to(maps)  # [S, T']
        counts = torch.einsum("st,bt->bs", member, mask.to(maps))
        sums = torch.einsum("st,btd->bsd", member, maps)
        return sums / counts.clamp(min=1).unsqueeze(-1), counts > 0
