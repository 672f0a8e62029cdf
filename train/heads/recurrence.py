"""The recurrence that all GRU and LSTM branches share.

Branches (M of them) and their two directions are stacked along one axis of G = 2 M groups: the input products are one
matrix product for all times, a step is one batched product, and the gradient of the recurrent weights is one product at
the end. The backward direction reads its sequence through a reversed index, so padding always comes last and needs no
packed sequence, which would make the device wait for the lengths.

Weights, and so `state_dict`, are those of `nn.GRU` and `nn.LSTM`; outputs and gradients equal theirs. Under
`torch.vmap` over several runs, the groups of all runs are stacked along the same axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Cell = nn.GRU | nn.LSTM


def run_recurrent(
    cells: Sequence[Cell],
    sequences: Sequence[Tensor],
    insides: Sequence[Tensor],
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Run bidirectional recurrent networks of one shape together.

    Args:
        cells: the networks; `batch_first`, bidirectional, equal in type, sizes, layers and dropout.
        sequences: [B, T, D] per network, finite at padding; T may differ.
        insides: [B, T] bool per network, with its False entries at the end.
        dropout: between stacked layers; None: that of the first network.

    Returns:
        [B, T, 2 H] per network: both directions side by side; arbitrary finite numbers at padding.
    """
    if torch.onnx.is_in_onnx_export():
        return [_run_by_library(cell, x, inside) for cell, x, inside in zip(cells, sequences, insides, strict=True)]
    first = cells[0]
    steps = [x.shape[1] for x in sequences]
    longest = max(steps)
    x = torch.stack([functional.pad(x, (0, 0, 0, longest - n)) for x, n in zip(sequences, steps, strict=True)])
    inside = torch.stack([functional.pad(m, (0, longest - n)) for m, n in zip(insides, steps, strict=True)])
    forth, back = _reorderings(inside)
    scan = GRUScan if isinstance(first, nn.GRU) else LSTMScan
    for layer in range(first.num_layers):
        w, u, bias_w, bias_u = (_stack(cells, f"{name}_l{layer}", x.dtype) for name in _NAMES)
        x = _run_layer(scan, x, w, u, bias_w, bias_u, forth, back)
        if layer + 1 < first.num_layers:
            x = functional.dropout(x, first.dropout, first.training) if dropout is None else dropout(x)
    return [y[:, :n] for y, n in zip(x, steps, strict=True)]


def _run_by_library(cell: Cell, x: Tensor, inside: Tensor) -> Tensor:
    """Run one network with PyTorch's operators, which export to ONNX: x [B, T, D] -> [B, T, 2 H]; no dropout."""
    length = inside.sum(dim=1, keepdim=True)
    step = torch.arange(inside.shape[1], device=inside.device)
    reverse = torch.where(step < length, length - 1 - step, step).unsqueeze(-1)  # [B, T, 1], its own inverse
    zero = x.new_zeros(1, x.shape[0], cell.hidden_size)
    for layer in range(cell.num_layers):
        states = []
        for suffix in ("", "_reverse"):
            entering = x.gather(1, reverse.expand(-1, -1, x.shape[2])) if suffix else x
            weights = [getattr(cell, f"{name}_l{layer}{suffix}") for name in _NAMES]
            options = (weights, True, 1, 0.0, False, False, True)  # biases, layers, dropout, training, both ways, batch
            if isinstance(cell, nn.GRU):
                state = torch.gru(entering, zero, *options)[0]
            else:
                state = torch.lstm(entering, (zero, zero), *options)[0]
            states.append(state.gather(1, reverse.expand(-1, -1, cell.hidden_size)) if suffix else state)
        x = torch.cat(states, dim=-1)
    return x


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _run_layer(
    scan: type["Scan"],
    x: Tensor,
    w: Tensor,
    u: Tensor,
    bias_w: Tensor,
    bias_u: Tensor,
    forth: Tensor,
    back: Tensor,
) -> Tensor:
    """One layer of all networks, x [M, B, T, D] -> [M, B, T, 2 H]; weights have the leading axis G."""
    networks, batch, steps, size = x.shape
    gates, hidden = u.shape[1:]
    products = torch.baddbmm(
        bias_w.view(networks, 1, 2 * gates),
        x.reshape(networks, batch * steps, size),
        w.view(networks, 2 * gates, size).transpose(1, 2),
    )
    entering = Reorder.apply(products.reshape(-1, gates), forth, back).view(2 * networks, steps, batch, gates)
    states = scan.apply(entering, u, bias_u)[0]
    return Reorder.apply(states.view(-1, hidden), back, forth).view(networks, batch, steps, 2 * hidden)


def _stack(cells: Sequence[Cell], name: str, dtype: torch.dtype) -> Tensor:
    """One parameter of every network and direction, [2 M, ...]."""
    return torch.stack([getattr(cell, name + suffix) for cell in cells for suffix in ("", "_reverse")]).to(dtype)


def _reorderings(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers that take [M, B, T, 2] to [M, 2, T, B] with the second direction reversed, and back."""
    networks, batch, steps = inside.shape
    length = inside.sum(dim=2, keepdim=True)
    step = torch.arange(steps, device=inside.device)
    reverse = torch.where(step < length, length - 1 - step, step)  # [M, B, T], its own inverse
    source = torch.stack([step.expand_as(reverse), reverse], dim=-1)  # [M, B, T, 2]
    way = torch.arange(2, device=inside.device)
    network = torch.arange(networks, device=inside.device)[:, None, None, None]
    row = torch.arange(batch, device=inside.device)[:, None, None]
    forth = ((network * batch + row) * steps + source) * 2 + way
    back = ((network * 2 + way) * steps + source) * batch + row
    return forth.permute(0, 3, 2, 1).reshape(-1), back.reshape(-1)


class Reorder(torch.autograd.Function):
    """Rows of a matrix in another order; the gradient is a gather, too, not a scattered addition."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """x [N, D], order [N] and its inverse -> x[order]."""
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the inverse."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Restore the original order of the rows."""
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        """The rows of all runs as one matrix."""
        x, order, inverse = _runs_first(info.batch_size, in_dims, inputs)
        first = (torch.arange(len(x), device=x.device) * x.shape[1]).unsqueeze(1)
        rows = Reorder.apply(x.flatten(0, 1), (order + first).flatten(), (inverse + first).flatten())
        return rows.view_as(x), 0


def _runs_first(runs: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor with the axis of the runs in front, repeated where it is the same for all."""
    pairs = zip(tensors, dims, strict=True)
    return [x.expand(runs, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]


class Scan(torch.autograd.Function):
    """A recurrence over G groups; the groups of several runs are stacked under `torch.vmap`.

    `forward` returns the states and what `backward` needs beside them; the latter has no gradient.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        """Keep u, the states and what belongs to them."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # otherwise autograd creates zeros of the size of `kept`
        ctx.save_for_backward(inputs[1], *output)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
        """R runs of G groups are R G groups."""
        folded = [x.flatten(0, 1) for x in _runs_first(info.batch_size, in_dims, inputs)]
        outputs = tuple(y.unflatten(0, (info.batch_size, -1)) for y in cls.apply(*folded))
        return outputs, (0,) * len(outputs)


class GRUScan(Scan):
    """The states of G GRUs from the products of their inputs, starting at zero.

    Source: r, z = sigmoid(x + h u), n = tanh(x + r (h u)), h' = n + z (h - n), as `nn.GRU` documents them.
    """

    @staticmethod
    def forward(entering: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """entering [G, T, B, 3 H], u [G, 3 H, H], bias [G, 3 H], in the order r, z, n -> states [G, T, B, H], kept."""
        groups, steps, batch, width = entering.shape
        size = width // 3
        ut, bias_row = u.transpose(1, 2), bias.unsqueeze(1)
        # Of each step: n's recurrent product, r, z, n. Backward needs the first three for h, the last three for x.
        kept = entering.new_empty(groups, steps, batch, 4 * size)
        states = entering.new_empty(groups, steps, batch, size)
        state = entering.new_zeros(groups, batch, size)
        # Views of all steps at once: a step is short, and making a view takes as long as using it.
        at_gates, at_new = (x.unbind(1) for x in entering.split((2 * size, size), dim=-1))
        recurrent, gates, new = (x.unbind(1) for x in kept.split((size, 2 * size, size), dim=-1))
        _, reset, update, _ = (x.unbind(1) for x in kept.split(size, dim=-1))
        after = states.unbind(1)
        for t in range(steps):
            of_gates, of_new = torch.baddbmm(bias_row, state, ut).split((2 * size, size), dim=-1)
            recurrent[t].copy_(of_new)
            torch.add(at_gates[t], of_gates, out=gates[t]).sigmoid_()
            torch.addcmul(at_new[t], reset[t], of_new, out=new[t]).tanh_()
            state = torch.lerp(new[t], state, update[t], out=after[t])
        return states, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
        """[G, T, B, H] -> gradients of `entering`, `u` and `bias`."""
        u, states, kept = ctx.saved_tensors
        size = states.shape[-1]
        recurrent, r, z, n = kept.split(size, dim=-1)
        before = _shifted(states)
        # The gates' gradients are these factors times the state's, so that a step is two products.
        factor = torch.empty_like(kept)
        of_recurrent, of_r, of_z, of_n = factor.split(size, dim=-1)
        torch.mul(1 - z, 1 - n * n, out=of_n)
        torch.mul(of_n, r, out=of_recurrent)
        torch.mul(of_recurrent * recurrent, 1 - r, out=of_r)
        torch.mul((before - n) * z, 1 - z, out=of_z)
        # u's rows in the order of `kept`: n, r, z
        turned = torch.cat([u[:, 2 * size :], u[:, : 2 * size]], dim=1)
        flow = torch.zeros_like(states[:, 0])
        of_gates, to_state = factor.unflatten(-1, (4, size)).unbind(1), factor[..., : 3 * size].unbind(1)
        stays, grads = z.unbind(1), grad.unbind(1)
        for t in range(states.shape[1] - 1, -1, -1):
            flow = flow + grads[t]
            of_gates[t].mul_(flow.unsqueeze(-2))
            flow = torch.baddbmm(flow * stays[t], to_state[t], turned)
        of_u, of_bias = _weight_gradients(factor[..., : 3 * size], before)
        in_order = (torch.cat([g[:, size:], g[:, :size]], dim=1) for g in (of_u, of_bias))
        return factor[..., size:].contiguous(), *in_order  # type: ignore[return-value]


class LSTMScan(Scan):
    """The states of G LSTMs from the products of their inputs, starting at zero.

    Source: i, f, o = sigmoid(x + h u), g = tanh(x + h u), c' = f c + i g, h' = o tanh(c'), as `nn.LSTM` documents them.
    """

    @staticmethod
    def forward(entering: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """entering [G, T, B, 4 H], u [G, 4 H, H], bias [G, 4 H], as i, f, g, o -> states [G, T, B, H], cells, gates."""
        groups, steps, batch, width = entering.shape
        size = width // 4
        ut = u.transpose(1, 2)
        gates = entering + bias[:, None, None]
        states, cells = (entering.new_empty(groups, steps, batch, size) for _ in range(2))
        state = cell = entering.new_zeros(groups, batch, size)
        for t in range(steps):
            at = gates[:, t]
            at.add_(torch.bmm(state, ut))
            i, f, g, o = at.split(size, dim=-1)
            at[..., : 2 * size].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.addcmul(i * g, f, cell, out=cells[:, t])
            cell = cells[:, t]
            torch.mul(o, cell.tanh(), out=states[:, t])
            state = states[:, t]
        return states, cells, gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor]:
        """[G, T, B, H] -> gradients of `entering`, `u` and `bias`."""
        u, states, cells, gates = ctx.saved_tensors
        size = states.shape[-1]
        i, f, g, o = gates.split(size, dim=-1)
        before, squashed = _shifted(states), cells.tanh()
        # Gradients of i, f, g are these factors times the cell's, that of o times the state's.
        factor = torch.empty_like(gates)
        of_i, of_f, of_g, of_o = factor.split(size, dim=-1)
        torch.mul(g * i, 1 - i, out=of_i)
        torch.mul(_shifted(cells) * f, 1 - f, out=of_f)
        torch.mul(i, 1 - g * g, out=of_g)
        torch.mul(squashed * o, 1 - o, out=of_o)
        to_cell = o * (1 - squashed * squashed)
        flow = torch.zeros_like(states[:, 0])
        cell_flow = torch.zeros_like(flow)
        for t in range(states.shape[1] - 1, -1, -1):
            flow = flow + grad[:, t]
            cell_flow = torch.addcmul(cell_flow, flow, to_cell[:, t])
            factor[:, t, :, : 3 * size].unflatten(-1, (3, size)).mul_(cell_flow.unsqueeze(-2))
            of_o[:, t].mul_(flow)
            flow = torch.bmm(factor[:, t], u)
            cell_flow = cell_flow * f[:, t]
        return factor, *_weight_gradients(factor, before)


def _shifted(states: Tensor) -> Tensor:
    """[G, T, B, H] one step later: zeros first, the last one left out."""
    return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)


def _weight_gradients(gates: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Gates' gradients [G, T, B, K] and the states before [G, T, B, H] -> those of u [G, K, H] and bias [G, K]."""
    flat = gates.flatten(1, 2)
    return torch.bmm(flat.transpose(1, 2), before.flatten(1, 2)), flat.sum(dim=1)
