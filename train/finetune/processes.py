"""Devices, precision and processes, by Lightning Fabric. `torchrun` starts the processes; alone, there is one."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from vaflow.train.builder import choose_device
from vaflow.train.config import TrainConfig

PRECISION: Mapping[str, Literal["32-true", "bf16-mixed"]] = {"float32": "32-true", "bfloat16": "bf16-mixed"}


@contextmanager
def processes(config: TrainConfig) -> Iterator[Any]:
    """A launched Fabric; meanwhile the log of all processes but the first says warnings only.

    Processes stay connected until they end: a second connection would meet what the first one left.

    Raises:
        UsageError: the device is not there.
    """
    from lightning_fabric import Fabric

    device = choose_device(config.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    alone = [device.index or 0] if device.type == "cuda" else 1
    fabric = Fabric(
        accelerator=device.type,
        devices=alone if world == 1 else local,
        num_nodes=1 if world == 1 else world // local,
        # A batch may have no picture or no sound at all on one process: then that backbone is not used there.
        strategy="auto" if world == 1 else "ddp_find_unused_parameters_true",
        precision=PRECISION[_precision(config, device)],
    )
    fabric.launch()
    quiet = logging.getLogger("vaflow")
    level = quiet.level
    if not fabric.is_global_zero:
        quiet.setLevel(logging.WARNING)
    try:
        yield fabric
    finally:
        quiet.setLevel(level)


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
