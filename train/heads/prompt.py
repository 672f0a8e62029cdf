"""The semantic head: how much a frame resembles each region's description (arXiv 2603.13415, section 3)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.train.losses import REGIONS

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # as CLIP is trained


class PromptHead(nn.Module):
    """F_fused -> text space -> scaled cosine to each of the nine prototypes.

    Args:
        hidden: width of F_fused.
        prototypes: [9, D], mean text embedding per region; normalised here, so any length will do.
        learnable: train the prototypes from there, instead of keeping them.

    Raises:
        ValueError: there are not nine prototypes.
    """

    prototypes: Tensor

    def __init__(self, hidden: int, prototypes: Tensor, *, learnable: bool = False) -> None:
        super().__init__()
        if prototypes.ndim != 2 or prototypes.shape[0] != REGIONS:
            raise ValueError(f"prototypes must be [{REGIONS}, D]; got {[*prototypes.shape]}")
        self.hidden = hidden
        self.project = nn.Linear(hidden, prototypes.shape[1])
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        start = prototypes.detach().to(torch.float32).clone()
        if learnable:
            self.prototypes = nn.Parameter(start)
        else:
            self.register_buffer("prototypes", start)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with: a scalar, at most 100."""
        return self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()

    def forward(self, fused: Tensor) -> Tensor:
        """[..., hidden] -> [..., 9] logits within +-`scale`.

        Raises:
            ValueError: the last axis is not `hidden`.
        """
        if fused.shape[-1] != self.hidden:
            raise ValueError(f"prompt head: expected [..., {self.hidden}]; got {[*fused.shape]}")
        point = functional.normalize(self.project(fused), dim=-1)
        return self.scale * point @ functional.normalize(self.prototypes, dim=-1).T
