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
from vaflow.train.batch import Batch, drop_modality
from vaflow.train.config import TrainConfig
from vaflow.train.data import Data
from vaflow.train.stacked_models import StackedModels, stacked_batch
from vaflow.train.traces import predict_clips
from vaflow.train.training_loop import (
    Progress,
    Row,
    check_finite,
    end_epoch,
    epoch_losses,
    in_order,
    is_finished,
    lr_factor,
    make_optimizer,
    resume,
    save_checkpoint,
    seed_from,
)
from vaflow.train.windows import Prefetcher, gather_each

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

    def end_epoch(self, row: Row) -> None:
        """Validate, keep the best weights and write the checkpoint; `row` has the losses of the epoch."""
        validate = partial(predict_clips, self.model, self.data.val)
        self.progress = end_epoch(self.progress, self.model, row, validate, self.config, self.excluded)
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.progress, self.model, self.optimizer)


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
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                member.end_epoch(outcome)
            except FAILURES as error:
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
    steps: list[tuple[int, list[int]]] = []  # the number of a step and the runs that take it together
    for step in range(max(map(len, orders))):
        sizes: dict[int, list[int]] = {}  # the last batch is smaller, and folds differ in their number of steps
        for run, order in enumerate(orders):
            if step < len(order):
                sizes.setdefault(len(order[step]), []).append(run)
        steps += [(step, runs) for runs in sizes.values()]

    def gather(item: tuple[int, list[int]]) -> Batch:
        step, runs = item
        return gather_each([members[run].data.train for run in runs], [orders[run][step] for run in runs])

    totals: list[list[Tensor]] = [[] for _ in members]
    prefetcher = Prefetcher(members[0].data.train, gather)
    for (step, runs), batch in zip(steps, prefetcher.batches(steps), strict=True):
        for run, row in zip(runs, take_step(stack, members, runs, batch, step), strict=True):
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
    stack: StackedModels, members: Sequence[Member], runs: Sequence[int], windows: Batch, step: int
) -> list[Tensor]:
    """Take step `step` of the epoch in some runs; returns losses and norm of each, [6].

    Args:
        stack: the models of all members.
        members: all runs.
        runs: numbers of those that take the step.
        windows: those of the first of these runs, then those of the second, ...; the same number for each.
        step: counted from 0.
    """
    batch = stacked_batch(windows, len(runs))
    if any(members[run].config.modality_dropout for run in runs):  # each run drops modalities as it does alone
        of_runs = [
            drop_modality(
                replace(batch, inside=batch.inside[k], valid={name: mask[k] for name, mask in batch.valid.items()}),
                *(members[run].data.train.streams, members[run].config.modality_dropout, stack.generators[run]),
            ).valid
            for k, run in enumerate(runs)
        ]
        batch = replace(batch, valid={n: torch.stack([valid[n] for valid in of_runs]) for n in batch.valid})
    results = stack.backward(batch, runs)
    for run in runs:
        member = members[run]
        factor = lr_factor(member.config, member.progress.epoch * member.steps + step, member.steps)
        for group in member.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        member.optimizer.step()
    return list(in_order(results).unbind(dim=1))
