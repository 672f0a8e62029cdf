"""One optimiser step and one epoch of fine-tuning, on one process or several.

The CCC of a batch is not a mean over its parts. So what all parts of a batch, on all processes, say is gathered first;
the loss and its gradient with respect to that are computed on the whole batch; then each part is taken back through
the model with its share of that gradient. Gradients are those of the undivided batch, however it is divided. A batch
in several parts goes through the model twice, first without keeping anything (Gao et al. 2021, arXiv 2101.06983).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vaflow.train.batch import Batch, Output
from vaflow.train.config import TrainConfig
from vaflow.train.finetune.augment import Augment
from vaflow.train.finetune.data import Source
from vaflow.train.finetune.model import Raw, TunedModel, gather
from vaflow.train.loop import CHECK_EVERY, PARTS, Row, check_finite, lr_factor, seed_from, seeded
from vaflow.train.losses import total_loss
from vaflow.train.windows import WindowSet, drop_modality

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tuning:
    """What a step needs.

    Attributes:
        fabric: of Lightning: device, precision, processes.
        model: what learns; wrapped: the same, as Fabric wraps it for precision and processes.
        optimizer: with a group for the heads and one for the backbones, each with its `initial_lr`.
        windows: of the training split; sources: what its features are made of.
        config: resolved settings.
    """

    fabric: Any
    model: TunedModel
    wrapped: Callable[[Raw], Tensor]
    optimizer: torch.optim.Optimizer
    windows: WindowSet
    sources: Mapping[str, Source]
    config: TrainConfig


@dataclass(frozen=True)
class Share:
    """A batch, and what one process reads of it.

    Attributes:
        ids: [N] windows of the batch in the order of processes and their parts; real: [N] False where a window only
            fills up a part.
        parts: of this process.
    """

    ids: Tensor
    real: Tensor
    parts: tuple[Raw, ...]


def make_optimizer(model: TunedModel, trained: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with `lr` for the heads and `backbone_lr` for `trained`; one weight decay for all."""
    heads = [parameter for parameter in model.heads.parameters() if parameter.requires_grad]
    groups = [
        {"params": heads, "lr": config.lr, "initial_lr": config.lr},
        {"params": list(trained), "lr": config.backbone_lr, "initial_lr": config.backbone_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=config.weight_decay)


def divide(ids: Tensor, processes: int, parts: int) -> tuple[Tensor, Tensor]:
    """[B] windows -> [processes, parts, n] windows and which of them are real: the last ones may repeat the first."""
    count = processes * parts
    size = -(-len(ids) // count)
    padding = ids[:1].expand(size * count - len(ids))
    real = torch.arange(size * count) < len(ids)
    return torch.cat([ids, padding]).view(processes, parts, size), real.view(processes, parts, size)


def read_share(tuning: Tuning, ids: Tensor, numbers: tuple[int, ...]) -> Share:
    """Read what this process needs of the batch `ids`, [B]; `numbers` say which step of which run it is."""
    config, fabric = tuning.config, tuning.fabric
    divided, real = divide(ids.cpu(), fabric.world_size, config.accumulate)
    augment = Augment(numbers) if config.augment else None
    own = divided[fabric.global_rank]
    parts = tuple(gather(tuning.windows, tuning.sources, tuning.model.backbones, part, augment) for part in own)
    return Share(divided.flatten(), real.flatten(), parts)


def train_step(tuning: Tuning, share: Share, numbers: tuple[int, ...]) -> Tensor:
    """One step of the optimiser; returns what `vaflow.train.loop.train_step` does, [5], of the whole batch.

    Args:
        tuning: what learns.
        share: what is read.
        numbers: which randomness (dropout) follows from.
    """
    fabric, once = tuning.fabric, len(share.parts) == 1
    with torch.set_grad_enabled(once):
        said = [_say(tuning, part, (*numbers, k)) for k, part in enumerate(share.parts)]
    own = torch.cat([part.detach() for part in said]).requires_grad_()
    loss, losses = _whole_loss(tuning, own, share)
    (gradient,) = torch.autograd.grad(loss, own)
    tuning.optimizer.zero_grad(set_to_none=True)
    for k, (part, pull) in enumerate(zip(share.parts, gradient.split(len(said[0])), strict=True)):
        with fabric.no_backward_sync(tuning.wrapped, enabled=k + 1 < len(share.parts)):
            again = said[k] if once else _say(tuning, part, (*numbers, k))
            fabric.backward((again * pull).sum() * fabric.world_size)  # gradients are averaged over processes
    norm = _norm_and_clip(tuning)
    tuning.optimizer.step()
    zero = torch.zeros_like(losses["total"])
    return torch.stack([*(losses.get(name, zero) for name in PARTS), norm])


def _say(tuning: Tuning, part: Raw, numbers: tuple[int, ...]) -> Tensor:
    """What the model says of one part; the same at every call, dropout included."""
    device = tuning.fabric.device
    devices = [device.index] if device.type == "cuda" else []
    with seeded(*numbers, tuning.fabric.global_rank, devices=devices):
        batch = drop_modality(part.batch, tuning.windows.streams, tuning.config.modality_dropout)
        return tuning.wrapped(Raw(batch, part.units))


def _whole_loss(tuning: Tuning, own: Tensor, share: Share) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch, with gradients to what this process says, [own N, F, 2 or 11]."""
    fabric, config, windows = tuning.fabric, tuning.config, tuning.windows
    said = own
    if fabric.world_size > 1:
        everything = own.new_zeros(fabric.world_size, *own.shape)
        everything[fabric.global_rank] = own.detach()
        pieces = list(fabric.all_reduce(everything, reduce_op="sum"))
        pieces[fabric.global_rank] = own
        said = torch.cat(pieces)
    ids = share.ids.to(windows.device)
    labelled = windows.labelled.index_select(0, ids) & share.real.to(windows.device)[:, None, None]
    inside = windows.inside.index_select(0, ids)
    target = windows.target.index_select(0, ids)
    batch = Batch({}, {}, {}, {}, inside, windows.time.expand(inside.shape), target, labelled, ids)
    return total_loss(
        Output(said[..., :2], said[..., 2:] if said.shape[-1] > 2 else None),
        batch,
        kl_weight=config.kl_weight,
        centers=config.centers,
        sigma=config.sigma,
        hard=config.region_labels == "hard",
        mse_weight=config.mse_weight,
        ccc_weight=config.ccc_weight,
    )


def _norm_and_clip(tuning: Tuning) -> Tensor:
    learning = [p for group in tuning.optimizer.param_groups for p in group["params"]]
    if tuning.config.clip_norm:
        return nn.utils.clip_grad_norm_(learning, tuning.config.clip_norm)
    return nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])


def train_epoch(tuning: Tuning, epoch: int) -> Row:
    """One pass over the trainable windows; `epoch` counts from 0. Returns the mean losses and the heads' last rate.

    The next batch is read while one is learned from.

    Raises:
        DataError: a loss or gradient is NaN or infinite; the clips of its windows are named.
    """
    tuning.model.train()
    config, windows = tuning.config, tuning.windows
    generator = torch.Generator().manual_seed(seed_from(config.seed, epoch, 1))
    batches = list(enumerate(windows.shuffled(config.batch_size, generator)))
    seen: list[Tensor] = []
    totals: list[Tensor] = []

    def read(batch: tuple[int, Tensor]) -> tuple[int, Tensor, Share]:
        step, ids = batch
        return step, ids, read_share(tuning, ids, (config.seed, epoch, step))

    for step, ids, share in ahead(read, batches):
        factor = lr_factor(config, epoch * len(batches) + step, len(batches))
        for group in tuning.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        totals.append(train_step(tuning, share, (config.seed, epoch, step)))
        seen.append(ids)
        if len(seen) % CHECK_EVERY == 0 or step + 1 == len(batches):
            check_finite(torch.stack(totals[-len(seen) :]), seen, windows)
            seen.clear()
    mean = torch.stack(totals).mean(dim=0).tolist()
    losses = {f"loss_{name}": value for name, value in zip(PARTS, mean[:-1], strict=True)}
    return {"lr": config.lr * factor, **losses}


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, with the next result already under way in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
