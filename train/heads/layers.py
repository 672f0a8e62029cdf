"""Layers of the heads: dropout, the mixture of an encoder's layers, the CNN over log-Mel, and the prompt head."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vaflow.train.losses import REGIONS

LEVELS = 2**16  # of a random number


class Dropout(nn.Dropout):
    """Dropout with the masks of `dropout_masks`; `nn.Dropout` draws a number of 32 bits or more for every value."""

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


SCALE = 10.0


class LayerMixture(nn.Module):
    """Learned weighted mean of an encoder's layers, sum_l softmax(SCALE * w)_l x_l; all shares are equal at first.

    The weights are scaled: at the learning rate of the heads they would hardly move in a few epochs.
    Source: Yang et al. 2021 (SUPERB, arXiv 2105.01051), section 2.2.

    Args:
        layers: number of layers.
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
    """A small CNN that pools the cached log-Mel frames into one vector per step.

    It stands for the "CNN-based audio" of arXiv 2603.13415, table 1, and the log-Mel branch of arXiv 2503.10523, which
    neither paper specifies. Three 3x3 convolutions halve the bands each and shorten time at most to a quarter; the
    frames of each step are then averaged per band. Missing and padded frames are zero before and after every layer.

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


INITIAL_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # as in CLIP
CONTEXT_DEVIATION = 0.02  # initial context vectors, as in CoOp


class PromptHead(nn.Module):
    """The prompt head: project F_fused to text space; return scaled cosines to the nine prototypes.

    Source: arXiv 2603.13415, section 3.

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
