"""The recurrence that all GRU and LSTM branches share.

Branches (M of them) and their two directions are stacked along one axis of G = 2 M groups: the input products are one
matrix product for all times, a step is one batched product, and the gradient of the recurrent weights is one product at
the end. The backward direction reads its sequence through a reversed index, so padding always comes last and needs no
packed sequence, which would make the device wait for the lengths.

Weights, and so `state_dict`, are those of `nn.GRU` and `nn.LSTM`; outputs and gradients equal theirs. Under
`torch.vmap` over several runs, the networks of all runs are stacked along the same axis.
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
    if min(steps) < longest:
        sequences = [functional.pad(x, (0, 0, 0, longest - n)) for x, n in zip(sequences, steps, strict=True)]
        insides = [functional.pad(m, (0, longest - n)) for m, n in zip(insides, steps, strict=True)]
    x, inside = torch.stack(list(sequences)), torch.stack(list(insides))
    kind = GRULayer if isinstance(first, nn.GRU) else LSTMLayer
    for layer in range(first.num_layers):
        weights = (_stack(cells, f"{name}_l{layer}", x.dtype) for name in _NAMES)
        x = kind.apply(x, inside, *weights)[0]
        if layer + 1 < first.num_layers:
            x = functional.dropout(x, first.dropout, first.training) if dropout is None else dropout(x)
    return [y[:, :n] for y, n in zip(x.unbind(), steps, strict=True)]


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


def _stack(cells: Sequence[Cell], name: str, dtype: torch.dtype) -> Tensor:
    """One parameter of every network and direction, [2 M, ...]."""
    return torch.stack([getattr(cell, name + suffix) for cell in cells for suffix in ("", "_reverse")]).to(dtype)


def _reorderings(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers from [M, B, T, 2] to [T, M, 2, B], and back from [M, 2, T, B]; the second direction is reversed."""
    networks, batch, steps = inside.shape
    length = inside.sum(dim=2, keepdim=True)
    step = torch.arange(steps, device=inside.device)
    reverse = torch.where(step < length, length - 1 - step, step)  # [M, B, T], its own inverse
    source = torch.stack([step.expand_as(reverse), reverse], dim=-1)  # [M, B, T, 2]
    row = torch.arange(2 * inside.numel(), device=inside.device)
    forth = row.view(networks, batch, steps, 2).gather(2, source)
    back = row.view(networks, 2, steps, batch).permute(0, 3, 2, 1).gather(2, source)
    return forth.permute(2, 0, 3, 1).reshape(-1), back.reshape(-1)


class RecurrentLayer(torch.autograd.Function):
    """One layer of all networks; the networks of several runs are stacked under `torch.vmap`.

    `forward` returns the states and what `backward` needs beside them; the latter has no gradient. What the products
    of a step change in place is [T, G, B, ...], one piece of memory per step. What they read is [G, T, B, ...], one
    matrix per group for the products over all times.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep x, w, u and all results but the states in the order of the input."""
        x, _, w, u, _, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # otherwise autograd creates zeros of the size of what is kept
        ctx.save_for_backward(x, w, u, *output[1:])

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
        """R runs of M networks are R M networks."""
        pairs = zip(inputs, in_dims, strict=True)
        runs = [x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]
        states, *kept = cls.apply(*(x.flatten(0, 1) for x in runs))
        return (states.unflatten(0, (info.batch_size, -1)), *kept), (0, *(None for _ in kept))


def _input_products(x: Tensor, w: Tensor, bias: Tensor, forth: Tensor) -> Tensor:
    """x [M, B, T, D], w [2 M, K, D], bias [2 M, K] -> [T, 2 M, B, K], a new tensor."""
    networks, batch, steps, size = x.shape
    groups, gates, _ = w.shape
    rows, weights = x.reshape(networks, -1, size), w.view(networks, -1, size).transpose(1, 2)
    products = torch.baddbmm(bias.view(networks, 1, -1), rows, weights)
    return products.view(-1, gates).index_select(0, forth).view(steps, groups, batch, gates)


def _input_gradients(grad: Tensor, x: Tensor, w: Tensor, back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the products [2 M, T, B, K] -> those of x [M, B, T, D], w [2 M, K, D] and its bias [2 M, K]."""
    networks, size = len(x), x.shape[-1]
    rows = grad.view(-1, grad.shape[-1]).index_select(0, back).view(networks, -1, 2 * grad.shape[-1])
    of_x = torch.bmm(rows, w.view(networks, -1, size)).view_as(x)
    of_w = torch.bmm(rows.transpose(1, 2), x.reshape(networks, -1, size)).view_as(w)
    return of_x, of_w, rows.sum(dim=1).view(len(w), -1)


def _recurrent_gradient(gates: Tensor, states: Tensor) -> Tensor:
    """Gradients of the recurrent products [G, T, B, K] and states [G, T, B, H] -> gradient of u [G, K, H]."""
    after, before = gates[:, 1:].flatten(1, 2), states[:, :-1].flatten(1, 2)
    return torch.bmm(after.transpose(1, 2), before)


class GRULayer(RecurrentLayer):
    """A bidirectional layer of GRUs; states start at zero.

    Source: r, z = sigmoid(x + h u), n = tanh(x + r (h u)), h' = n + z (h - n), as `nn.GRU` documents them.
    """

    @staticmethod
    def forward(x: Tensor, inside: Tensor, w: Tensor, u: Tensor, bias_w: Tensor, bias_u: Tensor) -> tuple[Tensor, ...]:
        """Compute all states.

        Args:
            x: [M, B, T, D].
            inside: [M, B, T] bool.
            w, u: [2 M, 3 H, D] and [2 M, 3 H, H], in the order r, z, n.
            bias_w, bias_u: [2 M, 3 H].

        Returns:
            States [M, B, T, 2 H]; what is kept.
        """
        size = u.shape[-1]
        forth, back = _reorderings(inside)
        bias = bias_w.clone()
        bias[:, : 2 * size] += bias_u[:, : 2 * size]
        gates = _input_products(x, w, bias, forth)  # becomes r, z and the recurrent product of n
        new = 2 * gates[..., 2 * size :]
        gates[..., 2 * size :] = bias_u[:, None, 2 * size :]
        steps, groups, batch, _ = new.shape
        states = new.new_empty(groups, steps, batch, size)
        state, turned, minus_one = torch.zeros_like(new[0]), u.transpose(1, 2), new.new_full((), -1)
        # Views of all steps at once: a step is short, and making a view takes as long as using it.
        reset, update, recurrent = (part.unbind() for part in gates.split(size, dim=-1))
        each = zip(gates.unbind(), gates[..., : 2 * size].unbind(), new.unbind(), states.unbind(1), strict=True)
        for t, (at, opening, fresh, after) in enumerate(each):
            at.baddbmm_(state, turned)
            opening.sigmoid_()
            # tanh(a) = 2 sigmoid(2 a) - 1, which takes less than half of the time of tanh
            fresh.addcmul_(reset[t], recurrent[t], value=2).sigmoid_()
            torch.add(minus_one, fresh, alpha=2, out=fresh)
            state = torch.lerp(fresh, state, update[t], out=after)
        output = states.view(-1, size).index_select(0, back).view(*x.shape[:-1], 2 * size)
        return output, states, gates, new, forth, back

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """[M, B, T, 2 H] -> gradients of the inputs of `forward`."""
        x, w, u, states, gates, new, forth, back = ctx.saved_tensors
        size = u.shape[-1]
        reset, update, recurrent = gates.split(size, dim=-1)
        # The gates' gradients are these factors times the state's, so that a step is two products.
        slope = torch.addcmul(torch.ones_like(new[0, 0]), new, new, value=-1)
        of_new = torch.addcmul(slope, slope, update, value=-1)
        factor = states.new_empty(*states.shape[:-1], 3 * size)
        of_reset, of_update, of_recurrent = (part.transpose(0, 1) for part in factor.split(size, dim=-1))
        torch.mul(of_new, reset, out=of_recurrent)
        product = of_recurrent * recurrent
        torch.addcmul(product, product, reset, value=-1, out=of_reset)
        moved = states.transpose(0, 1) - new  # z (h - n)
        torch.addcmul(moved, moved, update, value=-1, out=of_update)
        flows = grad.reshape(-1, size).index_select(0, forth).view_as(new)
        at, stays = flows.unbind(), update.unbind()
        at_gates, to_state = factor.unflatten(-1, (3, size)).unbind(1), factor.unbind(1)
        for_gates = flows.unsqueeze(-2).unbind()
        for t in range(len(at) - 1, -1, -1):
            at_gates[t].mul_(for_gates[t])
            if t:
                at[t - 1].addcmul_(at[t], stays[t]).baddbmm_(to_state[t], u)
        of_u = _recurrent_gradient(factor, states)
        of_bias = factor[..., 2 * size :].flatten(1, 2).sum(dim=1)
        torch.mul(of_new, flows, out=of_recurrent)  # the gates of the input differ in n only
        of_x, of_w, of_bias_w = _input_gradients(factor, x, w, back)
        return of_x, None, of_w, of_u, of_bias_w, torch.cat([of_bias_w[:, : 2 * size], of_bias], dim=1)


class LSTMLayer(RecurrentLayer):
    """A bidirectional layer of LSTMs; states start at zero.

    Source: i, f, o = sigmoid(x + h u), g = tanh(x + h u), c' = f c + i g, h' = o tanh(c'), as `nn.LSTM` documents them.
    """

    @staticmethod
    def forward(x: Tensor, inside: Tensor, w: Tensor, u: Tensor, bias_w: Tensor, bias_u: Tensor) -> tuple[Tensor, ...]:
        """As `GRULayer.forward`, with weights in the order i, f, g, o."""
        size = u.shape[-1]
        forth, back = _reorderings(inside)
        gates = _input_products(x, w, bias_w + bias_u, forth)
        steps, groups, batch, _ = gates.shape
        states, cells = (gates.new_empty(groups, steps, batch, size) for _ in range(2))
        cell = state = gates.new_zeros(groups, batch, size)
        turned = u.transpose(1, 2)
        for at, after, cell_after in zip(gates.unbind(), states.unbind(1), cells.unbind(1), strict=True):
            at.baddbmm_(state, turned)
            i, f, g, o = at.split(size, dim=-1)
            at[..., : 2 * size].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            cell = torch.addcmul(i * g, f, cell, out=cell_after)
            state = torch.mul(o, cell.tanh(), out=after)
        output = states.view(-1, size).index_select(0, back).view(*x.shape[:-1], 2 * size)
        return output, states, cells, gates, forth, back

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """[M, B, T, 2 H] -> gradients of the inputs of `forward`."""
        x, w, u, states, cells, gates, forth, back = ctx.saved_tensors
        size = u.shape[-1]
        i, f, g, o = gates.transpose(0, 1).split(size, dim=-1)
        squashed = cells.tanh()
        # Gradients of i, f, g are these factors times the cell's, that of o times the state's.
        factor = states.new_empty(*states.shape[:-1], 4 * size)
        of_i, of_f, of_g, of_o = factor.split(size, dim=-1)
        torch.mul(g * i, 1 - i, out=of_i)
        torch.mul(f[:, 1:] * cells[:, :-1], 1 - f[:, 1:], out=of_f[:, 1:])
        of_f[:, 0] = 0
        torch.mul(i, 1 - g * g, out=of_g)
        torch.mul(squashed * o, 1 - o, out=of_o)
        to_cell = o * (1 - squashed * squashed)
        flows = grad.reshape(-1, size).index_select(0, forth).view(*gates.shape[:-1], size).unbind()
        cell_flow = torch.zeros_like(flows[0])
        for t in range(len(flows) - 1, -1, -1):
            cell_flow = torch.addcmul(cell_flow, flows[t], to_cell[:, t])
            factor[:, t, :, : 3 * size].unflatten(-1, (3, size)).mul_(cell_flow.unsqueeze(-2))
            of_o[:, t].mul_(flows[t])
            if t:
                flows[t - 1].baddbmm_(factor[:, t], u)
                cell_flow = cell_flow * f[:, t]
        of_x, of_w, of_bias = _input_gradients(factor, x, w, back)
        return of_x, None, of_w, _recurrent_gradient(factor, states), of_bias, of_bias.clone()
