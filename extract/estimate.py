"""What an extraction would do, without doing it: `vaflow extract --dry-run`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vaflow.cache import Cache, is_cache, open_cache
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip
from vaflow.errors import VaflowError
from vaflow.extract.config import MAX_SECONDS, ExtractConfig, Shard
from vaflow.extract.durations import header_seconds, side_by_side
from vaflow.extract.image_folders import open_stills
from vaflow.extract.messages import Failed
from vaflow.extract.plan import shard_clips
from vaflow.extract.pool import each
from vaflow.extract.video import probe


def estimate(
    dataset: Dataset, out: Path, config: ExtractConfig, shard: Shard, *, show_progress: bool = False
) -> dict[str, Any]:
    """Items, hours, frames, windows and bytes that a run would add, from container headers alone.

    What only decoding tells (sound without a picture, damage) is found by the run, and by `vaflow check`. An item
    counts as there when the cache has its labels and every encoder named; whether its source has changed is found out
    by the run itself.
    """
    mine = shard_clips(dataset.clips, shard)
    cache = open_cache(out) if is_cache(out) else None
    there = _there(cache, config) if cache is not None else set()
    clips = [clip for clip in mine if clip.id not in there]
    grid = config.grid
    seconds, frames, windows, unreadable = 0.0, 0, 0, 0
    for duration in tqdm(_durations(clips), total=len(clips), unit="clip", desc="probe", disable=not show_progress):
        if duration is None:
            unreadable += 1
            continue
        seconds += duration
        frames += len(grid.sample_ticks(duration))
        windows += len(grid.starts(duration))
    return {
        "items": len(clips),
        "items_already_there": len(mine) - len(clips),
        "items_unreadable": unreadable,
        "hours": round(seconds / 3600, 3),
        "frames_to_encode": frames * len(config.visual),
        "windows_to_encode": windows * len(config.audio),
        "megabytes": round(_bytes(config, seconds, frames, windows) / 1e6, 1),
    }


def _there(cache: Cache, config: ExtractConfig) -> set[str]:
    known = cache.streams()
    wanted = ("labels", *config.encoders)
    if not all(name in known for name in wanted):
        return set()
    return set.intersection(*(set(cache.source_stamps(name)) for name in wanted))


def _durations(clips: Sequence[Clip]) -> Iterator[float | None]:
    """Seconds of every clip, in any order; None where it cannot be read. FFmpeg is asked where headers do not say."""
    silent = []
    for clip, found in zip(clips, side_by_side(_header, clips), strict=True):
        if found is None or found > MAX_SECONDS:
            silent.append(clip)
        else:
            yield found
    for _, duration in each(_duration, silent):
        yield None if isinstance(duration, Failed) else duration


def _header(clip: Clip) -> float | None:
    return header_seconds(clip.video) if clip.video is not None else None


def _duration(clip: Clip) -> float | None:
    if clip.video is None and clip.frames is None:
        return None
    try:
        info = probe(clip.video) if clip.video is not None else open_stills(clip)[0]
    except (VaflowError, OSError):
        return None
    duration = info.video.duration if info.video is not None else None
    return duration if duration is not None and 0 <= duration <= MAX_SECONDS else None


def _bytes(config: ExtractConfig, seconds: float, frames: int, windows: int) -> float:
    """Rough: widths of the default encoders; log-Mel at 100 frames a second; labels at 30 rows a second."""
    size = 2 if config.dtype == "float16" else 4
    visual, audio = 512 * size * frames * len(config.visual), 768 * size * config.audio_steps * windows
    pixels = 12_000 * frames if config.pixels else 0
    return visual + audio * len(config.audio) + seconds * (100 * (128 * size + 9) + 30 * 18) + pixels
