"""A small random cache that can be learned: features are noisy linear functions of the labels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import LABELS, LOGMEL, StreamInfo
from vaflow.timeline import Grid

VISUAL, AUDIO = "toy-eyes", "toy-ears"


@dataclass(frozen=True)
class Toy:
    """Contents of the cache.

    Attributes:
        splits: split -> number of clips.
        seconds: shortest and longest clip; rate: annotated frames per second.
        grid: of the extraction; steps: audio steps per window.
        widths: of the visual and the audio features; noise: their deviation.
        text, logmel: whether there are prompt prototypes and a log-Mel stream.
        sampling: whether the streams say how they were sampled.
        unlabelled: share of rows without annotation, in one run; invalid: share of samples without input.
        targets: which dimensions are annotated.
    """

    splits: dict[str, int] = field(default_factory=lambda: {"train": 6, "val": 3})
    seconds: tuple[float, float] = (14.0, 31.0)
    rate: float = 10.0
    grid: Grid = field(default_factory=lambda: Grid(4.0, 1.5, 8))
    steps: int = 8
    widths: tuple[int, int] = (12, 10)
    noise: float = 0.3
    text: bool = True
    logmel: bool = False
    sampling: bool = True
    unlabelled: float = 0.1
    invalid: float = 0.1
    targets: tuple[int, ...] = (0, 1)
    store: str = "hdf5"
    seed: int = 0


def make_cache(path: Path, toy: Toy | None = None) -> Cache:
    """Write the cache; equal arguments give equal arrays."""
    toy = toy or Toy()
    rng = np.random.default_rng(toy.seed)
    cache = create_cache(path, store=toy.store)
    for info in stream_infos(toy):
        cache.declare(info)
    mix = [rng.normal(size=(3, width)) for width in toy.widths]
    if toy.text:
        template = rng.normal(size=(3, 9, toy.widths[0])).astype(np.float32)
        cache.write(f"{VISUAL}.text", "default", {"embedding": template.mean(0), "template": template})
    for split, count in toy.splits.items():
        for k in range(count):
            write_clip(cache, toy, f"{split}{k}", split, mix, rng)
    return cache


def stream_infos(toy: Toy) -> list[StreamInfo]:
    grid = toy.grid
    sampled: dict[str, Any] = {"window": grid.window, "stride": grid.stride, "frames": grid.frames}
    sampling_identity = {"sampling": sampled | {"audio_steps": toy.steps}} if toy.sampling else {}
    infos = [
        StreamInfo(VISUAL, "visual", toy.widths[0], "float16", {"encoder": "toy"} | sampling_identity),
        StreamInfo(AUDIO, "audio", toy.widths[1], "float16", {"encoder": "toy"} | sampling_identity),
        StreamInfo(LABELS, "labels", 0, "float32", {"encoder": "labels"}),
    ]
    infos += [StreamInfo(f"{VISUAL}.text", "text", toy.widths[0], "float32", {"encoder": "toy"})] if toy.text else []
    return infos + ([StreamInfo(LOGMEL, "logmel", 4, "float16", {"encoder": "logmel"})] if toy.logmel else [])


def write_clip(cache: Cache, toy: Toy, item: str, split: str, mix: list[np.ndarray], rng: np.random.Generator) -> None:
    duration = round(float(rng.uniform(*toy.seconds)), 2)
    path = SmoothPath(rng)
    write_visual(cache, toy, item, duration, path, mix[0], rng)
    write_audio(cache, toy, item, duration, path, mix[1], rng)
    if toy.logmel:
        time = np.arange(int(duration * 100)) * 0.01 + 0.0125
        mel = {"embedding": (path(time) @ rng.normal(size=(2, 4))).astype(np.float16), "time": time}
        cache.write(LOGMEL, item, mel | {"valid": np.ones(len(time), bool)})
    write_labels(cache, toy, item, split, duration, path, rng)


def write_visual(
    cache: Cache, toy: Toy, item: str, duration: float, path: "SmoothPath", mix: np.ndarray, rng: np.random.Generator
) -> None:
    time = toy.grid.sample_times(duration)
    valid = rng.random(len(time)) >= toy.invalid
    embedding = features(path(time), mix, toy.noise, rng)
    embedding[~valid] = 0
    cache.write(VISUAL, item, {"embedding": embedding, "time": time, "valid": valid})


def write_audio(
    cache: Cache, toy: Toy, item: str, duration: float, path: "SmoothPath", mix: np.ndarray, rng: np.random.Generator
) -> None:
    start = toy.grid.seconds(toy.grid.starts(duration))
    time = start[:, None] + (np.arange(toy.steps) + 0.58) * toy.grid.window / toy.steps
    valid = (rng.random(time.shape) >= toy.invalid) & (time < duration)
    embedding = features(path(time), mix, toy.noise, rng)
    embedding[~valid] = 0
    cache.write(AUDIO, item, {"embedding": embedding, "time": time, "valid": valid, "start": start})


def write_labels(
    cache: Cache, toy: Toy, item: str, split: str, duration: float, path: "SmoothPath", rng: np.random.Generator
) -> None:
    time = np.arange(int(duration * toy.rate)) / toy.rate
    valid = np.zeros((len(time), 2), bool)
    valid[:, list(toy.targets)] = True
    gap = int(len(time) * toy.unlabelled)
    first = int(rng.integers(0, len(time) - gap + 1))
    valid[first : first + gap] = False
    value = np.where(valid, path(time), np.nan).astype(np.float32)
    meta = {"split": split, "group": item.removesuffix("_left"), "duration": duration, "frames": len(time)}
    cache.write(LABELS, item, {"time": time, "value": value, "valid": valid}, meta=meta | {"rows": len(time)})


class SmoothPath:
    """A random curve: seconds [...] -> valence and arousal [..., 2] within [-1, 1]."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rate = rng.uniform(0.05, 0.6, size=(4, 2))
        self.phase = rng.uniform(0, 2 * np.pi, size=(4, 2))
        self.offset = rng.uniform(-0.3, 0.3, size=2)

    def __call__(self, time: np.ndarray) -> np.ndarray:
        waves = np.sin(np.asarray(time)[..., None, None] * self.rate + self.phase).mean(axis=-2)
        return np.clip(waves + self.offset, -1, 1)


def features(va: np.ndarray, mix: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """[..., 2] -> [..., D] float16."""
    ones = np.ones((*va.shape[:-1], 1))
    clean = np.concatenate([va, ones], axis=-1) @ mix
    return (clean + rng.normal(scale=noise, size=clean.shape)).astype(np.float16)
