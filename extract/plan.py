"""What must be encoded, and what is already there."""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapreplace
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.cache.documents import source_stamp
from vaflow.cache.schema import StreamInfo
from vaflow.datasets.clip import Clip
from vaflow.errors import MediaError
from vaflow.extract.config import Shard
from vaflow.extract.durations import lengths
from vaflow.extract.image_folders import crops_identity, list_crops, stills_identity
from vaflow.extract.sources import file_status, same_file, sources_of
from vaflow.extract.streams import SOURCES, source_of


@dataclass(frozen=True)
class Task:
    """A clip and the streams that it lacks; `changed` where an older version of it is in the cache."""

    clip: Clip
    streams: tuple[str, ...]
    changed: bool


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        tasks: clips with something to do, longest first.
        done: clips of this shard with nothing to do.
    """

    tasks: tuple[Task, ...]
    done: int

    @property
    def changed(self) -> int:
        """Clips whose source is not what it was when they were extracted."""
        return sum(task.changed for task in self.tasks)


def make_plan(cache: Cache, infos: dict[str, StreamInfo], clips: Iterable[Clip], shard: Shard) -> Plan:
    """Compare the data set with the cache, clip by clip and stream by stream.

    A stream's item is done when it is committed and its source (by content; by size and time where they agree) is
    still the same.
    """
    mine = shard_clips(clips, shard)
    stamps = {name: _stamps(cache, name, mine) for name in infos}
    tasks = {clip.id: task for clip in mine if (task := _task(cache, infos, stamps, clip)).streams}
    ordered = longest_first([task.clip for task in tasks.values()])
    return Plan(tuple(tasks[clip.id] for clip in ordered), len(mine) - len(tasks))


def longest_first(clips: Iterable[Clip]) -> list[Clip]:
    """So that no worker is left alone with the longest clip at the end."""
    clips = list(clips)
    seconds = lengths(clips)
    return sorted(clips, key=lambda clip: (-_milliseconds(seconds[clip.id]), clip.id))


def shard_clips(clips: Iterable[Clip], shard: Shard) -> list[Clip]:
    """Deal clips out longest first, each to the part with least so far: the same deal on every machine.

    What is not divided is left as it is, unread.

    Lengths are those of `vaflow.extract.durations`, to the millisecond. The largest part exceeds the smallest by one
    clip at most.
    """
    clips = list(clips)
    if shard.count == 1:
        return clips
    seconds = lengths(clips)
    ordered = sorted(clips, key=lambda clip: (-_milliseconds(seconds[clip.id]), clip.id))
    loads = [(0, part) for part in range(1, shard.count + 1)]  # a heap: the least loaded part is on top
    mine = []
    for clip in ordered:
        load, part = loads[0]
        heapreplace(loads, (load + _milliseconds(seconds[clip.id]), part))
        if part == shard.index:
            mine.append(clip)
    return mine


def _stamps(cache: Cache, stream: str, clips: Iterable[Clip]) -> dict[str, str]:
    """Item -> stamp of what it was made from; "" where its record cannot be read, which is said when it is needed."""
    stamps = cache.source_stamps(stream)
    if cache.has_damage(stream):
        stamps |= {clip.id: "" for clip in clips if clip.id not in stamps and cache.has(stream, clip.id)}
    return stamps


def _task(cache: Cache, infos: dict[str, StreamInfo], stamps: dict[str, dict[str, str]], clip: Clip) -> Task:
    """Streams whose sources look as they did are done; records are read only where they do not."""
    missing, changed = [], []
    seen = _stamps_now(clip, {info.kind for name, info in infos.items() if clip.id in stamps[name]})
    for name, info in infos.items():
        if clip.id not in stamps[name]:
            missing.append(name)
        elif stamps[name][clip.id] != seen.get(info.kind) and not _same_source(
            info.kind, clip, cache.record(name, clip.id).source
        ):
            changed.append(name)
    return Task(clip, tuple(name for name in infos if name in missing or name in changed), bool(changed))


def _stamps_now(clip: Clip, kinds: set[str]) -> dict[str, str]:
    """Kind of stream -> stamp of its sources as they are now; nothing where files are not there."""
    try:
        sources = sources_of(clip, file_status) if kinds else {}
    except (OSError, MediaError):
        return {}
    return {kind: source_stamp(source_of(kind, sources)) for kind in kinds}


def _same_source(kind: str, clip: Clip, source: dict[str, Any]) -> bool:
    now: dict[str, Any] = {
        "video": clip.video,
        "frames": (clip.frames, clip.frame_rate) if clip.frames is not None else None,
        "labels": clip.labels,
        "dimensions": dict(clip.dimensions) or None,
        "audio": clip.audio,
        "crops": clip.crops or None,
        "split": clip.split,
        "group": clip.group,
    }
    return all(_same_part(part, now[part], source.get(part)) for part in SOURCES[kind])


def _same_part(part: str, now: Any, before: Any) -> bool:
    if now is None or before is None:
        return now is None and before is None
    if part in ("split", "group"):
        return bool(now == before)
    if part == "crops":
        return bool(crops_identity(list_crops(now)) == before)
    if part == "frames":
        return _same_frames(now[0], now[1], before)
    if part == "dimensions":
        return now.keys() == before.keys() and all(same_file(now[target], before[target]) for target in now)
    return same_file(now, before)


def _same_frames(folder: Path, rate: float | None, before: Any) -> bool:
    try:
        return bool(stills_identity(folder, rate) == before)
    except MediaError:  # no pictures any more
        return False


def _milliseconds(seconds: float) -> int:
    """Whole, so that sums do not depend on their order; a clip of no known length still counts."""
    return max(1, round(seconds * 1000))
