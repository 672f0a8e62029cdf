"""Temporal models equal each sequence alone and loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_batches import inside_mask

from vaflow.errors import UsageError
from vaflow.train.heads.temporal import TCN, TEMPORAL, Recurrent, Sinusoids, Transformer

LENGTHS = (9, 4, 1, 6)
WIDTH, HIDDEN = 6, 8
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TEMPORAL},
    "tcn both ways": ("tcn", {"causal": False}),
    "tcn wide": ("tcn", {"kernel_size": 5, "layers": 2}),
    "gru stacked": ("gru", {"layers": 2}),
    "gru projected": ("gru", {"per_direction": 7}),
    "lstm projected": ("lstm", {"per_direction": 3, "layers": 2}),
    "transformer deep": ("transformer", {"layers": 3, "heads": 2, "feedforward": 5}),
}
models = pytest.mark.parametrize("case", MODELS)


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = MODELS[case]
    return TEMPORAL[name](WIDTH, HIDDEN, **options).double()


def ragged(junk: float = 0.0, extra: int = 0) -> tuple[Tensor, Tensor]:
    inside = inside_mask(LENGTHS, max(LENGTHS) + extra)
    x = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = nn.functional.pad(x, (0, 0, 0, extra))
    return torch.where(inside.unsqueeze(-1), x, junk), inside


@models
@pytest.mark.parametrize("training", [False, True])
def test_a_padded_batch_equals_each_sequence_alone(case, training):
    model = build(case).train(training)
    x, inside = ragged(junk=float("nan"), extra=5)
    together = model(x, inside)
    assert together.shape == (len(LENGTHS), max(LENGTHS) + 5, HIDDEN)
    assert (together[~inside] == 0).all()
    for row, length in enumerate(LENGTHS):
        alone = model(x[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
        torch.testing.assert_close(together[row, :length], alone[0])


@models
@pytest.mark.parametrize("junk", [1e6, float("nan")])
def test_padding_changes_no_gradient(case, junk):
    model = build(case)
    gradients = []
    for x, inside in (ragged(), ragged(junk, extra=3)):
        x.requires_grad_()
        weights = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
        loss = ((model(x, inside) * weights).sum(-1) * torch.arange(1, 1 + inside.shape[1])).sum()
        computed = torch.autograd.grad(loss, [x, *model.parameters()])
        assert (computed[0][~inside] == 0).all()
        gradients.append([computed[0][:, : max(LENGTHS)], *computed[1:]])
    for plain, padded in zip(*gradients, strict=True):
        assert torch.isfinite(padded).all()
        torch.testing.assert_close(padded, plain)


@models
def test_a_window_of_only_padding_outputs_zeros_and_no_gradient(case):
    model = build(case)
    x, inside = ragged()
    inside[1] = False
    out = model(x, inside)
    assert (out[1] == 0).all()
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@models
def test_mismatched_shapes_are_reported(case):
    model = build(case)
    x, inside = ragged()
    for wrong_x, wrong_inside in ((x, inside[:, 1:]), (x[..., 1:], inside), (x[0], inside)):
        with pytest.raises(ValueError) as error:
            model(wrong_x, wrong_inside)
        assert str([*wrong_x.shape]) in str(error.value)
        assert str([*wrong_inside.shape]) in str(error.value)


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_the_backward_direction_starts_at_the_last_real_step(cell):
    """Reference: each direction as a unidirectional network over one sequence, the second over the reversed one."""
    torch.manual_seed(0)
    model = Recurrent(cell, WIDTH, HIDDEN).double()
    directions = []
    for suffix in ("", "_reverse"):
        lstm = cell(WIDTH, HIDDEN // 2, batch_first=True).double()
        lstm.load_state_dict({name: getattr(model.rnn, name + suffix) for name in lstm.state_dict()})
        directions.append(lstm)
    x, inside = ragged(junk=1e6)
    out = model(x, inside)
    for row, length in enumerate(LENGTHS):
        sequence = x[row : row + 1, :length]
        forth, back = directions[0](sequence)[0], directions[1](sequence.flip(1))[0].flip(1)
        torch.testing.assert_close(out[row : row + 1, :length], torch.cat([forth, back], dim=-1))


def test_directions_of_another_width_are_projected_back():
    model = Recurrent(nn.GRU, WIDTH, HIDDEN, per_direction=HIDDEN).double()
    x, inside = ragged()
    raw = model.rnn(x[:1])[0]  # the first sequence has no padding
    expected = raw @ model.back.weight.T + model.back.bias
    torch.testing.assert_close(model(x, inside)[:1], expected)


def naive_convolution(x: np.ndarray, convolution: Any, dilation: int, causal: bool) -> np.ndarray:
    """Reference dilated convolution [T, C] -> [T, C'], zeros beyond the ends."""
    weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
    taps = weight.shape[2]
    out = np.tile(bias, (len(x), 1))
    for t in range(len(x)):
        for tap in range(taps):
            source = t + (tap - (taps - 1 if causal else taps // 2)) * dilation
            if 0 <= source < len(x):
                out[t] += weight[:, :, tap] @ x[source]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_tcn_equals_a_stack_of_dilated_convolutions(causal):
    torch.manual_seed(0)
    model = TCN(WIDTH, HIDDEN, layers=3, kernel_size=3, causal=causal).double()
    x, inside = ragged(junk=1e6)
    out = model(x, inside).detach().numpy()
    for row, length in enumerate(LENGTHS):
        y = x[row, :length].numpy()
        block: Any
        for depth, block in enumerate(model.blocks):
            inner = np.maximum(naive_convolution(y, block.first, 2**depth, causal), 0)
            inner = np.maximum(naive_convolution(inner, block.second, 2**depth, causal), 0)
            skip = y if isinstance(block.skip, nn.Identity) else naive_convolution(y, block.skip, 1, causal)
            y = np.maximum(inner + skip, 0)
        np.testing.assert_allclose(out[row, :length], y, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("layers", "kernel_size"), [(1, 3), (2, 3), (3, 3), (2, 5)])
def test_receptive_field_equals_the_dependencies_of_one_step(causal, layers, kernel_size):
    torch.manual_seed(0)
    model = TCN(4, 32, layers=layers, kernel_size=kernel_size, causal=causal).double()
    middle, steps = 40, 81
    x = torch.randn(1, steps, 4, dtype=torch.float64)
    inside = torch.ones(1, steps, dtype=torch.bool)
    with torch.no_grad():
        base = model(x, inside)[0, middle]
        moved = []
        for t in range(steps):
            other = x.clone()
            other[0, t] += 1
            moved.append(not torch.equal(model(other, inside)[0, middle], base))
    reach = model.receptive_field
    first = middle - reach + 1 if causal else middle - reach // 2
    assert moved == [first <= t < first + reach for t in range(steps)]


def test_transformer_layer_equals_a_reference_implementation():
    """Reference pre-norm layer with sinusoidal positions."""
    torch.manual_seed(0)
    model = Transformer(WIDTH, HIDDEN, layers=1, heads=2).double().eval()
    x, inside = ragged(junk=1e6)
    out = model(x, inside)
    layer: Any = model.encoder[0]
    for row, length in enumerate(LENGTHS):
        y = model.project(x[row, :length]) + Sinusoids(HIDDEN)(torch.arange(length))
        attention = layer.self_attn
        q, k, v = (layer.norm1(y) @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
        heads = [
            torch.softmax(a @ b.T / math.sqrt(HIDDEN / 2), dim=-1) @ c
            for a, b, c in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True)
        ]
        y = y + attention.out_proj(torch.cat(heads, dim=-1))
        y = y + layer.linear2(nn.functional.gelu(layer.linear1(layer.norm2(y))))
        torch.testing.assert_close(out[row, :length], model.norm(y))


def test_sinusoids_equal_a_loop():
    table = Sinusoids(6)(torch.arange(7))
    for step in range(7):
        for i in range(3):
            angle = step / 10_000 ** (i / 3)
            assert table[step, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[step, 3 + i] == pytest.approx(math.cos(angle), abs=1e-6)


def test_invalid_widths_are_rejected():
    with pytest.raises(UsageError, match="even"):
        Recurrent(nn.GRU, 4, 7)
    with pytest.raises(UsageError, match="middle tap"):
        TCN(4, 8, causal=False, kernel_size=4)
    with pytest.raises(UsageError, match="multiple of 4"):
        Transformer(4, 10, heads=4)
