"""The training loop: AdamW over shuffled windows, validation after each epoch, best weights, exact resumption.

Heads and fine-tuning share everything here but the batches that they read and how a gradient comes about.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.errors import DataError, explain
from vaflow.train.batch import Batch, Output
from vaflow.train.checkpoint import Progress, Row, resume, save_checkpoint
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.losses import LOSS_SETTINGS, total_loss
from vaflow.train.masks import drop_modality
from vaflow.train.metrics import DIMENSIONS, SCORES, mean_over_dimensions, within_video_ccc
from vaflow.train.optimizer import lr_factor, make_optimizer
from vaflow.train.scores import score
from vaflow.train.traces import Trace, predict_clips
from vaflow.train.windows import Prefetcher, WindowSet

log = logging.getLogger(__name__)

CHECK_EVERY = 50  # steps between two checks of the losses: each check waits for the device
AUTO_EPOCHS = (3, 1000)  # of epochs=auto: epochs without progress before it stops (at least), epochs in all (at most)
Source = TypeVar("Source")


@contextmanager
def seeded(*numbers: int, devices: Sequence[int] | None = None) -> Iterator[None]:
    """Seed torch's generators (CPU and `devices`; None: all GPUs) inside the block, and restore them after it."""
    if devices is None:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(seed_from(*numbers))
        yield


def seed_from(*numbers: int) -> int:
    """Combine numbers into one seed; their order matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


PARTS = ("total", "ccc", "kl", "mse", "nll")


def batch_loss(output: Output, batch: Batch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted loss of a batch and its parts; see `total_loss`."""
    weights = {name: getattr(config, name) for name in LOSS_SETTINGS}
    return total_loss(output, batch, hard=config.region_labels == "hard", **weights)


def update(optimizer: torch.optim.Optimizer, parts: Mapping[str, Tensor], config: TrainConfig) -> Tensor:
    """Clip the gradients and step; returns the losses and the norm, [6], on the device: see `in_order`."""
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if config.clip_norm:
        norm = nn.utils.clip_grad_norm_(trainable, config.clip_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
    optimizer.step()
    return in_order({**parts, "norm": norm})


def in_order(results: Mapping[str, Tensor]) -> Tensor:
    """Losses in the order of `PARTS`, 0 for one that is not part of the training, and the norm; [6, ...]."""
    zero = torch.zeros_like(results["total"])
    return torch.stack([results.get(name, zero) for name in (*PARTS, "norm")])


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig) -> Tensor:
    """Take one step of the optimizer; returns what `update` does. Nothing here waits for the device."""
    optimizer.zero_grad(set_to_none=True)  # before the forward pass, which then takes this memory
    loss, parts = batch_loss(model(batch), batch, config)
    loss.backward()
    return update(optimizer, parts, config)


def train_epoch(
    optimizer: torch.optim.Optimizer,
    windows: WindowSet,
    config: TrainConfig,
    epoch: int,
    read: Callable[[Sequence[Tensor]], Iterable[Source]],
    learn: Callable[[int, Source], Tensor],
) -> Row:
    """Pass once over the trainable windows; returns the mean losses and the last learning rate of the heads.

    Args:
        optimizer: its groups have an `initial_lr`.
        windows: of the training split.
        config: resolved settings.
        epoch: counted from 0.
        read: windows of every step, [B] each -> what `learn` takes at every step.
        learn: step and batch -> losses and norm, as `update` returns them.

    Raises:
        DataError: a loss or gradient is NaN or infinite; the clips of its windows are named.
    """
    generator = torch.Generator().manual_seed(seed_from(config.seed, epoch, 1))
    batches = list(windows.shuffled(config.batch_size, generator))
    totals: list[Tensor] = []
    unchecked: list[Tensor] = []
    factor = 1.0
    for step, (ids, source) in enumerate(zip(batches, read(batches), strict=True)):
        factor = lr_factor(config, epoch * len(batches) + step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        totals.append(learn(step, source))
        unchecked.append(ids)
        if len(unchecked) % CHECK_EVERY == 0 or step + 1 == len(batches):
            check_finite(torch.stack(totals[-len(unchecked) :]), unchecked, windows)
            unchecked.clear()
    return epoch_losses(torch.stack(totals), config.lr * factor, config)


def epoch_losses(totals: Tensor, lr: float, config: TrainConfig) -> Row:
    """The row of an epoch: its last learning rate, and the mean losses of its steps [N, 6]."""
    losses = dict(zip(PARTS, totals.mean(dim=0).tolist()[:-1], strict=True))
    if config.uncertainty == "none":
        del losses["nll"]
    return {"lr": lr, **{f"loss_{name}": value for name, value in losses.items()}}


def check_finite(losses: Tensor, batches: list[Tensor], windows: WindowSet) -> None:
    """Check the losses and norms of some steps, [N, 6], of the windows in `batches`.

    Raises:
        DataError: one is NaN or infinite; the clips of its windows are named.
    """
    bad = (~torch.isfinite(losses)).any(dim=1).nonzero().flatten().tolist()
    if not bad:
        return
    ids = batches[bad[0]]
    clips = sorted({windows.clip_of(int(window)).item for window in ids.tolist()})
    loss, norm = float(losses[bad[0], 0]), float(losses[bad[0], -1])
    features = windows.gather(ids).features
    peaks = {name: torch.nan_to_num(x, nan=torch.inf).abs().flatten(1).amax(dim=1) for name, x in features.items()}
    stream = max(peaks, key=lambda name: float(peaks[name].max()))  # the most likely cause
    window = int(peaks[stream].argmax())
    suspect = windows.clip_of(int(ids[window])).item
    raise DataError(
        explain(
            "Training stopped: the loss or its gradient is not finite",
            got=f"loss {loss:g}, gradient norm {norm:g} in a batch with windows of {', '.join(clips)}; the largest "
            f"feature there, {float(peaks[stream][window]):.3g}, is of {suspect} in stream {stream}",
            remedy="Check the features of these clips, or try a lower --lr or --set clip_norm=1",
        )
    )


def fit(model: nn.Module, train: WindowSet, val: WindowSet, config: TrainConfig, **options: Any) -> Progress:
    """Train heads, or resume from `checkpoint`; the model is left with the last epoch's weights.

    Args:
        model: on the device of the windows.
        train, val: the splits.
        options: of `run_epochs`: checkpoint, on_epoch, excluded.

    Returns:
        The history and the weights with the best validation score.

    Raises:
        DataError: a loss, a gradient or a prediction is not finite.
    """
    optimizer = make_optimizer(model, config)
    prefetcher: Prefetcher[Tensor] = Prefetcher(train)

    def step(_: int, batch: Batch) -> Tensor:
        batch = drop_modality(batch, train.streams, config.modality_dropout)
        return train_step(model, optimizer, batch, config)

    def learn(epoch: int) -> Row:
        model.train()
        with seeded(config.seed, epoch):
            return train_epoch(optimizer, train, config, epoch, prefetcher.batches, step)

    def validate() -> Iterable[Trace]:
        return predict_clips(model, val)

    steps = -(-len(train.trainable) // config.batch_size)
    return run_epochs(model, optimizer, config, learn, validate, steps_per_epoch=steps, **options)


def run_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    learn: Callable[[int], Row],
    validate: Callable[[], Iterable[Trace]],
    *,
    steps_per_epoch: int,
    checkpoint: Path | None = None,
    write: bool = True,
    on_epoch: Callable[[Row], None] | None = None,
    excluded: Iterable[str] = (),
) -> Progress:
    """Run the epochs of heads or of fine-tuning, with validation after each, and keep the best weights.

    Args:
        model, optimizer: what is trained; a checkpoint holds their state.
        config: resolved settings.
        learn: train one epoch, counted from 0; returns the mean losses.
        validate: predict the validation split.
        steps_per_epoch: for `epochs=auto`, whose patience counts in steps.
        checkpoint: read first if it exists, and written after every epoch if `write`.
        write: False for all but one of several processes.
        on_epoch: called with each epoch's row of the history.
        excluded: validation clips that are not scored.
    """
    progress = resume(checkpoint, model, optimizer, config)
    names = frozenset(excluded)
    while not is_finished(progress, config, steps_per_epoch):
        begun = time.perf_counter()
        losses = learn(progress.epoch)
        row = {"epoch": progress.epoch + 1, **losses, "train_seconds": time.perf_counter() - begun}
        progress = end_epoch(progress, model, row, validate, config, names)
        if checkpoint is not None and write:
            save_checkpoint(checkpoint, progress, model, optimizer)
        if on_epoch is not None:
            on_epoch(progress.history[-1])
    return progress


def end_epoch(
    progress: Progress,
    model: nn.Module,
    row: Row,
    validate: Callable[[], Iterable[Trace]],
    config: TrainConfig,
    excluded: frozenset[str],
) -> Progress:
    """Score the validation split after an epoch; returns the progress, with the scores in its history."""
    begun = time.perf_counter()
    traces = [trace for trace in validate() if trace.clip.item not in excluded]
    labelled = [(trace.va, np.where(trace.clip.valid, trace.clip.value, 0), trace.clip.valid) for trace in traces]
    within, _ = within_video_ccc(labelled)
    validated = [("ccc", score(traces)), ("within", np.append(within, mean_over_dimensions(within)))]
    seconds = {"train_seconds": row["train_seconds"]}
    row = {name: value for name, value in row.items() if name not in seconds}
    for kind, values in validated:
        row |= dict(zip((f"val_{kind}_{name}" for name in SCORES), values.tolist(), strict=True))
    row |= seconds | {"val_seconds": time.perf_counter() - begun}
    progress = replace(progress, epoch=progress.epoch + 1, history=(*progress.history, row))
    mean = row["val_within_mean" if config.best == "within" else "val_ccc_mean"]
    better = not progress.best or mean > progress.best_score
    scores = {name: row[f"val_ccc_{name}"] for name in DIMENSIONS} if config.best == "each" else {}
    risen = [name for name in scores if name not in progress.each or scores[name] > progress.each_score[name]]
    if better:  # a dimension without labels takes the epoch with the best mean
        risen += [name for name in scores if np.isnan(scores[name]) and name not in risen]
    if not better and not risen:
        return progress
    if better:
        progress = replace(progress, best=_copy(model), best_epoch=progress.epoch, best_score=mean)
    return replace(
        progress,
        each={**progress.each, **{name: _copy(model) for name in risen}},
        each_epoch={**progress.each_epoch, **dict.fromkeys(risen, progress.epoch)},
        each_score={**progress.each_score, **{name: scores[name] for name in risen}},
    )


def is_finished(progress: Progress, config: TrainConfig, steps_per_epoch: int) -> bool:
    """Return whether all epochs are trained."""
    if config.epochs != AUTO:
        return progress.epoch >= config.epochs
    least, most = AUTO_EPOCHS
    waited = progress.epoch - progress.best_epoch
    return progress.epoch >= most or (waited >= least and waited * steps_per_epoch >= config.patience)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
