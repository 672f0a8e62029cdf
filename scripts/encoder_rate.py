"""How fast the encoders are by themselves, and beside the fastest matrix product of the same device."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.extract.config import ExtractConfig
from vaflow.extract.encoding import FixedBatcher, make_encoders

MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns
TRIES = 10


@dataclass(frozen=True)
class Rate:
    """Rows through one encoder, everything in memory before the clock starts; `flops` of one row."""

    rows: int
    seconds: float
    flops: int

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.rows + other.rows, self.seconds + other.seconds, self.flops)

    @property
    def per_second(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds

    @property
    def tera(self) -> float:
        """10^12 floating-point operations per second."""
        return self.flops * self.per_second / 1e12


def encode_only(
    config: ExtractConfig, device: torch.device, visual: VisualEncoder, audio: AudioEncoder, images: int, windows: int
) -> tuple[Rate, Rate]:
    """The rate of images, then of windows, through the batchers that an extraction uses."""
    segments = audio.segments(config.window, config.audio_steps)
    image = np.zeros((visual.image_size, visual.image_size, 3), np.uint8)
    window = np.zeros((segments.frames, audio.front_end.bins), np.float32)
    look, listen = _flops(visual, image), _flops(audio, window, window=config.window, steps=config.audio_steps)
    batchers = make_encoders(config, device, [visual], [audio]).batchers
    visual_seconds = _seconds(batchers[visual.name], image, images)
    audio_seconds = _seconds(batchers[audio.name], window, windows * len(segments.first))
    return Rate(images, visual_seconds, look), Rate(windows, audio_seconds, listen * len(segments.first))


def _seconds(batcher: FixedBatcher, row: Any, rows: int) -> float:
    def ignore(result: Any) -> None:
        """Results are not kept."""

    batcher.add(row, ignore)
    batcher.flush()  # warm
    began = time.perf_counter()
    for _ in range(rows):
        batcher.add(row, ignore)
    batcher.flush()
    return time.perf_counter() - began


@torch._dynamo.disable
def _flops(encoder: Any, row: Any, **how: Any) -> int:
    """Of one row; with gradients, because the fused attention for inference is not counted."""
    with FlopCounterMode(display=False) as counter:
        encoder.features(torch.from_numpy(row)[None], **how)
    return int(counter.get_total_flops())


def matrix_rate(device: torch.device, precision: str) -> float:
    """10^12 floating-point operations per second of the best of some large matrix products."""
    edge = MATRIX[device.type]
    one, other = torch.randn(2, edge, edge, device=device, dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(TRIES):
        _finish(device)
        began = time.perf_counter()
        one @ other
        _finish(device)
        best = min(best, time.perf_counter() - began)
    return 2 * edge**3 / best / 1e12


def device_name(device: torch.device) -> str:
    """The card's name, or how many threads a CPU encodes with."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
