"""Load a split: clip by clip, arrays -> index tables -> packed tensors of one `WindowSet`.

Each array is read once. Embeddings stay on the training device, or in a memory-mapped scratch file.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Item, Json
from vaflow.errors import DataError, UsageError, count, explain
from vaflow.regions import region_table
from vaflow.timeline import Floats, Grid, median_interval
from vaflow.train import index_tables as tables
from vaflow.train.batch import ExtraTargets, TargetSpec
from vaflow.train.config import TrainConfig
from vaflow.train.folds import split_items
from vaflow.train.inputs import LOGMEL_INTERVAL, InputStream, interval_of, sampling
from vaflow.train.metrics import region_occupancy
from vaflow.train.targets import read_rows, target_specs
from vaflow.train.windows import ClipRows, StreamTable, WindowSet

log = logging.getLogger(__name__)

LONGEST = 24 * 3600.0  # seconds of a clip whose arrays have less than one row per window


@dataclass
class Pack:
    """Packed embeddings of one stream, filled clip by clip; row 0 stays zero."""

    rows: Tensor
    filled: int = 1

    def append(self, embedding: np.ndarray) -> int:
        """Add [T, D] rows; returns the number of the first one."""
        first = self.filled
        self.filled += len(embedding)
        self.rows[first : self.filled].copy_(torch.from_numpy(embedding))
        return first


def make_packs(
    cache: Cache,
    items: Sequence[str],
    streams: Sequence[InputStream],
    device: torch.device,
    budget: int | None,
    scratch: Path | None,
) -> dict[str, Pack]:
    """Allocate a pack per stream: on the device up to the budget, then in a scratch file."""
    left = default_budget(device) if budget is None else budget
    packs = {}
    for stream in streams:
        dtype = getattr(torch, cache.streams()[stream.name].dtype)
        shape = (1 + sum(_row_count(cache, stream, item) for item in items), stream.dim)
        size = prod(shape) * dtype.itemsize
        if size <= left:
            left -= size
            packs[stream.name] = Pack(torch.zeros(shape, dtype=dtype, device=device))
        else:
            log.info("Stream %s (%.1f GB) does not fit in memory and is memory-mapped", stream.name, size / 1e9)
            packs[stream.name] = Pack(mapped(shape, dtype, scratch))
    return packs


def _row_count(cache: Cache, stream: InputStream, item: str) -> int:
    if not cache.has(stream.name, item):
        return 0
    shape = cache.record(stream.name, item).arrays["embedding"]["shape"]
    return int(prod(shape[:-1])) // stream.layers


def mapped(shape: tuple[int, int], dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """Zeros in an unnamed file: the system deletes it however the program ends."""
    with tempfile.TemporaryFile(dir=scratch, prefix="vaflow-") as file:
        file.truncate(prod(shape) * dtype.itemsize)
        array = np.memmap(file, np.uint8, "r+", shape=(prod(shape) * dtype.itemsize,))
    return torch.from_numpy(array).view(dtype).view(shape)


def default_budget(device: torch.device) -> int:
    """Bytes of embeddings to keep on a device: half of its free memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return available_memory() // 2


def available_memory() -> int:
    """Bytes of memory available without swapping; 2 GiB if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 2 * 2**30
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2 * 2**20)
    return kilobytes * 1024


def load_windows(
    cache: Cache,
    items: Sequence[str],
    streams: Sequence[InputStream],
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
    budget: int | None = None,
    scratch: Path | None = None,
    show: bool = False,
) -> WindowSet:
    """Read the streams of some clips and divide them into training windows.

    Args:
        cache: of the clips.
        items: clip ids.
        streams: what to read, from `resolve`.
        config: resolved settings (windows, label reduction).
        device: of the batches.
        budget: bytes of embeddings kept on the device; the rest is memory-mapped from a scratch file. None: half of
            the free memory.
        scratch: folder of that file; None: the system's temporary folder.
        show: progress bar.

    Raises:
        DataError: features hold NaN or infinity, or a clip's labels are not within [-1, 1]; the clip is named.
        UsageError: there are no clips.
        CacheError: an array cannot be read.
    """
    if not items:
        raise UsageError(explain("There are no clips to read", expected="at least one item"))
    device = torch.device(device)
    known = cache.streams()
    streams = [replace(stream, identity=known[stream.name].identity) for stream in streams]  # sampled as it is here
    packs = make_packs(cache, items, streams, device, budget, scratch)
    there = [name for name in config.extra_targets if name in known]
    specs = {spec.name: spec for spec in target_specs(cache, there)}
    clips: list[ClipRows] = []
    parts: list[_ClipTables] = []
    for item in tqdm(items, desc="loading", unit="clip", disable=not show, leave=False):
        first = clips[-1].last if clips else 0
        clip, part = _read_clip(cache, item, streams, config, packs, specs, first)
        clips.append(clip)
        parts.append(part)
    return _assemble(streams, specs, config.grid, packs, clips, parts, device)


def check_has_clips(cache: Cache) -> None:
    """Refuse an empty cache: its splits cannot be named.

    Raises:
        UsageError: the cache has no clips.
    """
    if not cache.items():
        remedy = f"Fill it: vaflow extract DATA --out {cache.place}"
        raise UsageError(explain(f"{cache.place} has no clips", remedy=remedy))


def load_split(
    cache: Cache, split: str, streams: Sequence[InputStream], config: TrainConfig, **options: object
) -> WindowSet:
    """Load the clips of one split or fold; `options` are those of `load_windows`.

    Raises:
        UsageError: the split has no clips, or none of them is annotated.
        DataError, CacheError: as `load_windows`.
    """
    check_has_clips(cache)
    items = split_items(cache, split, config.fold_splits, config.fold_groups)
    windows = load_windows(cache, items, streams, config, **options)  # type: ignore[arg-type]
    if not windows.labelled_rows:
        raise UsageError(
            explain(
                f"No clip of split {split!r} in {cache.place} is annotated",
                expected="valence or arousal for at least one frame",
                got=f"{count(len(windows.clips), 'clip')} without labels",
                remedy="Choose another split, or extract again with the annotation beside the media",
            )
        )
    return windows


@dataclass(frozen=True)
class _ClipTables:
    """Index tables of one clip's windows; `offset`: its first row in each pack."""

    windows: tables.WindowTimes
    targets: tables.Targets
    steps: dict[str, tables.StepTable]
    offset: dict[str, int]
    extra: dict[str, tables.Targets]


def _read_clip(
    cache: Cache,
    item: str,
    streams: Sequence[InputStream],
    config: TrainConfig,
    packs: dict[str, Pack],
    specs: Mapping[str, TargetSpec],
    first: int,
) -> tuple[ClipRows, _ClipTables]:
    labels = cache.read(LABELS, item)
    _check_labels(labels)
    found = {stream.name: cache.read(stream.name, item) for stream in streams if cache.has(stream.name, item)}
    duration = _duration(labels, list(found.values()), config.grid.window)
    windows = tables.window_times(config.grid, duration)
    reduce = tables.nearest_targets if config.label_reduction == "nearest" else tables.mean_targets
    value = np.where(labels.valid, labels.value, np.nan).astype(np.float64)
    targets = reduce(windows, labels.time, value, labels.valid, config.grid.step)
    steps, offset = {}, {}
    for stream in streams:
        data = found.get(stream.name)
        steps[stream.name] = _table(windows, duration, stream, config.grid, data)
        offset[stream.name] = packs[stream.name].append(_checked_rows(data, stream)) if data is not None else 0
    extra = {name: read_rows(cache, spec, item) for name, spec in specs.items()}
    nearest = {
        name: tables.nearest_targets(windows, rows.time, rows.value, rows.valid, config.grid.step)
        for name, rows in extra.items()
    }
    clip = ClipRows(
        item=item,
        group=str(labels.meta.get("group") or item),
        duration=duration,
        time=labels.time,
        value=value,
        valid=labels.valid,
        first=first,
        last=first + len(windows.start),
        missing=tuple(stream.name for stream in streams if stream.name not in found),
        extra=extra,
    )
    return clip, _ClipTables(windows, targets, steps, offset, nearest)


def _duration(labels: Item, found: Iterable[Item], window: float) -> float:
    """Seconds of the clip: the record's duration, but at most one window more than its arrays cover.

    A record can claim any duration, and windows are laid over all of it: unbounded, 3 MB of cache took 8 GB of memory.

    Raises:
        DataError: times of more than `LONGEST` seconds in arrays with less than one row per window.
    """
    times = [np.sort(data.time, axis=None) for data in (labels, *found) if data.time.size]
    covered = max((float(time[-1] + median_interval(time)) for time in times), default=0.0)
    claimed = _number(labels.meta, "duration")
    duration = covered if claimed is None else min(claimed, covered + window)
    rows = max(map(len, times), default=0)
    if duration > max(LONGEST, rows * window):
        raise DataError(
            explain(
                f"The times of clip {labels.item!r} are not credible",
                expected=f"at most {LONGEST:.0f} s, or a row in every window of {window:g} s",
                got=f"{duration:.0f} s with {rows} rows",
            )
        )
    return duration


def _number(meta: Json, key: str) -> float | None:
    value = meta.get(key)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) and value >= 0 else None


def _check_labels(labels: Item) -> None:
    known = labels.value[labels.valid]
    if not (np.abs(known) <= 1).all():
        raise DataError(
            explain(
                f"Clip {labels.item!r} has labels outside [-1, 1]",
                expected="valence and arousal within [-1, 1] wherever they are marked valid",
                got=f"{np.count_nonzero(~(np.abs(known) <= 1))} values that are not",
            )
        )


def _checked_rows(data: Item, stream: InputStream) -> np.ndarray:
    """The embedding as [T, D]; refuses valid rows that are not finite."""
    embedding: np.ndarray = data.embedding.reshape(-1, stream.dim)
    bad = data.valid.ravel() & ~np.isfinite(embedding).all(axis=1)
    if bad.any():
        where = float(data.time.ravel()[np.flatnonzero(bad)[0]])
        raise DataError(
            explain(
                f"Clip {data.item!r} has features in stream {stream.name!r} that are NaN or infinite",
                expected="finite numbers wherever the input is valid",
                got=f"{int(bad.sum())} of {len(bad)} vectors that are not, the first at {where:.2f} s",
                remedy="Make the features of this clip again",
            )
        )
    return embedding


def _table(
    windows: tables.WindowTimes, duration: float, stream: InputStream, grid: Grid, data: Item | None
) -> tables.StepTable:
    """Index table of one stream for the clip's windows; `data` is None if the stream lacks the clip."""
    interval = interval_of(stream.kind, stream.identity)
    if stream.kind == "visual":
        time, valid = (np.zeros(0), np.zeros(0, bool)) if data is None else (data.time, data.valid)
        return tables.frame_table(windows, time, valid, interval or median_interval(time, grid.step))
    sound = tables.SILENCE if data is None else _sound_times(stream, data, interval)
    return tables.step_table(windows, duration, grid.window, stream.steps, sound)


def _sound_times(stream: InputStream, data: Item, interval: float | None) -> tables.SoundTimes:
    if stream.kind != "audio":  # log-Mel: one sequence over the whole clip, frame i for the i-th hop
        hops: Floats = (np.arange(len(data.time), dtype=np.float64) + 0.5) * LOGMEL_INTERVAL
        return tables.SoundTimes(np.zeros(1), hops[None], data.valid[None], None, LOGMEL_INTERVAL)
    spacing = interval or median_interval(data.time[:1].ravel())
    start = data.arrays.get("start")
    if start is None:
        return tables.SoundTimes(data.time[:, 0], data.time, data.valid, None, spacing)
    return tables.SoundTimes(start, data.time, data.valid, sampling(stream.identity).get("window"), spacing)


def _assemble(
    streams: Sequence[InputStream],
    specs: Mapping[str, TargetSpec],
    grid: Grid,
    packs: dict[str, Pack],
    clips: list[ClipRows],
    parts: list[_ClipTables],
    device: torch.device,
) -> WindowSet:
    def on_device(arrays: list[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    packed = {}
    for stream in streams:
        rows = packs[stream.name].rows
        index = torch.from_numpy(np.concatenate([_packed_index(stream, part) for part in parts])).to(rows.device)
        if stream.kind == "visual":
            packed[stream.name] = StreamTable(rows, index)
        else:
            own = [part.steps[stream.name] for part in parts]
            inside = on_device([table.inside for table in own], np.bool_)
            packed[stream.name] = StreamTable(rows, index, inside, on_device([t.time for t in own], np.float32))
    return WindowSet(
        tuple(stream.spec for stream in streams),
        packed,
        tuple(clips),
        time=torch.from_numpy(np.arange(grid.frames) * grid.step).to(device, torch.float32),
        sample_time=np.concatenate([part.windows.sample for part in parts]),
        inside=on_device([part.windows.inside for part in parts], np.bool_),
        target=on_device([part.targets.value for part in parts], np.float32),
        labelled=on_device([part.targets.labelled for part in parts], np.bool_),
        extra={
            name: ExtraTargets(
                spec.task,
                on_device([part.extra[name].value for part in parts], np.float32),
                on_device([part.extra[name].labelled for part in parts], np.bool_),
            )
            for name, spec in specs.items()
        },
    )


def _packed_index(stream: InputStream, part: _ClipTables) -> np.ndarray:
    """[W, S] int32 rows of the packed tensor; 0 where there is nothing."""
    table = part.steps[stream.name]
    return np.where(table.row == tables.NOTHING, 0, table.row + part.offset[stream.name]).astype(np.int32)


def describe_labels(windows: WindowSet, centers: float) -> str:
    """How the annotation lies over the nine regions, as a table of per cent: valence down, arousal across."""
    value = np.concatenate([clip.value for clip in windows.clips])
    valid = np.concatenate([clip.valid for clip in windows.clips])
    share = region_occupancy(np.where(valid, value, 0), valid, centers)
    if not np.isfinite(share).all():
        return "No frame is annotated in both dimensions, so there are no regions"
    return f"Share of labelled frames per region:\n{region_table(share.tolist())}"
