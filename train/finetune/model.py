"""Backbones and heads as one module, the batches that they read, and a whole split encoded anew."""

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

# Rows of a batch in which a split is encoded, padded: those of `vaflow extract`, for results depend on it in low bits.
ENCODE_BATCH = {"cpu": {"visual": 16, "audio": 2}, "cuda": {"visual": 256, "audio": 64}}


@dataclass(frozen=True)
class Units:
    """What one backbone reads for a batch.

    Attributes:
        inputs: [U, ...] pictures or log-Mel, each once however many windows share it; None: there is none to read.
        place: [B, S] int64 row of the backbone's result, counted from 1; 0: nothing there.
    """

    inputs: Tensor | None
    place: Tensor


class Raw:
    """A batch before its encoders. No dataclass and no dict: precision plugins look into those, and would round times.

    Attributes:
        batch: with the cached features of all streams.
        units: stream -> what its backbone reads.
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
    """The windows `ids`, [B] int64, as a batch, and every picture and sound that they read, once."""
    units = {}
    for backbone in backbones:
        table = windows.tables[backbone.stream.name]
        index = table.index.index_select(0, ids.to(table.index.device)).cpu().long()
        wanted, place = share_units(index, backbone.per_unit)
        inputs = sources[backbone.stream.name].read(wanted, augment) if len(wanted) else None
        units[backbone.stream.name] = Units(inputs, place)
    return Raw(windows.gather(ids), units)


def share_units(index: Tensor, per_unit: int) -> tuple[Tensor, Tensor]:
    """Packed rows [B, S], 0 for nothing -> the units that hold them, [U] ascending, and each row's place, [B, S]."""
    there = index > 0
    unit = (index - 1) // per_unit
    wanted = torch.unique(unit[there])
    place = 1 + torch.searchsorted(wanted, unit) * per_unit + (index - 1) % per_unit
    return wanted, torch.where(there, place, 0)


class TunedModel(nn.Module):
    """Pictures and sound -> features -> heads.

    Args:
        heads: on the features.
        backbones: what makes them; their networks stay in evaluation mode. Streams without one are read as cached.
    """

    def __init__(self, heads: VAModel, backbones: Sequence[Backbone]) -> None:
        super().__init__()
        self.heads = heads
        self.networks = nn.ModuleList(backbone.module for backbone in backbones)
        self.backbones = tuple(backbones)

    def train(self, mode: bool = True) -> "TunedModel":
        """As `nn.Module.train`, but for the backbones."""
        super().train(mode)
        self.networks.eval()
        return self

    def forward(self, raw: Raw) -> Tensor:
        """Predictions side by side, [B, F, K] float32 (see `Output.packed`): one tensor, for several processes.

        The encoders run in the precision that is active outside; the heads, which are small, in float32.
        """
        features = dict(raw.batch.features)
        for backbone in self.backbones:
            name = backbone.stream.name
            features[name] = _encoded(backbone, raw.units[name], features[name])
        with torch.autocast(raw.batch.inside.device.type, enabled=False):
            output: Output = self.heads(replace(raw.batch, features=features))
            return output.packed()

    def unpack(self, packed: Tensor) -> Output:
        """The predictions that `forward` packed."""
        extra = {target.name: len(target.names) for target in self.heads.targets}
        return Output.unpacked(packed, regions=0 if self.heads.prompt is None else REGIONS, extra=extra)


def _encoded(backbone: Backbone, units: Units, cached: Tensor) -> Tensor:
    """[B, S, D]: the backbone's vectors instead of the cached ones, zeros where missing."""
    if units.inputs is None:
        return torch.zeros_like(cached)
    rows = backbone.features(units.inputs.to(cached.device))
    rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    place = units.place.to(cached.device)
    return rows.index_select(0, place.flatten()).view(*place.shape, -1)


def encode_split(
    windows: WindowSet,
    sources: Mapping[str, Source],
    backbones: Sequence[Backbone],
    *,
    rank: int = 0,
    ranks: int = 1,
    combine: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> WindowSet:
    """The same windows with features that the backbones make now, stored as the cache stores them.

    Args:
        windows: of a split; sources: what its features were made of; backbones: what makes them.
        rank, ranks: which of how many processes this is; each encodes its part.
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
    """[1 + T, D] like the table's rows; rows that no window reads, or that another process makes, are zeros."""
    rows = torch.zeros_like(table.rows)
    read = torch.unique(table.index).cpu().long()
    read = read[read > 0]
    wanted = torch.unique((read - 1) // backbone.per_unit)
    read_units = (read - 1) // backbone.per_unit
    size = ENCODE_BATCH[backbone.encoder.device.type]["visual" if backbone.stream.kind == VISUAL else "audio"]
    batches = wanted.split(size) if len(wanted) else ()  # of nothing, PyTorch makes one empty part
    for units in batches[rank::ranks]:
        inputs = source.read(units)
        padded = inputs.new_zeros(size, *inputs.shape[1:])
        padded[: len(inputs)] = inputs
        made = backbone.features(padded.to(backbone.encoder.device)).to(rows.dtype)
        own = read[torch.isin(read_units, units)]
        place = torch.searchsorted(units, (own - 1) // backbone.per_unit) * backbone.per_unit
        place += (own - 1) % backbone.per_unit
        rows[own.to(rows.device)] = made[place.to(made.device)].to(rows.device)
    return rows
