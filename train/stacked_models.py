"""Models of one architecture as one model with a leading axis of runs.

The forward pass and the loss run under `torch.vmap`; parameters are stacked, and the parameters of each model are views
of the stack, so its optimizer, its state dict and its evaluation work as those of a model alone.

`torch.vmap` and autograd dispatch every operator in Python. Of batches that return often, the operators of a whole step
are recorded once and then called directly: with small heads a step takes a fifth to a third less time, with the
same bits.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vaflow.train.batch import Batch, ExtraTargets
from vaflow.train.config import TrainConfig
from vaflow.train.heads.layers import dropout_masks
from vaflow.train.losses import LOSS_SETTINGS, total_loss

CAPTURE_AFTER = 100  # steps with batches of one shape before such a step is captured, which takes seconds


class StackedModels:
    """Several models that take their steps together.

    Args:
        models: of one architecture, on one device.
        configs: settings per model; `hard` labels and which weights are 0 must agree.
        capture_after: number of steps with batches of one shape before such a step is captured, at least 1.

    Attributes:
        generators: random numbers of each run's dropout.
    """

    def __init__(
        self, models: Sequence[nn.Module], configs: Sequence[TrainConfig], capture_after: int = CAPTURE_AFTER
    ) -> None:
        device = next(models[0].parameters()).device
        self.models = tuple(models)
        self.generators = tuple(Generator(device) for _ in models)
        self._masks = DropoutMasks(self.generators)
        self._template = _with_dropout_per_run(models, self._masks)
        self._parameters: dict[str, Tensor] = {}
        for name, parameter in models[0].named_parameters():
            stacked = torch.stack([model.get_parameter(name).detach() for model in models])
            self._parameters[name] = stacked.requires_grad_(parameter.requires_grad)
        self._of_runs: dict[str, list[nn.Parameter]] = {}  # finding a parameter by its name takes as long as using it
        for name, stacked in self._parameters.items():
            self._of_runs[name] = [model.get_parameter(name) for model in models]
            for parameter, values in zip(self._of_runs[name], stacked.detach().unbind(), strict=True):
                parameter.data = values
        buffers = [dict(model.named_buffers()) for model in models]
        self._buffers = {name: torch.stack([tensors[name] for tensors in buffers]) for name in buffers[0]}
        self._weights: dict[str, Any] = {
            name: torch.tensor([float(getattr(config, name)) for config in configs], device=device)
            for name in LOSS_SETTINGS
            if name not in ("mse_weight", "nll_weight") or getattr(configs[0], name)
        }
        self._limits = torch.tensor([config.clip_norm or torch.inf for config in configs], device=device)
        self._clips = any(config.clip_norm for config in configs)
        self._used: list[str] = []  # names of the parameters with a gradient
        self._memory = torch.empty(0)  # of the gradients
        self._hard = configs[0].region_labels == "hard"
        self._capture_after = capture_after
        self._uses: Counter[object] = Counter()  # by the shapes of a batch, as the next two
        self._dropouts: dict[object, list[DropoutCall]] = {}
        self._captured: dict[object, Callable[..., Any]] = {}

    def losses(self, batches: Batch, runs: Sequence[int]) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        """Losses of some models, [R], their parts, [R] each, and the stacked parameters that they depend on.

        Args:
            batches: a batch per run, every tensor with a leading axis of R runs.
            runs: [R] numbers of the models, ascending.
        """
        tensors, tasks = _tensors_of(batches)
        self._masks.begin(runs)
        parameters, buffers, weights = self._state(runs)
        losses, parts = self._forward(parameters, buffers, weights, tensors, tasks)
        return losses, parts, parameters

    def backward(self, batches: Batch, runs: Sequence[int]) -> dict[str, Tensor]:
        """Set the gradients of the parameters of some models, and clip them.

        The arguments are those of `losses`.

        Returns:
            The parts of the losses and "norm", the norm of the gradient before it is clipped, [R] each.
        """
        tensors, tasks = _tensors_of(batches)
        shapes = tuple(x.shape for x in tree_leaves(tensors))
        self._uses[shapes] += 1
        inputs = *self._state(runs), tensors
        if self._uses[shapes] <= self._capture_after:
            self._masks.begin(runs)
            gradients, parts = self._gradients(*inputs, tasks)
            self._dropouts[shapes] = self._masks.calls
        else:
            masks = self._masks.draw(runs, self._dropouts[shapes])
            if shapes not in self._captured:
                self._captured[shapes] = self._capture(tasks, runs, (*inputs, masks))
            with torch.no_grad():
                gradients, parts = self._captured[shapes](*inputs, masks)
        used = [name for name, gradient in gradients.items() if gradient is not None]
        memory = self._memory_of_gradients(used)
        rows = [gradients[name].reshape(len(runs), -1) for name in used]  # type: ignore[union-attr]
        flat = torch.cat(rows, dim=1, out=memory if len(runs) == len(self.models) else None)
        norm = torch.linalg.vector_norm(flat, dim=1)
        if self._clips:
            limit = torch.stack([self._limits[run] for run in runs])
            flat *= (limit / (norm + 1e-6)).clamp(max=1).unsqueeze(1)
        if flat is not memory:
            for run, row in zip(runs, flat, strict=True):
                memory[run] = row
        return {**parts, "norm": norm}

    def _memory_of_gradients(self, used: list[str]) -> Tensor:
        """Memory of the gradients of all models, [R, P]; the gradients of the parameters in `used` are views of it."""
        if used != self._used:
            self._used = used
            sizes = [self._parameters[name][0].numel() for name in used]
            self._memory = next(iter(self._parameters.values())).new_zeros(len(self.models), sum(sizes))
            of_names = dict(zip(used, self._memory.split(sizes, dim=1), strict=True))
            for name, parameters in self._of_runs.items():
                for run, parameter in enumerate(parameters):
                    parameter.grad = of_names[name][run].view_as(parameter) if name in of_names else None
        return self._memory

    def _state(self, runs: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, buffers and weights of the loss of some runs, with a leading axis of these runs."""
        parameters, buffers, weights = self._parameters, self._buffers, self._weights
        if len(runs) < len(self.models):
            buffers, weights = ({n: _rows(x, runs) for n, x in part.items()} for part in (buffers, weights))
            parameters = {n: _rows(p.detach(), runs).requires_grad_(p.requires_grad) for n, p in parameters.items()}
        return parameters, buffers, weights

    def _forward(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        weights: dict[str, Tensor],
        tensors: dict[str, Any],
        tasks: dict[str, str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [R] and their parts."""

        def one(
            parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: dict[str, Any], weights: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            extra = {name: ExtraTargets(tasks[name], **parts) for name, parts in batch["extra"].items()}
            windows = Batch(**{**batch, "extra": extra})
            output = functional_call(self._template, (parameters, buffers), (windows,))
            return total_loss(output, windows, hard=self._hard, **weights)

        with _MatrixProducts():
            result: tuple[Tensor, dict[str, Tensor]] = torch.vmap(one)(parameters, buffers, tensors, weights)
        return result

    def _gradients(
        self, parameters: dict[str, Tensor], *inputs: Any
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
        """Gradients of the trainable stacked parameters, None for one that is not used, and the parts of the losses."""
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        losses, parts = self._forward(parameters, *inputs)
        gradients = torch.autograd.grad(losses.sum(), list(trainable.values()), allow_unused=True)
        return dict(zip(trainable, gradients, strict=True)), {name: part.detach() for name, part in parts.items()}

    def _capture(self, tasks: dict[str, str], runs: Sequence[int], inputs: tuple[Any, ...]) -> Callable[..., Any]:
        """Record the operators of `_gradients` as a function of these inputs, which end with the masks of dropout."""
        from torch.fx.experimental.proxy_tensor import make_fx

        trainable = {name for name, parameter in inputs[0].items() if parameter.requires_grad}

        def gradients(parameters: dict[str, Tensor], *others: Any) -> Any:
            self._masks.begin(runs, others[-1])
            own = {name: p.detach().requires_grad_(name in trainable) for name, p in parameters.items()}
            return self._gradients(own, *others[:-1], tasks)

        module = make_fx(gradients)(*inputs)
        module.graph.eliminate_dead_code()
        for node in module.graph.nodes:
            if not isinstance(node.target, OpOverload):
                continue
            name = node.target._schema.name.removeprefix("aten::")
            if node.target in _VIEWS and _same_view(node, node.args[0]):  # such as the axis of runs moved to the front
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            else:  # PyTorch's functions take half of the time to call that its operators take
                node.target = getattr(_FUNCTIONS, name, None) or getattr(Tensor, name, node.target)
        module.recompile()
        graph: Callable[..., Any] = module
        return graph


_FUNCTIONS = torch._C._VariableFunctions
_VIEWS = {getattr(torch.ops.aten, name).default for name in ("alias", "detach", "expand", "permute", "view")}


def _same_view(*nodes: Any) -> bool:
    """Whether tensors of a recorded graph have the same shape and strides."""
    one, other = (node.meta["tensor_meta"] for node in nodes)
    return bool((one.shape, one.stride) == (other.shape, other.stride))


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
    extra = {name: targets.map(split) for name, targets in batch.extra.items()}
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
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is functional.multi_head_attention_forward:
            return _attend(*args, **(kwargs or {})), None
        if func is functional.linear:
            return _Linear.apply(*args, **(kwargs or {}))
        if func in _PRODUCTS and args[0].ndim > 2 and args[1].ndim == 2:
            return (args[0].flatten(0, -2) @ args[1]).unflatten(0, args[0].shape[:-1])
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`linear` as one product of all runs, whose gradients are contiguous; for use under `torch.vmap` only."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [R, N, D], weight [R, H, D], bias [R, H] -> [R, N, H]."""
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep x and the weight."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[R, N, H] -> gradients of the inputs of `forward`."""
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return of_x, torch.bmm(grad.transpose(1, 2), x), grad.sum(dim=1)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        """x [R, ..., D] -> [R, ..., H]."""
        pairs = zip(inputs, in_dims, strict=True)
        x, *others = (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs)
        return cls.apply(x.flatten(1, -2), *others).unflatten(1, x.shape[1:-1]), 0


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
    q, k, v = (_Linear.apply(*three).unflatten(-1, (heads, size)).permute(1, 2, 0, 3) for three in inputs)
    result = _attention(q, k, v, key_padding_mask[:, None, None] == 0)  # -inf or 0, which would be added to the scores
    _, _, _, _, out_weight, out_bias = unused
    mixed: Tensor = _Linear.apply(result.permute(2, 0, 1, 3).flatten(-2), out_weight, out_bias)
    return mixed


def _attention(query: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor) -> Tensor:
    """`scaled_dot_product_attention` with a bool mask; `torch.vmap` would repeat it for every run."""
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return torch.softmax(scores + torch.where(attn_mask, 0.0, -torch.inf), dim=-1) @ values


_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


@dataclass(frozen=True)
class DropoutCall:
    """One use of dropout in a step: the rate of every run of the stack; shape, type and device of the values."""

    rates: Sequence[float]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class DropoutMasks:
    """Dropout masks of a step. Each run's generator draws them in the order in which that run alone would.

    Args:
        generators: per run, on the device of the model.

    Attributes:
        calls: of the present step, so far, where masks are drawn when they are needed.
    """

    def __init__(self, generators: Sequence[Generator]) -> None:
        self._generators = tuple(generators)
        self._runs: list[int] = []
        self._drawn: Iterator[Tensor] | None = None
        self.calls: list[DropoutCall] = []

    def begin(self, runs: Sequence[int], drawn: Sequence[Tensor] | None = None) -> None:
        """Begin a step of some runs, with masks from `draw`, or with masks that are drawn when they are needed."""
        self._runs, self._drawn, self.calls = list(runs), None if drawn is None else iter(drawn), []

    def take(self, rates: Sequence[float], x: Tensor) -> Tensor:
        """The next mask, [R, ...] as x: 0, or 1 / (1 - rate); `rates`: per run of the stack."""
        if self._drawn is not None:
            return next(self._drawn)
        self.calls.append(DropoutCall(rates, x.shape, x.dtype, x.device))
        return self.draw(self._runs, self.calls[-1:])[0]

    def draw(self, runs: Sequence[int], calls: Sequence[DropoutCall]) -> list[Tensor]:
        """The masks of some calls, [R, ...] each."""
        masks = []
        for call in calls:
            rates = [call.rates[run] for run in runs]
            # Masks of one rate take fewer operators together than each by itself.
            parts = (
                [(rates[0], runs)]
                if len(set(rates)) == 1
                else [(rate, [run]) for rate, run in zip(rates, runs, strict=True)]
            )
            drawn = [
                dropout_masks(call.shape[1:], rate, call.dtype, call.device, [self._generators[run] for run in of_rate])
                for rate, of_rate in parts
            ]
            masks.append(drawn[0] if len(drawn) == 1 else torch.cat(drawn))
        return masks


class DropoutPerRun(nn.Module):
    """Dropout whose masks under `torch.vmap` are those that each run draws alone.

    Args:
        rates: probability per run.
        masks: of the step.
    """

    def __init__(self, rates: Sequence[float], masks: DropoutMasks) -> None:
        super().__init__()
        self.rates, self.masks = tuple(rates), masks

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
        return x * dropout.masks.take(dropout.rates, x), 0


def _with_dropout_per_run(models: Sequence[nn.Module], masks: DropoutMasks) -> nn.Module:
    """A copy of the first model in training mode whose dropout is that of every run."""
    template = copy.deepcopy(models[0]).train()
    for name, module in models[0].named_modules():
        if isinstance(module, nn.Dropout):
            rates: list[Any] = [model.get_submodule(name).p for model in models]
            parent, _, child = name.rpartition(".")
            setattr(template.get_submodule(parent), child, DropoutPerRun(rates, masks))
    return template
