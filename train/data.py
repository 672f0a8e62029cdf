"""Load a split into one `WindowSet`: read each clip, look up the rows of its windows, pack the rows.

`read_clip` returns a clip's labels and features, `index_tables` maps windows to rows, `WindowBuilder` joins clips.
Embeddings stay on the training device if they fit, else in host memory, else in a memory-mapped scratch file.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Item
from vaflow.device import choose_device
from vaflow.errors import DataError, UsageError, command, count, explain
from vaflow.settings import settings_of
from vaflow.timeline import Floats, median_interval
from vaflow.train import index_tables as tables
from vaflow.train.batch import VISUAL, ExtraTargets, TargetSpec, read_rows, target_specs
from vaflow.train.config import TrainConfig
from vaflow.train.folds import fold_items, split_items
from vaflow.train.inputs import LOGMEL_INTERVAL, InputMasks, Inputs, InputStream, interval_of, resolve, sampling
from vaflow.train.windows import ClipRows, StreamTable, WindowSet

log = logging.getLogger(__name__)

LONGEST = 24 * 3600.0  # seconds of a clip whose arrays have fewer than one row per window
# One stream of a clip: embedding rows [T, D] (no rows if the stream lacks the clip) and their times.
Features = tuple[np.ndarray, tables.FrameTimes | tables.AudioTimes]


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
    check_annotated(windows, split, cache)
    return windows


def check_annotated(windows: WindowSet, split: str, cache: Cache) -> None:
    """Raise UsageError unless some clip of a loaded split is annotated."""
    if not windows.labelled_rows:
        problem = f"No clip of split {split!r} in {cache.place} is annotated"
        got = f"{count(len(windows.clips), 'clip')} without labels"
        remedy = "Choose another split, or extract again with the annotation beside the media"
        raise UsageError(explain(problem, expected="valence or arousal for at least one frame", got=got, remedy=remedy))


def check_has_clips(cache: Cache) -> None:
    """Raise UsageError if the cache has no clips, because the error on an unknown split could list no other split."""
    if not cache.items():
        remedy = f"Fill it: {command('extract', 'DATA', '--out', cache.place)}"
        raise UsageError(explain(f"{cache.place} has no clips", remedy=remedy))


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
    """Load the training windows of some clips.

    Args:
        streams: streams to read, from `resolve`.
        config: resolved settings (windows, label reduction).
        budget: bytes of embeddings kept on the device; None: half of its free memory. The rest of a GPU's stays in
            host memory up to half of what is free; what exceeds it is memory-mapped from a scratch file.
        scratch: folder of that file; None: the system's temporary folder.

    Raises:
        DataError: features hold NaN or infinity, labels are outside [-1, 1], or times are not credible; the clip is
            named.
        UsageError: there are no clips, or the cache does not hold what a mask of inputs requires.
        CacheError: an array cannot be read.
    """
    if not items:
        raise UsageError(explain("No clips to load", expected="at least one clip id"))
    device = torch.device(device)
    known = cache.streams()
    # The sampling is that of this cache, which can differ from the one that the run was trained on.
    streams = [replace(stream, identity=known[stream.name].identity) for stream in streams]
    targets = target_specs(cache, [name for name in config.extra_targets if name in known])
    builder = WindowBuilder(streams, targets, config, make_packs(cache, items, streams, device, budget, scratch))
    masks = InputMasks(config.min_face_quality, config.speech_mask)
    for item in tqdm(items, desc="loading", unit="clip", disable=not show, leave=False):
        builder.add(*read_clip(cache, item, streams, targets, config.grid.window, masks))
    return builder.window_set(device)


def read_clip(
    cache: Cache,
    item: str,
    streams: Sequence[InputStream],
    targets: Sequence[TargetSpec],
    window: float,
    masks: InputMasks,
) -> tuple[ClipRows, dict[str, Features]]:
    """Read every array of a clip once; returns its labels, and its features per stream.

    Args:
        window: seconds of a training window; bounds the duration.
        masks: valid inputs to leave out.

    Raises:
        DataError, CacheError, UsageError: as `load_windows`.
    """
    labels = cache.read(LABELS, item)
    outside = np.count_nonzero(~(np.abs(labels.value[labels.valid]) <= 1))
    if outside:
        problem = f"Clip {item!r} has labels outside [-1, 1]"
        expected = "valence and arousal within [-1, 1] wherever they are marked valid"
        raise DataError(explain(problem, expected=expected, got=f"{outside} values that are not"))
    arrays = {stream.name: cache.read(stream.name, item) for stream in streams if cache.has(stream.name, item)}
    clip = ClipRows(
        item=item,
        group=str(labels.meta.get("group") or item),
        duration=_duration([labels, *arrays.values()], window),
        time=labels.time,
        value=np.where(labels.valid, labels.value, np.nan).astype(np.float64),
        valid=labels.valid,
        missing=tuple(stream.name for stream in streams if stream.name not in arrays),
        extra={spec.name: read_rows(cache, spec, item) for spec in targets},
    )
    return clip, {stream.name: _features(cache, stream, arrays.get(stream.name), masks) for stream in streams}


def _duration(arrays: Sequence[Item], window: float) -> float:
    """Return the duration of the labels' record in seconds, limited to one window more than the arrays cover.

    A record can claim any duration, and windows are laid over all of it: unbounded, 3 MB of cache took 8 GB of memory.
    """
    labels = arrays[0]
    times = [np.sort(data.time, axis=None) for data in arrays if data.time.size]
    covered = max((float(time[-1] + median_interval(time)) for time in times), default=0.0)
    claimed = labels.meta.get("duration")
    duration = covered
    if isinstance(claimed, int | float) and np.isfinite(claimed) and claimed >= 0:
        duration = min(float(claimed), covered + window)
    rows = max(map(len, times), default=0)
    if duration > max(LONGEST, rows * window):
        problem = f"The times of clip {labels.item!r} are not credible"
        expected = f"at most {LONGEST:.0f} s, or a row in every window of {window:g} s"
        raise DataError(explain(problem, expected=expected, got=f"{duration:.0f} s with {rows} rows"))
    return duration


def _features(cache: Cache, stream: InputStream, data: Item | None, masks: InputMasks) -> Features:
    """Rows and times of one stream; `data` is None if the stream lacks the clip."""
    interval = interval_of(stream.kind, stream.identity)
    if data is None:
        return np.zeros((0, stream.dim)), tables.NO_FRAMES if stream.kind == VISUAL else tables.NO_AUDIO
    rows: np.ndarray = data.embedding.reshape(-1, stream.dim)
    unusable = data.valid.ravel() & ~np.isfinite(rows).all(axis=1)
    if unusable.any():
        first = float(data.time.ravel()[np.flatnonzero(unusable)[0]])
        problem = f"Clip {data.item!r} has features in stream {stream.name!r} that are NaN or infinite"
        expected = "finite numbers wherever the input is valid"
        got = f"{int(unusable.sum())} of {len(rows)} vectors that are not, the first at {first:.2f} s"
        raise DataError(explain(problem, expected=expected, got=got, remedy="Make the features of this clip again"))
    kept = masks.valid(cache, stream.name, stream.kind, data)
    if stream.kind == VISUAL:
        return rows, tables.FrameTimes(data.time, kept, interval)
    if stream.kind != "audio":  # log-Mel: one sequence over the whole clip, frame i for the i-th hop
        hops: Floats = (np.arange(len(data.time), dtype=np.float64) + 0.5) * LOGMEL_INTERVAL
        return rows, tables.AudioTimes(np.zeros(1), hops[None], kept[None], None, LOGMEL_INTERVAL)
    interval = interval or median_interval(data.time[:1].ravel())
    start = data.arrays.get("start")
    if start is None:
        return rows, tables.AudioTimes(data.time[:, 0], data.time, kept, None, interval)
    window = sampling(stream.identity).get("window")
    return rows, tables.AudioTimes(start, data.time, kept, window, interval)


class WindowBuilder:
    """Join clips into one `WindowSet`: their rows are packed, and their tables are shifted to the packed rows.

    Args:
        packs: stream name -> room for the rows of all clips.
    """

    def __init__(
        self,
        streams: Sequence[InputStream],
        targets: Sequence[TargetSpec],
        config: TrainConfig,
        packs: Mapping[str, "Pack"],
    ) -> None:
        self._streams, self._grid, self._packs = streams, config.grid, packs
        self._reduce = tables.nearest_targets if config.label_reduction == "nearest" else tables.mean_targets
        self._clips: list[ClipRows] = []
        self._windows: list[tables.WindowTimes] = []
        self._labels: list[tables.Targets] = []
        self._extra: dict[TargetSpec, list[tables.Targets]] = {spec: [] for spec in targets}
        self._tables: dict[str, list[tables.StepTable]] = {stream.name: [] for stream in streams}

    def add(self, clip: ClipRows, features: Mapping[str, Features]) -> None:
        """Append the windows of a clip."""
        windows = tables.window_times(self._grid, clip.duration)
        for stream in self._streams:
            rows, times = features[stream.name]
            if isinstance(times, tables.FrameTimes):
                table = tables.frame_table(windows, times)
            else:
                table = tables.step_table(windows, stream.steps, times)
            first_row = self._packs[stream.name].append(rows)
            packed = np.where(table.row == tables.NO_ROW, 0, table.row + first_row)
            self._tables[stream.name].append(replace(table, row=packed))
        self._labels.append(self._reduce(windows, clip.time, clip.value, clip.valid))
        for spec, parts in self._extra.items():
            targets = clip.extra[spec.name]
            parts.append(tables.nearest_targets(windows, targets.time, targets.value, targets.valid))
        self._windows.append(windows)
        first = self._clips[-1].last if self._clips else 0
        self._clips.append(replace(clip, first=first, last=first + len(windows.start)))

    def window_set(self, device: torch.device) -> WindowSet:
        """The windows of all clips, with masks and labels on `device`."""

        def joined(arrays: Sequence[np.ndarray], dtype: type, device: torch.device = device) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

        packed = {}
        for stream in self._streams:
            parts, pack = self._tables[stream.name], self._packs[stream.name]
            rows = pack.rows
            index = joined([part.row for part in parts], np.int32, rows.device)
            if stream.kind == "visual":  # with the mask and times of the output frames
                packed[stream.name] = StreamTable(rows, index, mapped=pack.mapped)
            else:
                inside = joined([part.inside for part in parts], np.bool_)
                time = joined([part.time for part in parts], np.float32)
                packed[stream.name] = StreamTable(rows, index, inside, time, pack.mapped)
        return WindowSet(
            tuple(stream.spec for stream in self._streams),
            packed,
            tuple(self._clips),
            time=torch.from_numpy(np.arange(self._grid.frames) * self._grid.step).to(device, torch.float32),
            sample_time=np.concatenate([windows.sample for windows in self._windows]),
            inside=joined([windows.inside for windows in self._windows], np.bool_),
            target=joined([labels.value for labels in self._labels], np.float32),
            labelled=joined([labels.labelled for labels in self._labels], np.bool_),
            extra={
                spec.name: ExtraTargets(
                    spec.task,
                    joined([part.value for part in parts], np.float32),
                    joined([part.labelled for part in parts], np.bool_),
                )
                for spec, parts in self._extra.items()
            },
        )


@dataclass
class Pack:
    """Packed embeddings of one stream, in memory or `mapped` from a file, filled clip by clip; row 0 stays zero."""

    rows: Tensor
    mapped: bool = False
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
    """Allocate a pack per stream: on the device up to the budget, then in host memory, then in a scratch file."""
    left = default_budget(device) if budget is None else budget
    host = default_budget(torch.device("cpu")) if device.type == "cuda" else 0
    packs = {}
    for stream in streams:
        stored = [item for item in items if cache.has(stream.name, item)]
        shapes = [cache.record(stream.name, item).arrays["embedding"]["shape"] for item in stored]
        dtype = getattr(torch, cache.streams()[stream.name].dtype)
        shape = (1 + sum(int(prod(shape[:-1])) // stream.layers for shape in shapes), stream.dim)
        size = prod(shape) * dtype.itemsize
        if size <= left:
            left -= size
            packs[stream.name] = Pack(torch.zeros(shape, dtype=dtype, device=device))
        elif size <= host:
            host -= size
            log.info(
                "Stream %s (%.1f GB) exceeds the free GPU memory and stays in host memory", stream.name, size / 1e9
            )
            packs[stream.name] = Pack(torch.zeros(shape, dtype=dtype))
        else:
            log.info("Stream %s (%.1f GB) exceeds the free memory and is memory-mapped", stream.name, size / 1e9)
            packs[stream.name] = Pack(mapped_zeros(shape, dtype, scratch), mapped=True)
    return packs


def mapped_zeros(shape: tuple[int, int], dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """Zeros in an unnamed file, which the system deletes when the process ends."""
    with tempfile.TemporaryFile(dir=scratch, prefix="vaflow-") as file:
        file.truncate(prod(shape) * dtype.itemsize)
        array = np.memmap(file, np.uint8, "r+", shape=(prod(shape) * dtype.itemsize,))
    return torch.from_numpy(array).view(dtype).view(shape)


def default_budget(device: torch.device) -> int:
    """Bytes of embeddings to keep on a device: half of its free memory, 1 GiB if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        lines = []
    kibibytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2 * 2**20)
    return kibibytes * 1024 // 2


# Settings of the group "data" that do not change the loaded clips.
NOT_LOADED = {"text", "prompts", "modality_dropout", "shared_sources", "folds", "fold", "fold_groups", "fold_splits"}


@dataclass(frozen=True)
class Data:
    """Both splits, loaded for certain streams and windows; runs with the same ones can share it."""

    train: WindowSet
    val: WindowSet


def load_data(
    cache: Cache,
    config: TrainConfig,
    inputs: Inputs,
    *,
    device: torch.device | str = "cpu",
    scratch: Path | None = None,
    show: bool = False,
) -> Data:
    """Read both splits of resolved settings.

    Raises:
        UsageError: a split does not exist or has no labels.
        DataError: features or labels are unusable; the clip is named.
    """
    splits = (config.train_split, config.val_split)
    train, val = (
        load_split(cache, split, inputs.streams, config, device=device, scratch=scratch, show=show) for split in splits
    )
    return _checked(Data(train, val), config)


def _checked(data: Data, config: TrainConfig) -> Data:
    if not len(data.train.trainable):
        raise UsageError(explain(f"No window of split {config.train_split!r} has a labelled frame"))
    return data


def data_key(config: TrainConfig) -> tuple[object, ...]:
    """Key that is equal for runs that can share loaded clips: a pair of splits, or all folds of some splits."""
    splits = {"train_split", "val_split"}
    names = [name for name, described in settings_of(TrainConfig).items() if described.group == "data"]
    settings = [getattr(config, name) for name in names if name not in NOT_LOADED | splits]
    clips = (config.fold_splits,) if config.folds else (config.train_split, config.val_split)
    return (*settings, *clips, config.extra_targets, config.device)


class LoadedSplits:
    """Loads the splits of runs on one cache. The latest clips stay loaded; folds of the same splits share rows."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._key: tuple[object, ...] = ()
        self._pool: WindowSet | None = None
        self._data: dict[tuple[str, ...], Data] = {}

    def data(self, config: TrainConfig) -> Data:
        """Both splits of resolved settings.

        Raises:
            UsageError, DataError: as `load_data`.
        """
        key, splits = data_key(config), (config.train_split, config.val_split)
        if key != self._key:  # release the old data before the new is read
            self._key, self._pool, self._data = key, None, {}
        name = (*splits, config.fold_groups)
        if name in self._data:
            return self._data[name]
        config, inputs = resolve(self._cache, config)
        device = choose_device(config.device)
        if not config.folds:
            self._data[name] = load_data(self._cache, config, inputs, device=device)
            return self._data[name]
        if self._pool is None:
            items = fold_items(self._cache, config.fold_splits)
            self._pool = load_windows(self._cache, items, inputs.streams, config, device=device)
        chosen = [split_items(self._cache, split, config.fold_splits, config.fold_groups) for split in splits]
        train, val = (self._pool.of_clips(set(items)) for items in chosen)
        for windows, split in ((train, splits[0]), (val, splits[1])):
            check_annotated(windows, split, self._cache)
        self._data[name] = _checked(Data(train, val), config)
        return self._data[name]
