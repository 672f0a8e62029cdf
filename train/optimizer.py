"""The optimizer, AdamW, and the schedule of its learning rate."""

from collections.abc import Iterable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from vaflow.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return adamw([(trainable, config.lr)], config)


def adamw(groups: Iterable[tuple[list[nn.Parameter], float]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, each with its learning rate; empty groups are left out."""
    named = [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups if params]
    return AdamW(named, lr=config.lr, weight_decay=config.weight_decay, fused=True)


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, which collects the tensors of its state once instead of at every step.

    A step of a small head otherwise takes longer to collect and count them than to compute.
    """

    _collected: list[tuple[Tensor, list[list[Tensor]]]] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; the next step collects its tensors again."""
        super().load_state_dict(state_dict)
        self._collected = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, as `torch.optim.AdamW` does. Closures are not supported."""
        groups = [group["params"] for group in self.param_groups]
        if any(p.grad is None or p not in self.state for params in groups for p in params):
            super().step()  # creates the state, and passes over parameters without a gradient
            self._collected = None
            return
        if self._collected is None:
            self._collected = [self._collect(params) for params in groups]
        for group, (steps, state) in zip(self.param_groups, self._collected, strict=True):
            steps += 1
            beta1, beta2 = group["betas"]
            options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            gradients = [p.grad for p in group["params"]]
            torch._fused_adamw_(group["params"], gradients, *state, beta1=beta1, beta2=beta2, **options)

    def _collect(self, params: list[nn.Parameter]) -> tuple[Tensor, list[list[Tensor]]]:
        """Numbers of steps of a group as one tensor, [N]; its state in the order of the kernel."""
        states = [self.state[p] for p in params]
        steps = torch.stack([state["step"] for state in states])
        for state, of_parameter in zip(states, steps, strict=True):
            state["step"] = of_parameter
        means, squares, counts = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        return steps, [means, squares, [], counts]


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor of the learning rate at a step, counted from 0: warm-up, then the schedule; in (0, 1]."""
    warm = config.warmup * steps_per_epoch
    if step + 1 <= warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    total = max(1.0, config.epochs * steps_per_epoch - warm)
    return 0.5 * (1 + cos(pi * min(1.0, (step - warm) / total)))
