"""Backbones and heads as one module, its batches, and the encoding of a whole split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vaflow.train.batch import VISUAL, Batch, Output
from vaflow.train.finetune.augment import Augment
from vaflow.train.finetune.backbones import Backbone
from vaflow.train.finetune.data import Source
from vaflow.train.heads.model import VAModel
from vaflow.train.losses import REGIONS
from vaflow.train.windows import StreamTable, WindowSet

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
            None if inputs is None else _copied(inputs, device), _copied(position, device)
        )
    return Raw(windows.gather(ids), units)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU through pinned memory, so that no thread waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
        heads: model on the features.
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
        windows: windows of a split.
        sources: stream name -> inputs of its backbone.
        backbones: encoders.
        rank, ranks: number of this process, and of all; each encodes its share.
        combine: sums a tensor over all processes.
    """
    tables = dict(windows.tables)
    for backbone in backbones:
        table = tables[backbone.stream.name]
        rows = combine(_encode_rows(table, sources[backbone.stream.name], backbone, rank, ranks))
        tables[backbone.stream.name] = replace(table, rows=rows)
    return windows.with_tables(tables)


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
