"""The training loop: AdamW over shuffled windows, validation after each epoch, best weights, exact resumption.

The state after each epoch is a `Progress`; a checkpoint holds it with the weights and the state of the optimizer.

Heads and fine-tuning share everything here but the batches that they read and how a gradient comes about.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import cos, pi
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.errors import CorruptError, DataError, explain
from vaflow.files import read_tensors, write_tensors
from vaflow.train.batch import Batch, Output, drop_modality
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.losses import LOSS_SETTINGS, total_loss
from vaflow.train.metrics import DIMENSIONS, SCORES, mean_over_dimensions, within_video_ccc
from vaflow.train.scores import score
from vaflow.train.traces import Trace, predict_clips
from vaflow.train.windows import Prefetcher, WindowSet

log = logging.getLogger(__name__)

Row = dict[str, float]
CHECK_EVERY = 50  # steps between two checks of the losses: each check waits for the device
AUTO_EPOCHS = (3, 1000)  # of epochs=auto: epochs without progress before it stops (at least), epochs in all (at most)
Source = TypeVar("Source")
PARTS = ("total", "ccc", "kl", "mse", "nll")


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
