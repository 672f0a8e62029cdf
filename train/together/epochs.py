"""Epochs of several runs: one step of the stacked model is a step of every run.

Each run has its own clips (a fold), data order, dropout masks, schedule, clipping, optimizer, best epoch and
checkpoint. A run that fails or ends leaves, and the others continue.
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
from vaflow.train.session import Data
from vaflow.train.together.stacked_models import StackedModels, stacked_batch
from vaflow.train.windows import drop_modality, gather_each

# Errors that end one run while the others continue: bad data, a device error, lack of memory, a full disk.
FAILURES = (VaflowError, RuntimeError, MemoryError, OSError, ValueError)


@dataclass(eq=False)
class Member:
    """A run that trains together with others.

    Attributes:
        model: on the device of the windows.
        config: resolved settings.
        data: both splits; all members have the same streams and windows of the same length.
        checkpoint: file that is written after every epoch; if it exists, the run resumes from it.
        excluded: validation clips that are not scored.
        progress: how far the run is.
    """

    model: nn.Module
    config: TrainConfig
    data: Data
    checkpoint: Path | None = None
    excluded: frozenset[str] = frozenset()
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.model, self.config)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.data.train.trainable) // self.config.batch_size)


def fit_together(members: Sequence[Member]) -> Iterator[tuple[Member, Exception | None]]:
    """Train runs, or resume them from their checkpoints; yields each one when it ends, with the error if it failed."""
    active: list[Member] = []
    stack: StackedModels | None = None
    for member in members:
        try:
            member.progress = resume(member.checkpoint, member.model, member.optimizer, member.config)
            active.append(member)
        except VaflowError as damage:
            yield member, damage
    while active:
        for member in [m for m in active if is_finished(m.progress, m.config, m.steps)]:
            active.remove(member)
            yield member, None
        if not active:
            return
        if stack is None or len(stack.models) != len(active):
            stack = StackedModels([m.model for m in active], [m.config for m in active])
        for member, outcome in zip(list(active), _train_epoch(stack, active), strict=True):
            error = outcome if isinstance(outcome, Exception) else _end_epoch(member, outcome)
            if error is not None:
                active.remove(member)
                yield member, error


def _train_epoch(stack: StackedModels, members: Sequence[Member]) -> list[Row | Exception]:
    """One epoch of every run, each at its own epoch; returns their rows, or the error of a loss that is not finite."""
    begun = time.perf_counter()
    orders: list[list[Tensor]] = []
    for member, generator in zip(members, stack.generators, strict=True):
        seed, epoch = member.config.seed, member.progress.epoch
        generator.manual_seed(seed_from(seed, epoch))
        shuffling = Generator().manual_seed(seed_from(seed, epoch, 1))
        orders.append(list(member.data.train.shuffled(member.config.batch_size, shuffling)))
    totals: list[list[Tensor]] = [[] for _ in members]
    for step in range(max(map(len, orders))):
        sizes: dict[int, list[int]] = {}  # the last batch is smaller, and folds differ in their number of steps
        for run, order in enumerate(orders):
            if step < len(order):
                sizes.setdefault(len(order[step]), []).append(run)
        for runs in sizes.values():
            losses = take_step(stack, members, runs, [orders[run][step] for run in runs], step)
            for run, row in zip(runs, losses, strict=True):
                totals[run].append(row)
    seconds = (time.perf_counter() - begun) / len(members)  # a run's share
    rows: list[Row | Exception] = []
    for member, order, of_run in zip(members, orders, map(torch.stack, totals), strict=True):
        try:
            check_finite(of_run, order, member.data.train)
            losses_of_epoch = epoch_losses(of_run, member.optimizer.param_groups[0]["lr"], member.config)
            rows.append({"epoch": member.progress.epoch + 1, **losses_of_epoch, "train_seconds": seconds})
        except VaflowError as error:
            rows.append(error)
    return rows


def take_step(
    stack: StackedModels, members: Sequence[Member], runs: Sequence[int], ids: Sequence[Tensor], step: int
) -> list[Tensor]:
    """Take step `step` of the epoch in some runs, on the windows `ids`; returns losses and norm of each, [6]."""
    parts = stack.backward(_gathered(stack, members, runs, ids), runs)
    rows = []
    for k, run in enumerate(runs):
        member = members[run]
        factor = lr_factor(member.config, member.progress.epoch * member.steps + step, member.steps)
        for group in member.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        rows.append(update(member.optimizer, {name: part[k] for name, part in parts.items()}, member.config))
    return rows


def _gathered(stack: StackedModels, members: Sequence[Member], runs: Sequence[int], ids: Sequence[Tensor]) -> Batch:
    """The windows `ids` of some runs with a leading axis of runs; a modality is dropped as each run alone does."""
    sets = [members[run].data.train for run in runs]
    batch = stacked_batch(gather_each(sets, ids), len(runs))
    if not any(members[run].config.modality_dropout for run in runs):
        return batch
    of_runs = [
        drop_modality(
            replace(batch, inside=batch.inside[k], valid={name: mask[k] for name, mask in batch.valid.items()}),
            *(sets[k].streams, members[run].config.modality_dropout, stack.generators[run]),
        ).valid
        for k, run in enumerate(runs)
    ]
    return replace(batch, valid={name: torch.stack([valid[name] for valid in of_runs]) for name in batch.valid})


def _end_epoch(member: Member, row: Row) -> Exception | None:
    """Validate a run, keep its best weights and write its checkpoint; returns the error if that fails."""
    try:
        validate = partial(predict_clips, member.model, member.data.val)
        state = member.progress, member.model
        member.progress = end_epoch(*state, row, validate, member.config, member.excluded)
        if member.checkpoint is not None:
            save_checkpoint(member.checkpoint, member.progress, member.model, member.optimizer)
    except FAILURES as error:
        return error
    return None
