"""Temporal models: a sequence per window -> a sequence of the same length that knows its context.

All have one face: `forward(x [B, T, input_size], inside [B, T]) -> [B, T, hidden]`, zeros at padding, and nothing at
padding is ever read. Source: arXiv 2603.13415, eq. 1 (BiGRU) and table 2 (TCN); LSTM and Transformer are ours.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vaflow.errors import UsageError, explain
from vaflow.train.batch import lengths


class Recurrent(nn.Module):
    """Bidirectional GRU or LSTM over packed sequences: the backward direction starts at the last real step.

    Args:
        cell: `nn.GRU` or `nn.LSTM`.
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
            raise UsageError(
                explain("A bidirectional model halves its width", expected="an even hidden width", got=hidden)
            )
        width = hidden // 2 if per_direction is None else per_direction
        self.input_size = input_size
        self.rnn = cell(
            input_size,
            width,
            layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if layers > 1 else 0.0,
        )
        self.back = nn.Identity() if 2 * width == hidden else nn.Linear(2 * width, hidden)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, input_size], inside [B, T] bool with its False entries at the end -> [B, T, hidden].

        Raises:
            ValueError: shapes disagree.
        """
        check_sequence(x, inside, self.input_size)
        count = lengths(inside).clamp(min=1)  # a window of padding alone runs over one zero; it is zeroed below
        packed = pack_padded_sequence(zero_outside(x, inside), count, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return zero_outside(self.back(out), inside)


class TCN(nn.Module):
    """Residual blocks of two dilated convolutions each; the dilation doubles from block to block.

    Args:
        input_size: width of x.
        hidden: width of the output.
        layers: residual blocks. Three blocks of width 3 see 29 steps: more than a window of 20.
        kernel_size: taps of each convolution.
        causal: look back only (the paper's TCNs), or to both sides.
        dropout: after each convolution.

    Raises:
        UsageError: `kernel_size` is even and the model is not causal: there is no middle tap.
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
            raise UsageError(explain("A non-causal TCN needs a middle tap", expected="an odd width", got=kernel_size))
        self.input_size = input_size
        self.blocks = nn.ModuleList(
            TCNBlock(before, after, kernel_size=kernel_size, dilation=2**depth, causal=causal, dropout=dropout)
            for depth, (before, after) in enumerate(pairwise([input_size, *[hidden] * layers]))
        )
        self._taps_beyond = 2 * (kernel_size - 1) * (2**layers - 1)

    @property
    def receptive_field(self) -> int:
        """How many steps of x one step of the output depends on: the last of them, or centred if not causal."""
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


class TCNBlock(nn.Module):
    """relu(x + relu(conv(relu(conv(x))))), weight-normalised, zero beyond both ends of every sequence."""

    def __init__(
        self, before: int, after: int, *, kernel_size: int, dilation: int, causal: bool, dropout: float
    ) -> None:
        super().__init__()
        reach = (kernel_size - 1) * dilation
        self.pad = (reach, 0) if causal else (reach // 2, reach // 2)
        self.first = weight_norm(nn.Conv1d(before, after, kernel_size, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(after, after, kernel_size, dilation=dilation))
        self.skip = nn.Identity() if before == after else nn.Conv1d(before, after, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, before, T], zero where `inside` [B, 1, T] is False -> [B, after, T], the same."""
        y = x
        for convolution in (self.first, self.second):
            y = self.dropout(torch.relu(convolution(nn.functional.pad(y, self.pad))))
            y = y * inside  # biases would make padding speak to the next, non-causal, convolution
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
            raise UsageError(
                explain(
                    "The width must be even and be shared evenly by the heads",
                    expected=f"a multiple of {math.lcm(2, heads)}",
                    got=hidden,
                )
            )
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

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, input_size], inside [B, T] bool -> [B, T, hidden].

        Raises:
            ValueError: shapes disagree.
        """
        check_sequence(x, inside, self.input_size)
        y = self.project(zero_outside(x, inside))
        y = y + sinusoids(y.shape[1], y.shape[2]).to(y)
        hidden = ~inside
        hidden[:, 0] = False  # a softmax over no key at all is NaN; windows of padding alone are zeroed below
        for layer in self.encoder:
            y = layer(y, src_key_padding_mask=hidden)
        return zero_outside(self.norm(y), inside)


def sinusoids(steps: int, width: int) -> Tensor:
    """[steps, width] float32: sines in the first half, cosines in the second, wavelengths 2 pi to 20,000 pi steps."""
    half = width // 2
    rate = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
    angle = torch.arange(steps).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def check_sequence(x: Tensor, inside: Tensor, width: int) -> None:
    """Raise ValueError, naming both shapes, unless x is [B, T, width] and inside [B, T]."""
    if x.ndim != 3 or x.shape[-1] != width or x.shape[:2] != inside.shape:
        raise ValueError(
            f"expected x [B, T, {width}] and inside [B, T]; got x {[*x.shape]} and inside {[*inside.shape]}"
        )


def zero_outside(x: Tensor, inside: Tensor) -> Tensor:
    """x [B, T, D] with zeros, and no gradient, where inside [B, T] is False; NaN there does not survive."""
    return torch.where(inside.unsqueeze(-1), x, 0)


TEMPORAL: Mapping[str, Callable[..., nn.Module]] = {
    "gru": partial(Recurrent, nn.GRU),
    "lstm": partial(Recurrent, nn.LSTM),
    "tcn": TCN,
    "transformer": Transformer,
}
