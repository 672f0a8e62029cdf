"""Epochs: AdamW over shuffled windows, validation after each, the best weights kept, exact resumption."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.errors import CorruptError, DataError, explain
from vaflow.train.batch import Batch
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import Trace, predict_clips, score
from vaflow.train.losses import total_loss
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.storage import read_tensors, write_tensors
from vaflow.train.windows import WindowSet, drop_modality

log = logging.getLogger(__name__)

CHECK_EVERY = 50  # steps between looks at the losses; each look waits for the device
Row = dict[str, float]


@contextmanager
def seeded(*numbers: int, devices: Sequence[int] | None = None) -> Iterator[None]:
    """Torch's generators start from these numbers inside, and go on as they were outside: those of the CPU and of
    these GPUs, by default all."""
    if devices is None:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(seed_from(*numbers))
        yield


def seed_from(*numbers: int) -> int:
    """A seed that follows from all of these numbers, and from their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Progress:
    """Where a run is: epochs done, what they gave, the best weights so far.

    Attributes:
        epoch: how many epochs are done.
        history: a row per epoch.
        best: tensors of the best epoch, on the CPU.
        best_epoch: counted from 1; 0: none yet. best_score: its mean CCC.
        each: dimension -> tensors of the epoch that was best in it, where asked for; each_epoch, each_score: likewise.
    """

    epoch: int = 0
    history: tuple[Row, ...] = ()
    best: Mapping[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_score: float = float("-inf")
    each: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    each_epoch: Mapping[str, int] = field(default_factory=dict)
    each_score: Mapping[str, float] = field(default_factory=dict)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over everything that learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learning, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def lr_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied with at a step, counted from 0: warm-up, then the schedule, in (0, 1]."""
    warm = config.warmup * steps_per_epoch
    if step + 1 <= warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    total = max(1.0, config.epochs * steps_per_epoch - warm)
    return 0.5 * (1 + cos(pi * min(1.0, (step - warm) / total)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainConfig) -> Tensor:
    """One step of the optimiser; returns total, ccc, kl and mse losses and the gradient's norm, [5], on the device.

    Parts that there are not are 0. Nothing here waits for the device.
    """
    output = model(batch)
    loss, parts = total_loss(
        output,
        batch,
        kl_weight=config.kl_weight,
        centers=config.centers,
        sigma=config.sigma,
        hard=config.region_labels == "hard",
        mse_weight=config.mse_weight,
        ccc_weight=config.ccc_weight,
        extra_weight=config.extra_weight,
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(learning, config.clip_norm) if config.clip_norm else _norm(learning)
    optimizer.step()
    zero = torch.zeros_like(parts["total"])
    return torch.stack([*(parts.get(name, zero) for name in PARTS), norm])


PARTS = ("total", "ccc", "kl", "mse")


def _norm(parameters: list[Tensor]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, windows: WindowSet, config: TrainConfig, epoch: int
) -> Row:
    """One pass over the trainable windows; `epoch` counts from 0. Returns the mean losses and the last rate.

    Raises:
        DataError: a loss or gradient is NaN or infinite; the clips of its windows are named.
    """
    model.train()
    generator = torch.Generator().manual_seed(seed_from(config.seed, epoch, 1))
    steps = -(-len(windows.trainable) // config.batch_size)
    seen: list[Tensor] = []
    totals: list[Tensor] = []
    lr = config.lr
    with seeded(config.seed, epoch):
        for step, ids in enumerate(windows.shuffled(config.batch_size, generator)):
            lr = config.lr * lr_factor(config, epoch * steps + step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = drop_modality(windows.gather(ids), windows.streams, config.modality_dropout)
            totals.append(train_step(model, optimizer, batch, config))
            seen.append(ids)
            if len(seen) % CHECK_EVERY == 0 or step + 1 == steps:
                check_finite(torch.stack(totals[-len(seen) :]), seen, windows)
                seen.clear()
    mean = torch.stack(totals).mean(dim=0).tolist()
    return {"lr": lr, **{f"loss_{name}": value for name, value in zip(PARTS, mean[:-1], strict=True)}}


def check_finite(numbers: Tensor, seen: list[Tensor], windows: WindowSet) -> None:
    """Numbers of some steps, [N, 5] as `train_step` gives them, of the windows `seen` in each.

    Raises:
        DataError: one is NaN or infinite; the clips of its windows are named.
    """
    bad = (~torch.isfinite(numbers)).any(dim=1).nonzero().flatten().tolist()
    if not bad:
        return
    first = bad[0]
    clips = sorted({windows.clip_of(int(window)).item for window in seen[first].tolist()})
    loss, norm = float(numbers[first, 0]), float(numbers[first, -1])
    place = f"in a batch with windows of {', '.join(clips)}; {_largest_feature(seen[first], windows)}"
    raise DataError(
        explain(
            "Training stopped: the loss or its gradient is not finite",
            expected="finite numbers",
            got=f"loss {loss:g}, gradient norm {norm:g} {place}",
            remedy="Look at these clips' features, that one's first, or try a lower learning rate or --set clip_norm=1",
        )
    )


def _largest_feature(ids: Tensor, windows: WindowSet) -> str:
    """Which of these windows' clips is the likeliest cause: the one with the largest number in its features."""
    batch = windows.gather(ids)
    peaks = {
        name: torch.nan_to_num(rows.float(), nan=torch.inf).abs().flatten(1).amax(dim=1)
        for name, rows in batch.features.items()
    }
    stream = max(peaks, key=lambda name: float(peaks[name].max()))
    window = int(peaks[stream].argmax())
    item = windows.clip_of(int(ids[window])).item
    return f"the largest feature there, {float(peaks[stream][window]):.3g}, is of {item} in stream {stream}"


def fit(
    model: nn.Module,
    train: WindowSet,
    val: WindowSet,
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Row], None] | None = None,
) -> Progress:
    """Train to `config.epochs`, or go on from `checkpoint`; the model is left with the last epoch's weights.

    Args:
        model: on the device of the windows.
        train, val: the splits.
        config: resolved settings.
        checkpoint: file that is written after every epoch, and read first if it is there.
        on_epoch: called with each epoch's row of the history.

    Returns:
        The history and the best weights by validation mean CCC.

    Raises:
        DataError: a loss, a gradient or a prediction is not finite.
    """
    optimizer = make_optimizer(model, config)
    return run_epochs(
        model,
        optimizer,
        config,
        lambda epoch: train_epoch(model, optimizer, train, config, epoch),
        lambda: predict_clips(model, val),
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )


def run_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    learn: Callable[[int], Row],
    validate: Callable[[], Iterable[Trace]],
    *,
    checkpoint: Path | None = None,
    write: bool = True,
    on_epoch: Callable[[Row], None] | None = None,
) -> Progress:
    """The epochs of `fit`, whatever one of them is.

    Args:
        model, optimizer: what learns; their state is what a checkpoint holds.
        config: resolved settings.
        learn: one epoch, counted from 0; returns the mean losses.
        validate: what the model says of the validation split.
        checkpoint: read first if it is there, and written after every epoch if `write`.
        write: False for all but one of several processes.
        on_epoch: called with each epoch's row of the history.
    """
    progress = Progress()
    if checkpoint is not None and checkpoint.is_file():
        progress = load_checkpoint(checkpoint, model, optimizer)
        log.info("Going on after epoch %d of %d", progress.epoch, config.epochs)
    for epoch in range(progress.epoch, config.epochs):
        begun = time.perf_counter()
        row = {"epoch": epoch + 1, **learn(epoch)}
        trained = time.perf_counter()
        valence, arousal, mean = score(validate()).tolist()
        row |= {"val_ccc_valence": valence, "val_ccc_arousal": arousal, "val_ccc_mean": mean}
        row |= {"train_seconds": trained - begun, "val_seconds": time.perf_counter() - trained}
        progress = _advance(progress, model, row, each=config.best == "each")
        if checkpoint is not None and write:
            save_checkpoint(checkpoint, progress, model, optimizer)
        if on_epoch is not None:
            on_epoch(row)
    return progress


def _advance(progress: Progress, model: nn.Module, row: Row, *, each: bool) -> Progress:
    progress = replace(progress, epoch=progress.epoch + 1, history=(*progress.history, row))
    better = not progress.best or row["val_ccc_mean"] > progress.best_score
    scores = {name: row[f"val_ccc_{name}"] for name in DIMENSIONS} if each else {}
    risen = [name for name in scores if name not in progress.each or scores[name] > progress.each_score[name]]
    if better:  # a dimension without labels goes with the mean
        risen += [name for name in scores if np.isnan(scores[name]) and name not in risen]
    if not better and not risen:
        return progress
    if better:
        best = _copy(model)
        progress = replace(progress, best=best, best_epoch=progress.epoch, best_score=row["val_ccc_mean"])
    return replace(
        progress,
        each={**progress.each, **{name: _copy(model) for name in risen}},
        each_epoch={**progress.each_epoch, **dict.fromkeys(risen, progress.epoch)},
        each_score={**progress.each_score, **{name: scores[name] for name in risen}},
    )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def save_checkpoint(path: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One file that appears whole: weights, best weights, the optimiser's state, and the rest as JSON in its header."""
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
    """Put model and optimiser where they were, and say where that is.

    Raises:
        CorruptError: the file is damaged.
    """
    tensors, note = read_tensors(path)
    try:
        return _put_back(tensors, note, model, optimizer)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        remedy = "Delete it, and the training begins anew"
        raise CorruptError(explain(f"{path} is no checkpoint of this training", got=error, remedy=remedy)) from error


def _put_back(
    tensors: Mapping[str, Tensor], note: Mapping[str, str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
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
    said = json.loads(note["progress"])
    each = {part.removeprefix("each-"): kept for part, kept in parts.items() if part.startswith("each-")}
    return Progress(**{**said, "history": tuple(said["history"]), "best": parts["best"], "each": each})
