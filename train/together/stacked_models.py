"""Models of one architecture as one model with a leading axis of runs.

The forward pass and the loss run under `torch.vmap`; parameters are stacked, and the parameters of each model are views
of the stack, so its optimizer, its state dict and its evaluation work as those of a model alone.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vaflow.train.batch import Batch, ExtraTargets
from vaflow.train.config import TrainConfig
from vaflow.train.losses import total_loss

WEIGHTS = ("kl_weight", "centers", "sigma", "mse_weight", "ccc_weight", "extra_weight", "nll_weight")


class StackedModels:
    """Several models that take their steps together.

    Args:
        models: of one architecture, on one device.
        configs: settings per model; `hard` labels and which weights are 0 must agree.

    Attributes:
        generators: random numbers of each run's dropout.
    """

    def __init__(self, models: Sequence[nn.Module], configs: Sequence[TrainConfig]) -> None:
        device = next(models[0].parameters()).device
        self.models = tuple(models)
        self.generators = tuple(Generator(device) for _ in models)
        self._active: list[int] = []  # runs of the present step; the dropout modules share the list
        self._template = _with_dropout_per_run(models, self.generators, self._active)
        self._parameters: dict[str, Tensor] = {}
        for name, parameter in models[0].named_parameters():
            stacked = torch.stack([model.get_parameter(name).detach() for model in models])
            self._parameters[name] = stacked.requires_grad_(parameter.requires_grad)
        for name, stacked in self._parameters.items():
            for model, values in zip(models, stacked.detach().unbind(), strict=True):
                model.get_parameter(name).data = values
        buffers = [dict(model.named_buffers()) for model in models]
        self._buffers = {name: torch.stack([tensors[name] for tensors in buffers]) for name in buffers[0]}
        self._weights: dict[str, Any] = {
            name: torch.tensor([float(getattr(config, name)) for config in configs], device=device)
            for name in WEIGHTS
            if name not in ("mse_weight", "nll_weight") or getattr(configs[0], name)
        }
        self._hard = configs[0].region_labels == "hard"

    def losses(self, batches: Batch, runs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        """Losses of some models, [R], their parts, [R] each, and the stacked parameters that they depend on.

        Args:
            batches: a batch per run, every tensor with a leading axis of R runs.
            runs: [R] numbers of the models, ascending.
        """
        tensors, tasks = _tensors_of(batches)
        self._active[:] = runs
        parameters, buffers, weights = self._parameters, self._buffers, self._weights
        if len(runs) < len(self.models):
            buffers, weights = ({n: _rows(x, runs) for n, x in part.items()} for part in (buffers, weights))
            parameters = {n: _rows(p.detach(), runs).requires_grad_(p.requires_grad) for n, p in parameters.items()}

        def one(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: dict[str, Any], weights: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            extra = {name: ExtraTargets(tasks[name], **parts) for name, parts in batch["extra"].items()}
            windows = Batch(**{**batch, "extra": extra})
            output = functional_call(self._template, (parameters, buffers), (windows,))
            return total_loss(output, windows, hard=self._hard, **weights)

        with _MatrixProducts():
            losses, parts = torch.vmap(one)(parameters, buffers, tensors, weights)
        return losses, parts, parameters

    def backward(self, batches: Batch, runs: Sequence[int]) -> dict[str, Tensor]:
        """Set the gradients of the parameters of some models; returns the parts of their losses, [R] each.

        The arguments are those of `losses`.
        """
        losses, parts, parameters = self.losses(batches, runs)
        for stacked in parameters.values():
            stacked.grad = None
        losses.sum().backward()
        for name, stacked in parameters.items():
            gradients = [None] * len(runs) if stacked.grad is None else stacked.grad.unbind()
            for run, gradient in zip(runs, gradients, strict=True):
                self.models[run].get_parameter(name).grad = gradient
        return parts


def _rows(stacked: Tensor, runs: Sequence[int]) -> Tensor:
    """Some rows of a tensor; an index tensor would have to be copied to the device."""
    return torch.stack([stacked[run] for run in runs])


def stacked_batch(batch: Batch, runs: int) -> Batch:
    """A batch of the windows of `runs` runs, one run after the other, with a leading axis of runs."""

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (runs, -1))

    plain = {name: split(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    nested = {
        name: {key: split(value) for key, value in getattr(batch, name).items()}
        for name in ("features", "valid", "feature_inside", "feature_time")
    }
    extra = {
        name: ExtraTargets(targets.task, split(targets.value), split(targets.labelled))
        for name, targets in batch.extra.items()
    }
    return replace(batch, **plain, **nested, extra=extra)  # type: ignore[arg-type]


def _tensors_of(batch: Batch) -> tuple[dict[str, Any], dict[str, str]]:
    """The batch as nested dictionaries of tensors, and the task of each further target."""
    extra = {name: {"value": t.value, "labelled": t.labelled} for name, t in batch.extra.items()}
    fields = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(batch).items()}
    return {**fields, "extra": extra}, {name: targets.task for name, targets in batch.extra.items()}


class _MatrixProducts(TorchFunctionMode):
    """Products [..., N, D] x [D, H] as products of two matrices.

    `torch.vmap` would otherwise repeat the matrix for every window of every run.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or its product on a flattened first operand."""
        if func is functional.multi_head_attention_forward:
            return _attend(*args, **(kwargs or {})), None
        if func in _PRODUCTS and args[0].ndim > 2 and args[1].ndim == 2:
            matrix = args[1].T if func is functional.linear else args[1]
            return _product(args[0], matrix, *args[2:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., N, D], matrix [D, H], bias [H] -> [..., N, H]."""
    rows = x.flatten(0, -2)
    product = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    return product.unflatten(0, x.shape[:-1])


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    width: int,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    *unused: Any,
    key_padding_mask: Tensor,
    **options: Any,
) -> Tensor:
    """`multi_head_attention_forward` as the heads call it: query [F, B, H], keys [S, B, H] -> [F, B, H]."""
    inputs = zip((query, keys, values), weight.chunk(3), bias.chunk(3), strict=True)
    size = width // heads
    q, k, v = (_product(x, w.T, b).unflatten(-1, (heads, size)).permute(1, 2, 0, 3) for x, w, b in inputs)
    mask = key_padding_mask[:, None, None]  # added to the scores: -inf, or 0
    result = torch.softmax(q @ k.transpose(-1, -2) * size**-0.5 + mask, dim=-1) @ v
    _, _, _, _, out_weight, out_bias = unused
    return _product(result.permute(2, 0, 1, 3).flatten(-2), out_weight.T, out_bias)


_PRODUCTS = {functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


class DropoutPerRun(nn.Module):
    """Dropout whose masks under `torch.vmap` are those that each run draws alone.

    Args:
        rates: probability per run.
        generators: per run, on the device of the model.
        active: the runs of the present step.
    """

    def __init__(self, rates: Sequence[float], generators: Sequence[Generator], active: Sequence[int]) -> None:
        super().__init__()
        self.rates, self.generators, self.active = tuple(rates), tuple(generators), active

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...], scaled."""
        return _MaskPerRun.apply(x, self) if any(self.rates) else x


class _MaskPerRun(torch.autograd.Function):
    """Multiply each run's slice with its mask. Only the rule of `torch.vmap` is ever used."""

    @staticmethod
    def forward(x: Tensor, dropout: DropoutPerRun) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, dropout: DropoutPerRun) -> tuple[Tensor, int]:
        """x [R, ...] -> [R, ...]."""
        x = x.movedim(in_dims[0] or 0, 0)
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        for row, run in zip(mask, dropout.active, strict=True):
            rate = dropout.rates[run]
            if rate:
                row.bernoulli_(1 - rate, generator=dropout.generators[run]).div_(1 - rate)
            else:
                row.fill_(1)
        return x * mask, 0


def _with_dropout_per_run(
    models: Sequence[nn.Module], generators: Sequence[Generator], active: Sequence[int]
) -> nn.Module:
    """A copy of the first model in training mode whose dropout is that of every run."""
    template = copy.deepcopy(models[0]).train()
    for name, module in models[0].named_modules():
        if isinstance(module, nn.Dropout):
            rates = [model.get_submodule(name).p for model in models]
            parent, _, child = name.rpartition(".")
            setattr(template.get_submodule(parent), child, DropoutPerRun(rates, generators, active))  # type: ignore[arg-type]
    return template
