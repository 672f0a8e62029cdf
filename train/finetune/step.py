"""Backbones and heads as one module, and one optimizer step or epoch of it, on one process or several.

The CCC of a batch is not the mean over its parts. The predictions of all parts, on all processes, are therefore
gathered first; the loss and its gradient with respect to them are computed on the whole batch; each part is then
back-propagated with its share of that gradient. The gradients equal those of the undivided batch. A batch in several
parts passes the model twice, first without keeping activations (Gao et al. 2021, arXiv 2101.06983).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vaflow.train import training_loop
from vaflow.train.batch import VISUAL, Batch, Output, drop_modality
from vaflow.train.config import TrainConfig
from vaflow.train.finetune.backbones import Augment, Backbone, Source
from vaflow.train.heads import VAModel
from vaflow.train.losses import REGIONS
from vaflow.train.training_loop import Row, adamw, batch_loss, seeded, update
from vaflow.train.windows import StreamTable, WindowSet, ahead, to_device

# Padded batch sizes of `encode_split`: those of `vaflow extract`, because the low bits depend on the batch size.
ENCODE_BATCH = {"cpu": {"visual": 16, "audio": 2}, "cuda": {"visual": 256, "audio": 64}}


@dataclass(frozen=True)
class Units:
    """Inputs of one backbone for a batch.

    Attributes:
        inputs: [U, ...] images or log-Mel, each once, even if several windows share it; None: no inputs.
        place: [B, S] int64 row of the backbone's output, counted from 1; 0: missing.
    """

    inputs: Tensor | None
    place: Tensor


class Raw:
    """A batch with the inputs of its backbones.

    A plain class: the precision plugins of Fabric convert dataclasses and dicts, and would round the times.

    Attributes:
        batch: the batch, with the cached features of all streams.
        units: stream name -> inputs of its backbone.
    """

    def __init__(self, batch: Batch, units: Mapping[str, Units]) -> None:
        self.batch = batch
        self.units = units


def gather(
    windows: WindowSet,
    sources: Mapping[str, Source],
    backbones: Sequence[Backbone],
    ids: Tensor,
    augment: Augment | None = None,
) -> Raw:
    """Gather the windows `ids`, [B] int64, as a batch that contains each image and log-Mel window once.

    Called by the thread that reads ahead, so nothing here waits for the device: it would wait for the step under way.
    """
    units = {}
    device = windows.inside.device
    for backbone in backbones:
        index = windows.tables[backbone.stream.name].host_index.index_select(0, ids.cpu())
        wanted, position = share_units(index, backbone.per_unit)
        inputs = sources[backbone.stream.name].read(wanted, augment) if len(wanted) else None
        units[backbone.stream.name] = Units(
            None if inputs is None else to_device(inputs, device), to_device(position, device)
        )
    return Raw(windows.gather(ids), units)


def share_units(index: Tensor, per_unit: int) -> tuple[Tensor, Tensor]:
    """Packed rows [B, S] (0: missing) -> their units, [U] ascending, and each row's place in them, [B, S]."""
    present = index > 0
    unit = (index - 1) // per_unit
    units = torch.unique(unit[present])
    position = 1 + torch.searchsorted(units, unit) * per_unit + (index - 1) % per_unit
    return units, torch.where(present, position, 0)


class TunedModel(nn.Module):
    """Images and log-Mel -> features -> heads.

    Args:
        backbones: encoders, whose networks stay in evaluation mode. Streams without one use the cached features.
    """

    def __init__(self, heads: VAModel, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        self.heads = heads
        self.networks = nn.ModuleList(backbone.module for backbone in backbones)
        self.backbones = tuple(backbones)

    def train(self, mode: bool = True) -> "TunedModel":
        """As `nn.Module.train`, except for the backbones, which stay in evaluation mode."""
        super().train(mode)
        self.networks.eval()
        return self

    def forward(self, raw: Raw) -> Tensor:
        """Predictions side by side, [B, F, K] float32 (see `Output.packed`).

        The encoders run in the precision of the caller; the heads, which are small, in float32.
        """
        features = dict(raw.batch.features)
        for backbone in self.backbones:
            name = backbone.stream.name
            features[name] = _encoded(backbone, raw.units[name], features[name])
        with torch.autocast(raw.batch.inside.device.type, enabled=False):
            output: Output = self.heads(replace(raw.batch, features=features))
            return output.packed()

    def unpack(self, packed: Tensor) -> Output:
        """Unpack the predictions of `forward`."""
        extra = {target.name: len(target.names) for target in self.heads.targets}
        regions = 0 if self.heads.prompt is None else REGIONS
        return Output.unpacked(packed, regions=regions, extra=extra, variance=self.heads.variance is not None)


def _encoded(backbone: Backbone, units: Units, cached: Tensor) -> Tensor:
    """[B, S, D]: the backbone's vectors instead of the cached ones, zeros where missing."""
    if units.inputs is None:
        return torch.zeros_like(cached)
    rows = backbone.features(units.inputs)
    rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    return rows.index_select(0, units.place.flatten()).view(*units.place.shape, -1)


def encode_split(
    windows: WindowSet,
    sources: Mapping[str, Source],
    backbones: Sequence[Backbone],
    *,
    rank: int = 0,
    ranks: int = 1,
    combine: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> WindowSet:
    """The same windows with the current features of the backbones, in the stored dtype.

    Args:
        sources: stream name -> inputs of its backbone.
        rank, ranks: number of this process, and of all; each encodes its share.
        combine: sums a tensor over all processes.
    """
    tables = dict(windows.tables)
    for backbone in backbones:
        table = tables[backbone.stream.name]
        rows = combine(_encode_rows(table, sources[backbone.stream.name], backbone, rank, ranks))
        tables[backbone.stream.name] = replace(table, rows=rows)
    return replace(windows, tables=tables)


@torch.no_grad()
def _encode_rows(table: StreamTable, source: Source, backbone: Backbone, rank: int, ranks: int) -> Tensor:
    """[1 + T, D] like the table's rows; rows that no window reads, or that another process encodes, are zeros."""
    rows = torch.zeros_like(table.rows)
    read = torch.unique(table.index).cpu().long()
    read = read[read > 0]
    missing_units = torch.unique((read - 1) // backbone.per_unit)
    read_units = (read - 1) // backbone.per_unit
    size = ENCODE_BATCH[backbone.encoder.device.type]["visual" if backbone.stream.kind == VISUAL else "audio"]
    # `split` returns one empty batch for an empty tensor.
    batches = missing_units.split(size) if len(missing_units) else ()
    for units in batches[rank::ranks]:
        inputs = source.read(units)
        padded = inputs.new_zeros(size, *inputs.shape[1:])
        padded[: len(inputs)] = inputs
        made = backbone.features(padded.to(backbone.encoder.device)).to(rows.dtype)
        encoded = read[torch.isin(read_units, units)]
        position = torch.searchsorted(units, (encoded - 1) // backbone.per_unit) * backbone.per_unit
        position += (encoded - 1) % backbone.per_unit
        rows[encoded.to(rows.device)] = made[position.to(made.device)].to(rows.device)
    return rows


@dataclass(frozen=True)
class Tuning:
    """The objects of a fine-tuning step.

    Attributes:
        fabric: Lightning Fabric: device, precision, processes.
        model: the model; wrapped: the model as wrapped by Fabric.
        optimizer: one group for the heads and one for the encoders, each with its `initial_lr`.
        windows: of the training split; sources: the inputs that its features are made from.
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
    """Take one step of the optimizer; returns the losses and the norm of the whole batch: see `training_loop.update`.

    Args:
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
    """Pass once over the trainable windows: see `training_loop.train_epoch`. The next batch is read meanwhile."""
    tuning.model.train()
    config = tuning.config

    def read(batches: Sequence[Tensor]) -> Iterator[Share]:
        return ahead(lambda step: read_share(tuning, batches[step], (config.seed, epoch, step)), range(len(batches)))

    def learn(step: int, share: Share) -> Tensor:
        return train_step(tuning, share, (config.seed, epoch, step))

    return training_loop.train_epoch(tuning.optimizer, tuning.windows, config, epoch, read, learn)
