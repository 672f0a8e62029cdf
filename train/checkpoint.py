"""The state of a training after each epoch, and the checkpoint that resumes it exactly."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaflow.errors import CorruptError, explain
from vaflow.files import read_tensors, write_tensors
from vaflow.train.config import AUTO, TrainConfig

log = logging.getLogger(__name__)

Row = dict[str, float]


@dataclass(frozen=True)
class Progress:
    """The state of a training: epochs done, their history, the best weights so far.

    Attributes:
        epoch: number of epochs done.
        history: a row per epoch.
        best: tensors of the best epoch, on the CPU.
        best_epoch: counted from 1; 0: none yet. best_score: its mean CCC (with best=within: within videos).
        each: with best=each: dimension -> tensors of its best epoch; each_epoch, each_score: that epoch, its score.
    """

    epoch: int = 0
    history: tuple[Row, ...] = ()
    best: Mapping[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_score: float = float("-inf")
    each: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    each_epoch: Mapping[str, int] = field(default_factory=dict)
    each_score: Mapping[str, float] = field(default_factory=dict)


def resume(
    checkpoint: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> Progress:
    """Restore the state after the last epoch from `checkpoint` if it exists; return the progress."""
    if checkpoint is None or not checkpoint.is_file():
        return Progress()
    progress = load_checkpoint(checkpoint, model, optimizer)
    log.info("Resuming after epoch %d%s", progress.epoch, "" if config.epochs == AUTO else f" of {config.epochs}")
    return progress


def save_checkpoint(path: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, best weights and the optimizer's state to one file, and the rest as JSON into its header."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in progress.best.items()}
    tensors |= {f"each-{k}/{name}": tensor for k, kept in progress.each.items() for name, tensor in kept.items()}
    tensors |= {f"optimizer/{i}/{key}": value for i, entry in state.items() for key, value in entry.items()}
    note = {
        "epoch": progress.epoch,
        "history": progress.history,
        "best_epoch": progress.best_epoch,
        "best_score": progress.best_score,
        "each_epoch": progress.each_epoch,
        "each_score": progress.each_score,
    }
    write_tensors(path, tensors, {"progress": json.dumps(note)})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore the model and the optimizer; return the progress.

    Raises:
        CorruptError: the file is damaged.
    """
    tensors, note = read_tensors(path)
    try:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        model.load_state_dict(parts["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        facts = json.loads(note["progress"])
        each = {part.removeprefix("each-"): kept for part, kept in parts.items() if part.startswith("each-")}
        return Progress(**{**facts, "history": tuple(facts["history"]), "best": parts["best"], "each": each})
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        remedy = "Delete it to train from the start"
        raise CorruptError(explain(f"{path} is not a checkpoint of this run", got=error, remedy=remedy)) from error
