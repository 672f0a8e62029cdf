"""Overhead of loading during training: an epoch over a cache against the same steps on one batch in memory.

    python scripts/bench_train.py
    python scripts/bench_train.py --windows 20000 --device cuda

Builds a synthetic cache of realistic widths in a temporary folder. Prints the time to load it, windows per second, and
the ratio of the two epochs: 1.0 would be data that costs nothing; the goal is at most 1.15.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import LABELS, Array, StreamInfo
from vaflow.device import choose_device
from vaflow.timeline import Grid
from vaflow.train.builder import build_model
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.inputs import resolve
from vaflow.train.loop import make_optimizer, seeded, train_step
from vaflow.train.windows import WindowSet

GRID, STEPS, FPS = Grid(), 20, 30
VISUAL_DIM, AUDIO_DIM = 512, 768
GOAL = 1.15
TURN = 8  # steps


def build_cache(path: Path, windows: int, clip_seconds: float) -> Cache:
    """A cache whose training split has at least `windows` windows of random features."""
    cache = create_cache(path)
    identity = {"sampling": {"window": GRID.window, "stride": GRID.stride, "frames": GRID.frames, "audio_steps": STEPS}}
    cache.declare(StreamInfo("clip-vit-b16", "visual", VISUAL_DIM, "float16", {"encoder": "random", **identity}))
    cache.declare(StreamInfo("ast", "audio", AUDIO_DIM, "float16", {"encoder": "random", **identity}))
    cache.declare(StreamInfo("clip-vit-b16.text", "text", VISUAL_DIM, "float32", {"encoder": "random"}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    rng = np.random.default_rng(0)
    template = rng.normal(size=(3, 9, VISUAL_DIM)).astype(np.float32)
    cache.write("clip-vit-b16.text", "default", {"embedding": template.mean(axis=0), "template": template})
    per_clip = len(GRID.starts(clip_seconds))
    for number in range(-(-windows // per_clip)):
        write_clip(cache, f"clip{number:04d}", clip_seconds, rng)
    return cache


def write_clip(cache: Cache, item: str, seconds: float, rng: np.random.Generator) -> None:
    """One training clip with features and labels everywhere."""
    time_visual = GRID.sample_times(seconds)
    start = GRID.seconds(GRID.starts(seconds))
    time_audio = start[:, None] + (np.arange(STEPS) + 0.58) * GRID.window / STEPS
    for name, time_, dim in (("clip-vit-b16", time_visual, VISUAL_DIM), ("ast", time_audio, AUDIO_DIM)):
        embedding = rng.standard_normal((*time_.shape, dim), dtype=np.float32).astype(np.float16)
        arrays: dict[str, Array] = {"embedding": embedding, "time": time_, "valid": np.ones(time_.shape, bool)}
        if name == "ast":
            arrays["start"] = start
        cache.write(name, item, arrays)
    clock = np.arange(int(seconds * FPS)) / FPS
    value = np.sin(clock[:, None] * rng.uniform(0.1, 1, size=2)).astype(np.float32)
    labels: dict[str, Array] = {"time": clock, "value": value, "valid": np.ones(value.shape, bool)}
    cache.write(LABELS, item, labels, meta={"split": "train", "group": item, "duration": seconds})


def two_epochs(windows: WindowSet, config: TrainConfig, model: torch.nn.Module) -> tuple[float, float]:
    """Seconds of an epoch, and of as many steps on one batch gathered before the clock starts.

    The two take turns every few steps, each first in every other turn: a busy machine then slows both alike.
    """
    model.train()
    optimizer = make_optimizer(model, config)
    batches = list(windows.shuffled(config.batch_size, torch.Generator().manual_seed(0)))
    held = windows.gather(batches[0])
    seconds = {"epoch": 0.0, "fixed": 0.0}
    for first in range(0, len(batches), TURN):
        turn = batches[first : first + TURN]
        for kind in ("epoch", "fixed") if first // TURN % 2 else ("fixed", "epoch"):
            _wait(windows.device)
            begun = time.perf_counter()
            for ids in turn:
                train_step(model, optimizer, held if kind == "fixed" else windows.gather(ids), config)
            _wait(windows.device)
            seconds[kind] += time.perf_counter() - begun
    return seconds["epoch"], seconds["fixed"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench(args: argparse.Namespace, folder: Path) -> dict[str, float | str | int]:
    """Build, load, and time both kinds of epoch; medians over the repeats."""
    cache = build_cache(folder / "cache", args.windows, args.clip_seconds)
    device = choose_device(args.device)
    config, inputs = resolve(cache, TrainConfig(batch_size=args.batch_size, device=args.device))
    begun = time.perf_counter()
    budget = 0 if args.mapped else None
    windows = load_split(cache, "train", inputs.streams, config, device=device, budget=budget, scratch=folder)
    _wait(device)
    loaded = time.perf_counter() - begun
    with seeded(0):
        model = build_model(config, inputs.specs, inputs.prototypes).to(device)
    two_epochs(windows, config, model)  # warm up
    pairs = [two_epochs(windows, config, model) for _ in range(args.repeats)]
    epoch, fixed = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "device": str(device),
        "windows": len(windows),
        "load_seconds": round(loaded, 3),
        "epoch_seconds": round(epoch, 3),
        "fixed_batch_seconds": round(fixed, 3),
        "windows_per_second": round(len(windows) / epoch, 1),
        "ratio": round(statistics.median(one / other for one, other in pairs), 4),
        "goal": GOAL,
    }


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--clip-seconds", type=float, default=130.0, help="length of every clip (Aff-Wild2's mean)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mapped", action="store_true", help="read features from a memory-mapped scratch file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaflow-bench-") as folder:
        print(json.dumps(bench(args, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
