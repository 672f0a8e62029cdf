"""One optimizer step and one epoch of fine-tuning, on one process or several.

The CCC of a batch is not the mean over its parts. The predictions of all parts, on all processes, are therefore
gathered first; the loss and its gradient with respect to them are computed on the whole batch; each part is then
back-propagated with its share of that gradient. The gradients equal those of the undivided batch. A batch in several
parts passes the model twice, first without keeping activations (Gao et al. 2021, arXiv 2101.06983).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vaflow.train import loop
from vaflow.train.config import TrainConfig
from vaflow.train.finetune.augment import Augment
from vaflow.train.finetune.data import Source
from vaflow.train.finetune.model import Raw, TunedModel, gather
from vaflow.train.loop import Row, adamw, batch_loss, seeded, update
from vaflow.train.windows import WindowSet, drop_modality


@dataclass(frozen=True)
class Tuning:
    """The objects of a fine-tuning step.

    Attributes:
        fabric: Lightning Fabric: device, precision, processes.
        model: the model; wrapped: the model as wrapped by Fabric.
        optimizer: one group for the heads and one for the encoders, each with its `initial_lr`.
        windows: of the training split; sources: the inputs that its features are made from.
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
    """A batch, and the part of it that one process reads.

    Attributes:
        ids: [N] windows of the batch in the order of processes and their parts; real: [N] False where a window only
            fills up a part.
        parts: inputs of this process.
    """

    ids: Tensor
    real: Tensor
    parts: tuple[Raw, ...]


def make_optimizer(model: TunedModel, trained: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with `lr` for the heads and `backbone_lr` for `trained`."""
    heads = [parameter for parameter in model.heads.parameters() if parameter.requires_grad]
    return adamw([(heads, config.lr), (list(trained), config.backbone_lr)], config)


def divide(ids: Tensor, processes: int, parts: int) -> tuple[Tensor, Tensor]:
    """Split [B] windows into [processes, parts, n], and mark the real ones: the last part may repeat a window."""
    count = processes * parts
    size = -(-len(ids) // count)
    padding = ids[:1].expand(size * count - len(ids))
    real = torch.arange(size * count) < len(ids)
    return torch.cat([ids, padding]).view(processes, parts, size), real.view(processes, parts, size)


def read_share(tuning: Tuning, ids: Tensor, numbers: tuple[int, ...]) -> Share:
    """Read this process's share of the batch `ids`, [B]; `numbers` seed the augmentation of this step."""
    config, fabric = tuning.config, tuning.fabric
    divided, real = divide(ids.cpu(), fabric.world_size, config.accumulate)
    augment = Augment(numbers) if config.augment else None
    mine = divided[fabric.global_rank]
    parts = tuple(gather(tuning.windows, tuning.sources, tuning.model.backbones, part, augment) for part in mine)
    return Share(divided.flatten(), real.flatten(), parts)


def train_step(tuning: Tuning, share: Share, numbers: tuple[int, ...]) -> Tensor:
    """Take one step of the optimizer; returns the losses and the norm of the whole batch: see `loop.update`.

    Args:
        tuning: objects of the step.
        share: inputs of this process.
        numbers: seed of the step's randomness (dropout).
    """
    fabric, once = tuning.fabric, len(share.parts) == 1
    with torch.set_grad_enabled(once):
        outputs = [_predict(tuning, part, (*numbers, k)) for k, part in enumerate(share.parts)]
    mine = torch.cat([part.detach() for part in outputs]).requires_grad_()
    labels = tuning.windows.labels(share.ids, share.real)
    loss, losses = batch_loss(tuning.model.unpack(_of_all_processes(fabric, mine)), labels, tuning.config)
    (gradient,) = torch.autograd.grad(loss, mine)
    tuning.optimizer.zero_grad(set_to_none=True)
    for k, (part, pull) in enumerate(zip(share.parts, gradient.split(len(outputs[0])), strict=True)):
        with fabric.no_backward_sync(tuning.wrapped, enabled=k + 1 < len(share.parts)):
            again = outputs[k] if once else _predict(tuning, part, (*numbers, k))
            fabric.backward((again * pull).sum() * fabric.world_size)  # gradients are averaged over processes
    return update(tuning.optimizer, losses, tuning.config)


def _predict(tuning: Tuning, part: Raw, numbers: tuple[int, ...]) -> Tensor:
    """Return the predictions for one part; equal at every call, dropout included."""
    device = tuning.fabric.device
    devices = [device.index] if device.type == "cuda" else []
    with seeded(*numbers, tuning.fabric.global_rank, devices=devices):
        batch = drop_modality(part.batch, tuning.windows.streams, tuning.config.modality_dropout)
        return tuning.wrapped(Raw(batch, part.units))


def _of_all_processes(fabric: Any, mine: Tensor) -> Tensor:
    """Gather the predictions of all processes, in order; only those of this process have gradients."""
    if fabric.world_size == 1:
        return mine
    everything = mine.new_zeros(fabric.world_size, *mine.shape)
    everything[fabric.global_rank] = mine.detach()
    pieces = list(fabric.all_reduce(everything, reduce_op="sum"))
    pieces[fabric.global_rank] = mine
    return torch.cat(pieces)


def train_epoch(tuning: Tuning, epoch: int) -> Row:
    """Pass once over the trainable windows: see `loop.train_epoch`. The next batch is read during each step."""
    tuning.model.train()
    config = tuning.config
    return loop.train_epoch(
        tuning.optimizer,
        tuning.windows,
        config,
        epoch,
        lambda batch: read_share(tuning, batch[1], (config.seed, epoch, batch[0])),
        lambda step, share: train_step(tuning, share, (config.seed, epoch, step)),
        loop.ahead,
    )
