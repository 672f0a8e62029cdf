"""Time to scan and plan a large data set, as ratios to a bare walk of the same files.

    python scripts/bench_plan.py [--clips 100000] [--layout videos|affwild2] [--folder DIR] [--profile]

Makes a tree of that many tiny files that begin like MP4 files of some seconds, with labels, and a cache whose records
say that all of it is done. "walk" is `os.scandir` over all folders and a `stat` of every file: what no program that
looks whether anything has changed can do without. Then: the data set is opened; the plan of a first run (nothing is
in the cache), of one shard of eight of it, of a run that has nothing to do (by the records themselves, as after a
kill, and by the index), and of one with a tenth left to do.
"""

import argparse
import cProfile
import os
import pstats
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.layout import record_document, seal
from vaflow.cache.schema import LABELS, Record, StreamInfo
from vaflow.datasets import Dataset, open_dataset
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.estimate import estimate
from vaflow.extract.plan import Plan, make_plan
from vaflow.extract.source_files import sources_of
from vaflow.extract.streams import source_of

LABEL_TEXT = "valence,arousal\n0.1,0.2\n"
PER_FOLDER = 1000  # videos
SHOWN = 25  # lines of a profile


def mp4(seconds: float) -> bytes:
    """The beginning of an MP4 file of that duration: what tells its length, and nothing to decode."""
    movie = struct.pack(">4x8xII", 1000, round(seconds * 1000)) + bytes(80)
    header = struct.pack(">I4s", 8 + len(movie), b"mvhd") + movie
    return struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + struct.pack(">I4s", 8 + len(header), b"moov") + header


def make_videos(root: Path, clips: int) -> None:
    """Layout `videos`: a thousand videos a folder, a table of labels beside each."""
    for number in range(clips):
        folder = root / f"part{number // PER_FOLDER:03d}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
        (folder / f"clip{number:06d}.mp4").write_bytes(mp4(5 + number % 60))
        (folder / f"clip{number:06d}.csv").write_text("time,valence,arousal\n0,0.1,0.2\n")


def make_affwild2(root: Path, clips: int) -> None:
    """Layout `affwild2`: videos and annotations; crops would be folders of their own, one `scandir` each."""
    sets = root / "VA_Estimation_Challenge"
    for name in ("batch1", "batch2"):
        (root / name).mkdir(parents=True)
    for name in ("Train_Set", "Validation_Set"):
        (sets / name).mkdir(parents=True)
    for number in range(clips):
        (root / f"batch{1 + number % 2}" / f"video{number:06d}.mp4").write_bytes(mp4(5 + number % 60))
        (sets / ("Train_Set" if number % 5 else "Validation_Set") / f"video{number:06d}.txt").write_text(LABEL_TEXT)


T = TypeVar("T")

MAKERS: dict[str, Callable[[Path, int], None]] = {"videos": make_videos, "affwild2": make_affwild2}


def infos(config: ExtractConfig) -> dict[str, StreamInfo]:
    """Streams of the kinds that a default extraction has; what made them does not matter here."""
    streams = [StreamInfo("logmel", "logmel", 128, config.dtype, {})]
    streams += [StreamInfo(name, "visual", 512, config.dtype, {}) for name in config.visual]
    streams += [StreamInfo(name, "audio", 768, config.dtype, {}) for name in config.audio]
    streams.append(StreamInfo(LABELS, "labels", 0, "float32", {}))
    return {info.name: info for info in streams}


def fill(cache: Cache, streams: dict[str, StreamInfo], dataset: Dataset) -> None:
    """The records of a finished extraction, without arrays: planning looks at no array."""
    for info in streams.values():
        cache.declare(info)
    prints = {name: cache.fingerprint(name) for name in streams}
    for number, clip in enumerate(dataset.clips):
        sources, attempt = sources_of(clip), f"{number:016x}"
        for name, info in streams.items():
            record = Record(
                stream=name,
                item=clip.id,
                attempt=attempt,
                arrays={"time": {"shape": [20], "dtype": "float64"}},
                files={f"{attempt}.h5": {"size": 130_000, "crc32c": number}},
                source=source_of(info.kind, sources),
                meta={"split": clip.split, "group": clip.group, "duration": 10.0},
                fingerprint=prints[name],
            )
            cache.layout.record(name, clip.id).write_bytes(seal(record_document(record)))


def walk(root: Path) -> int:
    """Every file below `root`, each with its `stat`; returns how many there are."""
    queue, files = [os.fspath(root)], 0
    while queue:
        with os.scandir(queue.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    queue.append(entry.path)
                else:
                    entry.stat()
                    files += 1
    return files


def measure(root: Path, layout: str, cache_at: Path, empty_at: Path) -> Iterator[tuple[str, float]]:
    """(what, seconds) of every step, the walk first."""
    files, seconds = timed(lambda: walk(root))
    yield f"walk of {files} files", seconds
    dataset, seconds = timed(lambda: open_dataset(root, layout))
    yield "open the data set", seconds
    _, seconds = timed(lambda: open_dataset(root))
    yield "... with --layout auto", seconds
    config = ExtractConfig()
    streams = infos(config)
    empty = create_cache(empty_at, store="hdf5")
    for name, shard in (("plan, nothing done", Shard()), ("plan, shard 3/8, nothing done", Shard(3, 8))):
        plan, seconds = timed(partial(make_plan, empty, streams, dataset.clips, shard))
        yield f"{name}: {plan_summary(plan)}", seconds
    guess, seconds = timed(lambda: estimate(dataset, empty_at, config, Shard()))
    yield f"--dry-run, nothing done: {guess['hours']} h", seconds
    fill(create_cache(cache_at, store="hdf5"), streams, dataset)
    for name in ("plan, all done, without an index", "plan, all done"):
        cache = open_cache(cache_at, writable=True)
        plan, seconds = timed(partial(make_plan, cache, streams, dataset.clips, Shard()))
        yield f"{name}: {plan_summary(plan)}", seconds
        _, seconds = timed(cache.refresh_index)
        yield "... index saved", seconds
    guess, seconds = timed(lambda: estimate(dataset, cache_at, config, Shard()))
    yield f"--dry-run, all done: {guess['items']} to do", seconds
    for clip in dataset.clips[::10]:
        cache.layout.record(LABELS, clip.id).unlink()
    plan, seconds = timed(lambda: make_plan(open_cache(cache_at, writable=True), streams, dataset.clips, Shard()))
    yield f"plan, a tenth left: {plan_summary(plan)}", seconds
    _, seconds = timed(lambda: open_cache(cache_at).items())
    yield "open the cache, list its clips", seconds


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the seconds it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def plan_summary(plan: Plan) -> str:
    return f"{len(plan.tasks)} to do, {plan.done} done, {sum(task.changed for task in plan.tasks)} changed"


def main() -> None:
    """Parse, make the tree, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--layout", choices=tuple(MAKERS), default="videos")
    parser.add_argument("--folder", type=Path, default=None, help="working folder (default: temporary)")
    parser.add_argument("--profile", action="store_true", help="also print a profile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder) / "data"
        MAKERS[options.layout](root, options.clips)
        profile = cProfile.Profile() if options.profile else None
        if profile is not None:
            profile.enable()
        rows = list(measure(root, options.layout, Path(folder) / "cache", Path(folder) / "empty"))
        if profile is not None:
            profile.disable()
            pstats.Stats(profile).sort_stats("cumulative").print_stats(SHOWN)
    width = max(len(name) for name, _ in rows)
    print(f"{options.clips} clips, layout {options.layout}")
    for name, seconds in rows:
        print(f"{name.ljust(width)}  {seconds:8.2f} s  {seconds / rows[0][1]:7.1f} walks")


if __name__ == "__main__":
    main()
