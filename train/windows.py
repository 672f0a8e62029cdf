"""All windows of one split in memory, batches gathered by index or ahead, and windows that lack a modality.

No file is read per window. Modality dropout (not in the papers) trains the model on windows without audio or without
faces.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats
from vaflow.train.batch import AUDIO, VISUAL, Batch, ExtraRows, ExtraTargets, StreamSpec

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ClipRows:
    """Labels of one clip, and the range of its windows.

    Attributes:
        item, group: names of the clip and of its source video.
        duration: seconds.
        time: [R] presentation times; value, valid: [R, 2] labels, NaN and False where not annotated.
        first, last: its windows are first .. last - 1 of the set.
        missing: streams of the set that lack this clip.
        extra: name -> its further targets.
    """

    item: str
    group: str
    duration: float
    time: Floats
    value: Floats
    valid: Bools
    first: int = 0
    last: int = 0
    missing: tuple[str, ...] = ()
    extra: Mapping[str, ExtraRows] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamTable:
    """Packed rows of one stream of a split, and the rows that each window reads.

    Attributes:
        rows: [1 + T, D] all embeddings of the split end to end, as cached; row 0 is zeros, for missing input.
        index: [N, S] int32, rows of every window, on the device of `rows`; 0: missing.
        inside: [N, S] bool on the training device; None: as the output frames (visual streams).
        time: [N, S] float32 seconds after the window's start, likewise.
        mapped: `rows` is memory-mapped from a file.
    """

    rows: Tensor
    index: Tensor
    inside: Tensor | None = None
    time: Tensor | None = None
    mapped: bool = False

    @cached_property
    def host_index(self) -> Tensor:
        """`index` as int64 on the CPU, copied once: reading inputs ahead must not wait for the device."""
        return self.index.cpu().long()


@dataclass(eq=False)
class WindowSet:
    """The windows of some clips, gathered into batches by index.

    Attributes:
        tables: stream name -> its packed rows and index.
        clips: in the order of their windows.
        time: [F] float32 seconds of the output frames after the window's start.
        sample_time: [N, F] float64 seconds after the clip's start.
        inside: [N, F] bool; target: [N, F, 2] float32; labelled: [N, F, 2] bool, all on the training device.
        extra: name -> further targets of all windows, likewise.
    """

    streams: tuple[StreamSpec, ...]
    tables: Mapping[str, StreamTable]
    clips: tuple[ClipRows, ...]
    time: Tensor
    sample_time: Floats
    inside: Tensor
    target: Tensor
    labelled: Tensor
    extra: Mapping[str, ExtraTargets] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inside)

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self.inside.device

    @property
    def off_device(self) -> bool:
        """Whether features are read from a file or from another device: then reading ahead of the step saves time."""
        return any(table.mapped or table.rows.device != self.device for table in self.tables.values())

    @cached_property
    def trainable(self) -> Tensor:
        """[M] int64 on the CPU: windows with at least one labelled frame."""
        masks = [self.labelled, *(targets.labelled for targets in self.extra.values())]
        return torch.stack([mask.flatten(1).any(dim=1) for mask in masks]).any(dim=0).nonzero().flatten().cpu()

    @cached_property
    def inside_array(self) -> Bools:
        """`inside` as an array."""
        result: Bools = self.inside.cpu().numpy()
        return result

    @property
    def labelled_rows(self) -> int:
        """Annotation rows of all clips that are labelled in at least one dimension."""
        return sum(int(clip.valid.any(axis=1).sum()) for clip in self.clips)

    @property
    def labelled_each(self) -> tuple[int, int]:
        """Labelled annotation rows of valence and of arousal."""
        valence, arousal = sum((clip.valid.sum(axis=0) for clip in self.clips), np.zeros(2, np.int64)).tolist()
        return valence, arousal

    def clip_of(self, window: int) -> ClipRows:
        """The clip of a window."""
        firsts = [clip.first for clip in self.clips]
        return self.clips[int(np.searchsorted(firsts, window, side="right")) - 1]

    def gather(self, ids: Tensor) -> Batch:
        """The windows `ids`, [B] int64 on any device, as a batch on the training device."""
        return gather_each([self], [ids])

    def labels(self, ids: Tensor, counted: Tensor | None = None) -> Batch:
        """The windows `ids`, [B] int64, as a batch without features.

        Args:
            counted: [B] bool, False for windows that only pad the batch: their labels are masked.
        """
        ids = to_device(ids, self.device)
        inside = self.inside.index_select(0, ids)
        every = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        mask = (every if counted is None else counted.to(self.device))[:, None, None]
        extra = {name: targets.map(lambda x: x.index_select(0, ids)) for name, targets in self.extra.items()}
        return Batch(
            features={},
            valid={},
            feature_inside={},
            feature_time={},
            inside=inside,
            time=self.time.expand(inside.shape),
            target=self.target.index_select(0, ids),
            labelled=self.labelled.index_select(0, ids) & mask,
            window=ids,
            extra={name: replace(targets, labelled=targets.labelled & mask) for name, targets in extra.items()},
        )

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The trainable windows in random order, `batch_size` at a time, the last batch too.

        On the device, or on the CPU if features are read there, because reading must not wait for the device.
        """
        order = self.trainable[torch.randperm(len(self.trainable), generator=generator)]
        yield from order.to("cpu" if self.off_device else self.device).split(batch_size)

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """All windows in order, `batch_size` at a time, the last batch too."""
        yield from torch.arange(len(self), device="cpu" if self.off_device else self.device).split(batch_size)

    def without(self, hidden: frozenset[str]) -> "WindowSet":
        """The same windows with some streams masked as missing."""
        masked = {n: replace(self.tables[n], index=torch.zeros_like(self.tables[n].index)) for n in hidden}
        return replace(self, tables={**self.tables, **masked})

    def of_clips(self, items: Collection[str]) -> "WindowSet":
        """The windows of some of the clips; the rows of features stay shared."""
        clips = [clip for clip in self.clips if clip.item in items]
        windows = torch.cat([torch.arange(clip.first, clip.last) for clip in clips])
        ends = np.cumsum([clip.last - clip.first for clip in clips]).tolist()
        ids = windows.to(self.device)

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[ids.to(tensor.device)]

        return replace(
            self,
            tables={
                name: StreamTable(t.rows, t.index[ids.to(t.index.device)], part(t.inside), part(t.time), t.mapped)
                for name, t in self.tables.items()
            },
            clips=tuple(replace(c, first=end - c.last + c.first, last=end) for c, end in zip(clips, ends, strict=True)),
            sample_time=self.sample_time[windows.numpy()],
            inside=self.inside[ids],
            target=self.target[ids],
            labelled=self.labelled[ids],
            extra={name: targets.map(lambda x: x[ids]) for name, targets in self.extra.items()},
        )

    def statistics(self, stream: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per dimension over the stream's rows that some window reads, [D] each."""
        table = self.tables[stream]
        used = torch.unique(table.index)
        used = used[used > 0]
        total = torch.zeros(table.rows.shape[1], dtype=torch.float64, device=table.rows.device)
        squares = torch.zeros_like(total)
        for part in used.split(65536):
            rows = table.rows.index_select(0, part).double()
            total += rows.sum(dim=0)
            squares += rows.square().sum(dim=0)
        count = max(1, len(used))
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        return mean.float().to(self.device), deviation.float().to(self.device)

    def sample_validity(self, clip: ClipRows, kind: str = VISUAL) -> tuple[Floats, Bools]:
        """Instants [K] of a clip, ascending, and whether a stream of `kind` has input at each [K]."""
        windows = slice(clip.first, clip.last)
        streams = [stream.name for stream in self.streams if stream.kind == kind]
        return self.flagged(clip, [self.tables[name].index[windows].cpu().numpy() > 0 for name in streams])

    def flagged(self, clip: ClipRows, flags: Sequence[Bools]) -> tuple[Floats, Bools]:
        """Instants [K] of a clip, ascending, and whether a flag is set at each [K].

        Args:
            clip: W windows.
            flags: [W, S] each, per step of the windows; S may differ.
        """
        windows = slice(clip.first, clip.last)
        frames = self.inside.shape[1]
        inside = self.inside_array[windows]
        instants, where = np.unique(self.sample_time[windows][inside], return_inverse=True)
        if not flags:
            return instants, np.zeros(instants.shape, bool)
        steps = [np.arange(frames) * flag.shape[1] // frames for flag in flags]  # the step at the time of each frame
        any_set = np.any([flag[:, step] for flag, step in zip(flags, steps, strict=True)], axis=0)[inside]
        return instants, np.bincount(where, weights=any_set, minlength=instants.size) > 0


def gather_each(sets: Sequence[WindowSet], ids: Sequence[Tensor]) -> Batch:
    """Windows of several sets of the same streams as one batch: those of the first set, then those of the second, ...

    Args:
        sets: window sets on one device.
        ids: [B] int64 per set, on any device.
    """
    first = sets[0]
    if any(windows is not first for windows in sets):
        batch = _joined([windows.labels(chosen) for windows, chosen in zip(sets, ids, strict=True)])
    else:
        ids, sets = [ids[0] if len(ids) == 1 else torch.cat(list(ids))], sets[:1]
        batch = first.labels(ids[0])
    features, valid, feature_inside, feature_time = {}, {}, {}, {}
    for stream in first.streams:
        tables = [windows.tables[stream.name] for windows in sets]
        index = _cat([t.index.index_select(0, to_device(k, t.index.device)) for t, k in zip(tables, ids, strict=True)])
        if all(table.rows is tables[0].rows for table in tables):
            rows = _rows_on(first.device, tables[0].rows, index.flatten())
        else:
            parts = zip(tables, index.split([len(chosen) for chosen in ids]), strict=True)
            rows = torch.cat([_rows_on(first.device, table.rows, part.flatten()) for table, part in parts])
        features[stream.name] = rows.view(*index.shape, -1).to(torch.float32)
        valid[stream.name] = to_device(index > 0, first.device)
        if tables[0].inside is None or tables[0].time is None:
            feature_inside[stream.name], feature_time[stream.name] = batch.inside, batch.time
            continue
        windows_of = batch.window.split([len(chosen) for chosen in ids])
        for name, chosen in (("inside", feature_inside), ("time", feature_time)):
            masks = [getattr(t, name).index_select(0, k) for t, k in zip(tables, windows_of, strict=True)]
            chosen[stream.name] = _cat(masks)
    return replace(batch, features=features, valid=valid, feature_inside=feature_inside, feature_time=feature_time)


def _rows_on(device: torch.device, rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]` on a device, in the stored precision; to a GPU through page-locked memory, without waiting."""
    if rows.device == device or device.type != "cuda":
        return rows.index_select(0, index).to(device)
    staged = torch.empty((len(index), rows.shape[1]), dtype=rows.dtype, pin_memory=True)
    return torch.index_select(rows, 0, index, out=staged).to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from host memory to a GPU through page-locked memory, so that no thread waits."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return staged.copy_(tensor).to(device, non_blocking=True)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches without features as one batch."""
    plain = {n: torch.cat([getattr(b, n) for b in batches]) for n in ("inside", "time", "target", "labelled", "window")}
    extra = {}
    for name, targets in batches[0].extra.items():
        parts = [[getattr(batch.extra[name], part) for batch in batches] for part in ("value", "labelled")]
        extra[name] = ExtraTargets(targets.task, *map(torch.cat, parts))
    return replace(batches[0], **plain, extra=extra)  # type: ignore[arg-type]


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Like `map`, but a thread computes the next result while the caller uses the current one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


class Prefetcher(Generic[Item]):
    """Gathers batches, ahead of their use if features are not in the memory of the device.

    The reading thread gathers rows into page-locked memory and copies them to a GPU on a stream of its own while a step
    runs, and the stream of the step waits for the copy by an event, so neither thread waits for a copy. The GPU part
    has not run on a GPU; the tests rehearse it with pretended tensors.

    Args:
        windows: a set on the device of the batches; whether it is `off_device` decides how batches are read.
        gather: item -> batch; None: `windows.gather`.
    """

    def __init__(self, windows: WindowSet, gather: Callable[[Item], Batch] | None = None) -> None:
        self._gather: Callable[[Any], Batch] = gather or windows.gather
        self._off_device, self._stream = windows.off_device, None
        if self._off_device and windows.device.type == "cuda":
            self._stream = torch.cuda.Stream(windows.device)
            self._stream.wait_stream(torch.cuda.current_stream(windows.device))  # masks and labels may be pending

    def batches(self, items: Iterable[Item]) -> Iterator[Batch]:
        """The batch of every item, in order."""
        order: Callable[..., Iterable[tuple[Batch, Any]]] = ahead if self._off_device else map
        for batch, copied in order(self.read, items):
            yield self.take(batch, copied)

    def read(self, item: Item) -> tuple[Batch, Any]:
        """A batch whose copies may be under way, and the event after them. Called by the reading thread."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = self._gather(item)
        return batch, None if self._stream is None else self._stream.record_event()

    def take(self, batch: Batch, copied: Any) -> Batch:
        """The batch for use on the current stream, which waits for the copies; this thread does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(copied)
            for tensor in tensors_of(vars(batch)):
                tensor.record_stream(current)  # its memory is not reused for the next copy before this step ends
        return batch


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))


def without_modality(windows: WindowSet, modality: str) -> WindowSet:
    """The same windows with every stream of a modality marked as missing.

    Raises:
        UsageError: not a modality, the windows have no stream of it, or no other stream.
    """
    if modality not in (VISUAL, AUDIO):
        raise UsageError(explain("Unknown modality", got=modality, choices=(VISUAL, AUDIO)))
    names = {stream.name for stream in windows.streams if stream.kind == modality}
    if not names or len(names) == len(windows.streams):
        problem = f"--without {modality} leaves the run without input"
        got = "one that reads " + ", ".join(f"{s.name} ({s.kind})" for s in windows.streams)
        raise UsageError(explain(problem, expected="a run that reads a visual and an audio stream", got=got))
    return windows.without(frozenset(names))
