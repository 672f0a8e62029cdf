"""The prompt head: similarity of a frame to each region's description (arXiv 2603.13415, section 3)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.train.losses import REGIONS

INITIAL_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # as in CLIP
CONTEXT_DEVIATION = 0.02  # initial context vectors, as in CoOp


class PromptHead(nn.Module):
    """Project F_fused to text space; return scaled cosines to the nine prototypes.

    Args:
        hidden: width of F_fused.
        prototypes: [9, D], mean text embedding per region; normalised here.
        learnable: train the prototypes.
        context: number and width of learned context vectors; a text tower (`attach`) makes the prototypes from them.

    Raises:
        ValueError: there are not nine prototypes.
    """

    prototypes: Tensor

    def __init__(
        self, hidden: int, prototypes: Tensor, *, learnable: bool = False, context: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if prototypes.ndim != 2 or prototypes.shape[0] != REGIONS:
            raise ValueError(f"prototypes must be [{REGIONS}, D]; got {[*prototypes.shape]}")
        self.hidden = hidden
        self.project = nn.Linear(hidden, prototypes.shape[1])
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        start = prototypes.detach().to(torch.float32).clone()
        if learnable:
            self.prototypes = nn.Parameter(start)
        else:
            self.register_buffer("prototypes", start)
        self.context = None if context is None else nn.Parameter(CONTEXT_DEVIATION * torch.randn(context))
        self._tower: Callable[[Tensor], Tensor] | None = None

    def attach(self, tower: Callable[[Tensor], Tensor]) -> None:
        """Compute the prototypes from the context vectors, [count, width] -> [9, D]. The tower is not saved.

        Raises:
            ValueError: the head has no context.
        """
        if self.context is None:
            raise ValueError("this head has no context vectors")
        self._tower = tower

    def train(self, mode: bool = True) -> "PromptHead":
        """As `nn.Module.train`; leaving training mode stores the prototypes of the current context."""
        if self.training and not mode and self._tower is not None:
            with torch.no_grad():
                self.prototypes.copy_(self._tower(self.context))  # type: ignore[arg-type]
        super().train(mode)
        return self

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines: a scalar, at most 100."""
        return self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()

    def forward(self, fused: Tensor) -> Tensor:
        """[..., hidden] -> [..., 9] logits within +-`scale`.

        Raises:
            ValueError: the last axis is not `hidden`.
        """
        if fused.shape[-1] != self.hidden:
            raise ValueError(f"prompt head: expected [..., {self.hidden}]; got {[*fused.shape]}")
        moving = self.training and self._tower is not None
        prototypes = self._tower(self.context) if moving else self.prototypes  # type: ignore[misc, arg-type]
        unit = functional.normalize(prototypes, dim=-1)
        if self.training and 2 * self.hidden < prototypes.shape[1]:
            products, square = _through_gram_matrix(fused, self.project.weight, self.project.bias, unit)
        else:
            point = self.project(fused)
            # The gradient of p * p takes three passes; that of p * detached p is half of it and takes one.
            half = (point * point.detach()).sum(dim=-1, keepdim=True)
            products, square = point @ unit.T, 2 * half - half.detach()
        # The products are divided by the lengths: a division of the vectors would take several passes over all of them.
        return products * (self.scale / square.clamp(min=1e-24).sqrt())


def _through_gram_matrix(fused: Tensor, weight: Tensor, bias: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the projected frames p = W f + b with unit vectors, and |p|^2, without the long vectors p.

    |p|^2 = f (W'W f + W'b) + b'W f + b'b: where p is much longer than f, this takes a third of the arithmetic.

    Args:
        fused: [..., H].
        weight, bias: of the projection, [D, H] and [D].
        unit: [9, D].

    Returns:
        [..., 9] and [..., 1].
    """
    size = fused.shape[-1]
    basis = torch.cat([weight, bias.unsqueeze(1), unit.T], dim=1)  # [D, H + 1 + 9]
    half = basis.detach().T @ basis  # both factors are equal: the gradient of one is half of it
    table = (half + half.T - half.detach())[:, : size + 1]  # W'W, b'W, unit W; W'b, b'b, unit b
    moved, offset, products = functional.linear(fused, table[:, :size], table[:, size]).split([size, 1, REGIONS], -1)
    return products, (moved * fused).sum(dim=-1, keepdim=True) + offset
