"""Dropout whose masks cost less than `nn.Dropout`'s, which draws a number of 32 bits or more for every value."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Generator, Tensor, nn

LEVELS = 2**16  # of a random number


class Dropout(nn.Dropout):
    """Dropout with the masks of `dropout_mask`."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...], scaled; x itself outside of training."""
        return x * dropout_masks(x.shape, self.p, x.dtype, x.device)[0] if self.training and self.p else x


def dropout_masks(
    shape: Sequence[int],
    rate: float,
    dtype: torch.dtype,
    device: torch.device,
    generators: Sequence[Generator | None] = (None,),
) -> Tensor:
    """Draw masks: 0 with probability `rate`, rounded to 1 / 65,536, and the reciprocal of the kept share otherwise.

    Args:
        shape: of a mask.
        rate: in [0, 1); nothing is drawn for 0.
        dtype, device: of the result.
        generators: of the random numbers of each mask, on that device; None: torch's own.

    Returns:
        [G, *shape], a mask per generator.
    """
    if not rate:
        return torch.ones(len(generators), *shape, dtype=dtype, device=device)
    count = prod(shape)
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    # Four numbers of 16 bits are drawn at once; all bits of the integer are random.
    drawn = torch.empty(len(generators), -(-count // 4), dtype=torch.int64, device=device)
    for row, generator in zip(drawn, generators, strict=True):
        row.random_(-(2**63), None, generator=generator)
    kept = drawn.view(torch.int16)[:, :count].ge_(dropped - LEVELS // 2)
    return kept.to(dtype).mul_(LEVELS / (LEVELS - dropped)).view(-1, *shape)
