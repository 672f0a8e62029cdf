"""Dropout whose masks cost less than `nn.Dropout`'s, which draws a number of 32 bits or more for every value."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

LEVELS = 2**16  # of a random number


class Dropout(nn.Dropout):
    """Dropout with the masks of `dropout_mask`."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...], scaled; x itself outside of training."""
        return x * dropout_mask(x.shape, self.p, x) if self.training and self.p else x


def dropout_mask(shape: Sequence[int], rate: float, like: Tensor, generator: Generator | None = None) -> Tensor:
    """Draw a mask: 0 with probability `rate`, rounded to 1 / 65,536, and the reciprocal of the kept share otherwise.

    Args:
        shape: of the result.
        rate: in [0, 1).
        like: a tensor whose dtype and device the result has.
        generator: of random numbers, on that device; None: torch's own.
    """
    count = torch.Size(shape).numel()
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    # Four numbers of 16 bits are drawn at once; all bits of the integer are random.
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    drawn.random_(-(2**63), None, generator=generator)
    numbers = drawn.view(torch.int16)[:count]
    return numbers.ge_(dropped - LEVELS // 2).to(like.dtype).mul_(LEVELS / (LEVELS - dropped)).view(shape)
