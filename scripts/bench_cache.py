"""Speed of opening, writing and reading a cache, as ratios to plain NumPy files in the same run.

    python scripts/bench_cache.py [--items 10000] [--clips 100] [--folder DIR]

"opens" is `open_cache` and the list of one split that one stream has, over 10,000 clips with two streams: without an
index (every record is read), with a saved index whose folders changed since (listed, nothing read), and with a saved
index (nothing listed). "writes" and "reads" are clips of 60 s: 120 vectors of 512 float16, their times and masks.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.layout import record_document, seal
from vaflow.cache.schema import LABELS, STORES, Array, Record, StreamInfo, escape

VISUAL = StreamInfo("visual", "visual", 512, "float16", {"encoder": "bench"})
TARGETS = StreamInfo(LABELS, "labels", 0, "float32", {})


def clip(seed: int, samples: int = 120) -> dict[str, Array]:
    """The visual stream of a clip of a minute."""
    rng = np.random.default_rng(seed)
    return {
        "embedding": rng.standard_normal((samples, 512)).astype(np.float16),
        "time": np.arange(samples) / 2,
        "valid": np.ones(samples, bool),
        "frame": np.arange(samples) * 15,
    }


def seconds(work: Callable[[], object], repeat: int = 1) -> float:
    """Of the fastest of `repeat` runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def fill_records(cache: Cache, items: int) -> None:
    """Records without arrays: opening looks at no array."""
    for info in (TARGETS, VISUAL):
        cache.declare(info)
        for number in range(items):
            item = f"batch{number % 7}/clip_{number:05d}"
            attempt = f"{number:016x}"
            record = Record(
                stream=info.name,
                item=item,
                attempt=attempt,
                arrays={name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in clip(0, 2).items()},
                files={f"{attempt}.h5": {"size": 130_000, "crc32c": number}},
                source={"name": f"{item}.mp4", "size": 1_000_000 + number, "mtime_ns": number},
                meta={"split": ("train", "val", "test")[number % 3], "duration": 60.0, "group": item},
                fingerprint=cache.fingerprint(info.name),
            )
            (cache.layout.records(info.name) / f"{escape(item)}.json").write_bytes(seal(record_document(record)))


def bench_open(folder: Path, items: int) -> None:
    """Print how long opening takes."""
    cache = create_cache(folder / "many", store="hdf5")
    fill_records(cache, items)

    def use() -> None:
        assert len(open_cache(cache.path).items("val", "visual")) == len(range(1, items, 3))

    without = seconds(use)
    cache.refresh_index()
    saved = seconds(use, 5)
    for info in (TARGETS, VISUAL):
        probe = cache.layout.records(info.name) / ".tmp-probe"
        probe.touch()
        probe.unlink()
    listed = seconds(use, 5)
    print(
        f"open {items} clips, 2 streams: {saved:.3f} s with an index, "
        f"{listed:.3f} s after changes, {without:.2f} s without"
    )


def bench_files(folder: Path, clips: int) -> None:
    """Print how long writing and reading takes, and the ratio to np.save and np.load."""
    data = [clip(seed) for seed in range(clips)]
    megabytes = sum(a.nbytes for arrays in data for a in arrays.values()) / 1e6

    def plain_write() -> None:
        for number, arrays in enumerate(data):
            for name, array in arrays.items():
                with (folder / f"{number}-{name}.npy").open("wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())

    def plain_read() -> None:
        for number, arrays in enumerate(data):
            for name in arrays:
                np.load(folder / f"{number}-{name}.npy")

    wrote, read = seconds(plain_write), seconds(plain_read, 3)
    print(f"np.save + fsync: {1e3 * wrote / clips:.1f} ms a clip; np.load: {1e3 * read / clips:.2f} ms a clip")
    for store in STORES:
        cache = create_cache(folder / store, store=store)
        cache.declare(VISUAL)

        def write(cache: Cache = cache) -> None:
            for number, arrays in enumerate(data):
                cache.write("visual", f"clip{number}", arrays)

        def read_all(cache: Cache = cache, verify: bool = True) -> None:
            for number in range(clips):
                cache.read("visual", f"clip{number}", verify=verify)

        took, back, unverified = seconds(write), seconds(read_all, 3), seconds(lambda: read_all(verify=False), 3)
        print(
            f"{store}: write {1e3 * took / clips:.1f} ms a clip (x{took / wrote:.1f}); "
            f"read {1e3 * back / clips:.2f} ms (x{back / read:.1f}), {megabytes / back:.0f} MB/s; "
            f"unverified {1e3 * unverified / clips:.2f} ms"
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000, help="clips in the cache to open")
    parser.add_argument("--clips", type=int, default=100, help="clips to write and read")
    parser.add_argument("--folder", type=Path, default=None, help="working folder (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench_open(Path(folder), options.items)
        bench_files(Path(folder), options.clips)


if __name__ == "__main__":
    main()
