"""A learned weighted mean of an encoder's layers.

Source: Yang et al. 2021 (SUPERB, arXiv 2105.01051), section 2.2: a softmax over one weight per layer, trained with the
head. The weights are scaled by 10 here: at the learning rate of the heads they would hardly move in a few epochs.
"""

import torch
from torch import Tensor, nn

SCALE = 10.0


class LayerMixture(nn.Module):
    """sum_l softmax(SCALE * w)_l x_l; all layers have equal shares at first.

    Args:
        layers: how many.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.weight = nn.Parameter(torch.zeros(layers))

    @property
    def shares(self) -> Tensor:
        """[layers], positive, of sum 1."""
        return torch.softmax(SCALE * self.weight, dim=0).detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., layers, D] -> [..., D].

        Raises:
            ValueError: another number of layers.
        """
        if x.ndim < 2 or x.shape[-2] != self.layers:
            raise ValueError(f"expected [..., {self.layers}, D]; got {[*x.shape]}")
        return torch.einsum("...ld,l->...d", x, torch.softmax(SCALE * self.weight, dim=0))
