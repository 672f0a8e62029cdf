"""Sinusoidal positions, whose rates are a buffer: nothing is built on the CPU or copied in a step."""

import math

import torch
from torch import Tensor, nn


class Sinusoids(nn.Module):
    """Positions -> sines in the first half and cosines in the second, wavelengths 2 pi to 20,000 pi units.

    Args:
        width: of the result, even.
        unit: length of one unit; 1 where positions count steps.
    """

    rates: Tensor

    def __init__(self, width: int, unit: float = 1.0) -> None:
        super().__init__()
        half = width // 2
        rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half) / unit
        self.register_buffer("rates", rates, persistent=False)  # not in checkpoints: older runs lack it

    def forward(self, position: Tensor) -> Tensor:
        """[...] -> [..., width], in the type of the rates."""
        angle = position.to(self.rates).unsqueeze(-1) * self.rates
        return torch.cat([angle.sin(), angle.cos()], dim=-1)
