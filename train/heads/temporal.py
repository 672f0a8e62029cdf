"""Temporal models: a sequence per window -> a sequence of the same length with context.

Every model has one interface: `forward(x [B, T, input_size], inside [B, T]) -> [B, T, hidden]`, with zeros at padding.
Values at padding are never read. Source: arXiv 2603.13415, eq. 1 (BiGRU) and table 2 (TCN); LSTM and Transformer are
ours. The rates of sinusoidal positions are a buffer: nothing is built on the CPU or copied in a step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from vaflow.errors import UsageError, explain
from vaflow.train.heads.layers import Dropout
from vaflow.train.heads.recurrence import Cell, run_recurrent


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


class Recurrent(nn.Module):
    """Bidirectional GRU or LSTM; the backward direction starts at the last real step.

    Args:
        cell: `nn.GRU` or `nn.LSTM`, which holds the weights; `run_recurrent` computes.
        input_size: width of x.
        hidden: width of the output, both directions together.
        layers: how many are stacked.
        per_direction: width of each direction, where it is not half of `hidden`; projected back linearly.
        dropout: between stacked layers.

    Raises:
        UsageError: `hidden` is odd and no `per_direction` is given.
    """

    def __init__(
        self,
        cell: type[nn.GRU] | type[nn.LSTM],
        input_size: int,
        hidden: int = 256,
        *,
        layers: int = 1,
        per_direction: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if per_direction is None and hidden % 2:
            raise UsageError(explain(f"hidden ({hidden}) must be even: half of it is for each direction"))
        width = hidden // 2 if per_direction is None else per_direction
        self.input_size = input_size
        self.rnn: Cell = cell(
            input_size,
            width,
            layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
        )
        self.between = Dropout(self.rnn.dropout)  # between layers
        self.back = nn.Identity() if 2 * width == hidden else nn.Linear(2 * width, hidden)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, input_size], inside [B, T] bool with its False entries at the end -> [B, T, hidden].

        Raises:
            ValueError: shapes disagree.
        """
        check_sequence(x, inside, self.input_size)
        return run_together([self], [zero_outside(x, inside)], [inside])[0]


def run_together(models: Sequence[Recurrent], sequences: Sequence[Tensor], insides: Sequence[Tensor]) -> list[Tensor]:
    """Run several `Recurrent` models of one shape in one recurrence; the results are those of each alone.

    Args:
        models: built with the same arguments.
        sequences: x [B, T, input_size] per model, finite at padding; T may differ.
        insides: [B, T] bool per model.

    Returns:
        [B, T, hidden] per model.

    Raises:
        ValueError: shapes disagree.
    """
    for model, x, inside in zip(models, sequences, insides, strict=True):
        check_sequence(x, inside, model.input_size)
    states = run_recurrent([model.rnn for model in models], sequences, insides, models[0].between)
    return [model.back(y) * m.unsqueeze(-1) for model, y, m in zip(models, states, insides, strict=True)]


class TCN(nn.Module):
    """Residual blocks of two dilated convolutions each; the dilation doubles from block to block.

    Args:
        input_size: width of x.
        hidden: width of the output.
        layers: residual blocks. Three blocks of width 3 cover 29 steps, more than a window of 20.
        kernel_size: taps of each convolution.
        causal: use past steps only (as in the paper), or both sides.
        dropout: after each convolution.

    Raises:
        UsageError: `kernel_size` is even and the model is not causal.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int = 256,
        *,
        layers: int = 3,
        kernel_size: int = 3,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not causal and kernel_size % 2 == 0:
            raise UsageError(explain("A non-causal TCN needs an odd kernel_size: a middle tap", got=kernel_size))
        self.input_size = input_size
        self.blocks = nn.ModuleList(
            TCNBlock(before, after, kernel_size=kernel_size, dilation=2**depth, causal=causal, dropout=dropout)
            for depth, (before, after) in enumerate(pairwise([input_size, *[hidden] * layers]))
        )
        self._taps_beyond = 2 * (kernel_size - 1) * (2**layers - 1)

    @property
    def receptive_field(self) -> int:
        """Number of input steps that an output step depends on, ending at it, or centred on it if not causal."""
        return 1 + self._taps_beyond

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, input_size], inside [B, T] bool -> [B, T, hidden].

        Raises:
            ValueError: shapes disagree.
        """
        check_sequence(x, inside, self.input_size)
        x = zero_outside(x, inside).transpose(1, 2)
        for block in self.blocks:
            x = block(x, inside.unsqueeze(1))
        return x.transpose(1, 2)


class WeightNorm(nn.Module):
    """Weight normalisation, g v / |v| per output channel, stored under the names of PyTorch's own.

    PyTorch's has no rule for `torch.vmap`, which trains several runs together.
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """g [N, 1, 1], v [N, C, K] -> [N, C, K]."""
        return v * (g / v.flatten(1).norm(dim=1)[:, None, None])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, K] -> g and v."""
        return weight.flatten(1).norm(dim=1)[:, None, None], weight


class TCNBlock(nn.Module):
    """relu(x + relu(conv(relu(conv(x))))), weight-normalised, zero beyond both ends of every sequence."""

    def __init__(
        self, before: int, after: int, *, kernel_size: int, dilation: int, causal: bool, dropout: float
    ) -> None:
        super().__init__()
        reach = (kernel_size - 1) * dilation
        self.pad = (reach, 0) if causal else (reach // 2, reach // 2)
        self.first = nn.Conv1d(before, after, kernel_size, dilation=dilation)
        self.second = nn.Conv1d(after, after, kernel_size, dilation=dilation)
        for convolution in (self.first, self.second):
            register_parametrization(convolution, "weight", WeightNorm())
        self.skip = nn.Identity() if before == after else nn.Conv1d(before, after, 1)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, before, T], zero where `inside` [B, 1, T] is False -> [B, after, T], the same."""
        y = x
        for convolution in (self.first, self.second):
            y = self.dropout(torch.relu(convolution(nn.functional.pad(y, self.pad))))
            y = y * inside  # biases make padding nonzero, which the next non-causal convolution would read
        return torch.relu(y + self.skip(x)) * inside


class Transformer(nn.Module):
    """Pre-norm Transformer encoder; positions are steps, as sinusoids.

    Args:
        input_size: width of x; projected to `hidden` where they differ.
        hidden: width of the output.
        layers: encoder layers.
        heads: attention heads.
        feedforward: width of the inner layer; twice `hidden` where None.
        dropout: in attention and feed-forward layers.

    Raises:
        UsageError: `hidden` is odd or not divisible by `heads`.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int = 256,
        *,
        layers: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden % heads or hidden % 2:
            raise UsageError(explain(f"hidden ({hidden}) must be a multiple of {math.lcm(2, heads)} (heads {heads})"))
        self.input_size = input_size
        self.project = nn.Identity() if input_size == hidden else nn.Linear(input_size, hidden)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden,
                heads,
                dim_feedforward=feedforward or 2 * hidden,
                dropout=dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.positions = Sinusoids(hidden)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, input_size], inside [B, T] bool -> [B, T, hidden].

        Raises:
            ValueError: shapes disagree.
        """
        check_sequence(x, inside, self.input_size)
        y = self.project(zero_outside(x, inside))
        y = y + self.positions(torch.arange(y.shape[1], device=y.device)).to(y)
        ignored = ~inside
        ignored[:, 0] = False  # a softmax over no keys is NaN; windows of padding alone are zeroed below
        for layer in self.encoder:
            y = layer(y, src_key_padding_mask=ignored)
        return zero_outside(self.norm(y), inside)


def check_sequence(x: Tensor, inside: Tensor, width: int) -> None:
    """Raise ValueError, naming both shapes, unless x is [B, T, width] and inside [B, T]."""
    if x.ndim != 3 or x.shape[-1] != width or x.shape[:2] != inside.shape:
        raise ValueError(
            f"expected x [B, T, {width}] and inside [B, T]; got x {[*x.shape]} and inside {[*inside.shape]}"
        )


def zero_outside(x: Tensor, inside: Tensor) -> Tensor:
    """x [B, T, D] with zeros and no gradient where inside [B, T] is False, whatever was there (NaN, too)."""
    mask = inside.unsqueeze(-1)
    if torch.onnx.is_in_onnx_export():
        return torch.where(mask, x, 0)
    zeroed: Tensor = _MaskBits.apply(x, mask)
    return zeroed


class _MaskBits(torch.autograd.Function):
    """`where(mask, x, 0)` as a bitwise "and", which takes a sixth of the time on a CPU."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor) -> Tensor:
        """x [..., D], mask [..., 1] bool -> [..., D]."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        return (x.view(bits) & -mask.to(bits)).view(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the mask."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[..., D] -> [..., D]."""
        return _MaskBits.apply(grad, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """x [R, ..., D] -> [R, ..., D]."""
        pairs = zip((x, mask), in_dims, strict=True)
        return _MaskBits.apply(*(t if dim is None else t.movedim(dim, 0) for t, dim in pairs)), 0


TEMPORAL: Mapping[str, Callable[..., nn.Module]] = {
    "gru": partial(Recurrent, nn.GRU),
    "lstm": partial(Recurrent, nn.LSTM),
    "tcn": TCN,
    "transformer": Transformer,
}
