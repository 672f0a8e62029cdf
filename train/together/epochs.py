"""Epochs of several runs: one step of the stacked model is a step of every run.

Each run has its own data order, dropout masks, schedule, clipping, optimizer, best epoch and checkpoint; a run that
fails or ends leaves, and the others continue.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from vaflow.errors import VaflowError
from vaflow.train.batch import Batch
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import predict_clips
from vaflow.train.loop import (
    Progress,
    Row,
    check_finite,
    end_epoch,
    epoch_losses,
    is_finished,
    lr_factor,
    make_optimizer,
    resume,
    save_checkpoint,
    seed_from,
    update,
)
from vaflow.train.together.stacked_models import StackedModels, stacked_batch
from vaflow.train.windows import WindowSet, drop_modality

# What a run may fail of while the others go on: bad data, a device that refuses, memory, a full disk.
FAILURES = (VaflowError, RuntimeError, MemoryError, OSError, ValueError)


@dataclass(eq=False)
class Member:
    """A run that trains together with others.

    Attributes:
        model: on the device of the windows.
        config: resolved settings.
        checkpoint: file that is written after every epoch; if it exists, the run resumes from it.
        excluded: validation clips that are not scored.
        progress: how far the run is.
    """

    model: nn.Module
    config: TrainConfig
    checkpoint: Path | None = None
    excluded: frozenset[str] = frozenset()
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.config)


def fit_together(
    members: Sequence[Member], train: WindowSet, val: WindowSet
) -> Iterator[tuple[Member, Exception | None]]:
    """Train runs, or resume them from their checkpoints; yields each one when it ends, with the error if it failed.

    Args:
        members: runs that can train together.
        train, val: the splits.
    """
    steps = -(-len(train.trainable) // members[0].config.batch_size)
    active: list[Member] = []
    stack: StackedModels | None = None
    for member in members:
        try:
            member.progress = resume(member.checkpoint, member.model, member.optimizer, member.config)
            active.append(member)
        except VaflowError as damage:
            yield member, damage
    while active:
        for member in [m for m in active if is_finished(m.progress, m.config, steps)]:
            active.remove(member)
            yield member, None
        if not active:
            return
        if stack is None or len(stack.models) != len(active):
            stack = StackedModels([m.model for m in active], [m.config for m in active])
        for member, outcome in zip(list(active), _train_epoch(stack, active, train), strict=True):
            error = outcome if isinstance(outcome, Exception) else _end_epoch(member, outcome, val)
            if error is not None:
                active.remove(member)
                yield member, error


def _end_epoch(member: Member, row: Row, val: WindowSet) -> Exception | None:
    """Validate a run, keep its best weights and write its checkpoint; returns the error if that fails."""
    try:
        validate = partial(predict_clips, member.model, val)
        state = member.progress, member.model
        member.progress = end_epoch(*state, row, validate, member.config, member.excluded)
        if member.checkpoint is not None:
            save_checkpoint(member.checkpoint, member.progress, member.model, member.optimizer)
    except FAILURES as error:
        return error
    return None


def _train_epoch(stack: StackedModels, members: Sequence[Member], train: WindowSet) -> list[Row | Exception]:
    """One epoch of every run, each at its own epoch; returns their rows, or the error of a loss that is not finite."""
    begun = time.perf_counter()
    orders: list[tuple[Tensor, ...]] = []
    for member, generator in zip(members, stack.generators, strict=True):
        seed, epoch = member.config.seed, member.progress.epoch
        generator.manual_seed(seed_from(seed, epoch))
        order = Generator().manual_seed(seed_from(seed, epoch, 1))
        orders.append(tuple(train.shuffled(member.config.batch_size, order)))
    totals = [
        take_step(stack, members, gathered(stack, members, train, ids), step, len(orders[0]))
        for step, ids in enumerate(zip(*orders, strict=True))
    ]
    of_runs = torch.stack(totals, dim=1)
    seconds = (time.perf_counter() - begun) / len(members)  # a run's share
    results = zip(members, of_runs, orders, strict=True)
    return [_row(member, losses, order, train, seconds) for member, losses, order in results]


def _row(
    member: Member, totals: Tensor, order: tuple[Tensor, ...], train: WindowSet, seconds: float
) -> Row | Exception:
    """The row of one run's epoch, from the losses and norms of its steps [N, 6]."""
    try:
        check_finite(totals, list(order), train)
    except VaflowError as error:
        return error
    losses = epoch_losses(totals, member.optimizer.param_groups[0]["lr"], member.config)
    return {"epoch": member.progress.epoch + 1, **losses, "train_seconds": seconds}


def gathered(stack: StackedModels, members: Sequence[Member], train: WindowSet, ids: Sequence[Tensor]) -> Batch:
    """The windows `ids` of every run with a leading axis of runs; a modality is dropped as each run alone does."""
    batch = stacked_batch(train.gather(torch.cat(list(ids))), len(ids))
    if not any(member.config.modality_dropout for member in members):
        return batch
    of_runs = [
        drop_modality(
            replace(batch, inside=batch.inside[k], valid={name: mask[k] for name, mask in batch.valid.items()}),
            *(train.streams, member.config.modality_dropout, generator),
        ).valid
        for k, (member, generator) in enumerate(zip(members, stack.generators, strict=True))
    ]
    return replace(batch, valid={name: torch.stack([valid[name] for valid in of_runs]) for name in batch.valid})


def take_step(stack: StackedModels, members: Sequence[Member], batch: Batch, step: int, steps: int) -> Tensor:
    """Take step `step` of an epoch of `steps` steps in every run; returns losses and norms, [R, 6]."""
    parts = stack.backward(batch)
    rows = []
    for k, member in enumerate(members):
        factor = lr_factor(member.config, member.progress.epoch * steps + step, steps)
        for group in member.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        rows.append(update(member.optimizer, {name: part[k] for name, part in parts.items()}, member.config))
    return torch.stack(rows)
