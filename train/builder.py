"""From settings to a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vaflow.errors import UsageError, explain
from vaflow.train.batch import StreamSpec, TargetSpec
from vaflow.train.config import TrainConfig
from vaflow.train.heads.model import VAModel


def build_model(
    config: TrainConfig,
    streams: Sequence[StreamSpec],
    prototypes: Tensor | None,
    context: tuple[int, int] | None = None,
    targets: Sequence[TargetSpec] = (),
) -> VAModel:
    """A model with fresh weights, on the CPU; seed the generator before.

    Args:
        config: settings.
        streams: what it reads.
        prototypes: [9, D], or None: without a prompt head.
        context: number and width of the vectors that prototypes are made from; None: they are as given.
        targets: what else is said of every frame.

    Raises:
        UsageError: settings that do not go together.
    """
    options: dict[str, Any] = {"layers": config.layers} if config.layers else {}
    if config.temporal == "tcn":
        options["causal"] = config.causal
    if config.temporal == "transformer":
        options["heads"] = config.attention_heads
    return VAModel(
        streams,
        prototypes,
        hidden=config.hidden,
        temporal=config.temporal,
        temporal_options=options,
        fusion=config.fusion,
        attention_heads=config.attention_heads,
        dropout=config.dropout,
        normalize=config.normalize,
        learnable_prototypes=config.learnable_prompts,
        context=context,
        targets=targets,
    )


def choose_device(name: str) -> torch.device:
    """The device that a setting means; "auto" is the first GPU, where there is one.

    Raises:
        UsageError: a GPU is asked for and there is none of that number.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(explain("That GPU is not there", expected=f"one of {count} GPUs, or cpu", got=name))
    return device
