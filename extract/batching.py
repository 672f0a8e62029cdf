"""Rows from many clips -> batches of one fixed size -> the encoder -> back to where each row came from.

Every batch has the same size, the last one padded with zeros: half-precision results depend on the batch size, not on
what else is in the batch, so the cache does not depend on the order in which clips arrive.

Encoders whose networks are compiled: fused by torch's compiler for the device and the batch size that they meet.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.device import Stopwatch
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.errors import VaflowError, explain
from vaflow.extract.config import AUTO, ExtractConfig
from vaflow.extract.faces.detection_torch import TorchDetector
from vaflow.extract.memory import CudaMemory, InParts, fitting


def compile_network(encoder: VisualEncoder | AudioEncoder) -> None:
    """Have an encoder's network compiled when its first batch comes. Its weights, identity and outputs' shapes stay.

    Raises:
        VaflowError: this machine cannot compile for the encoder's device.
    """
    _require_compiler(next(encoder.module.parameters()).device)
    encoder.module.compile(dynamic=False)


def _require_compiler(device: torch.device) -> None:
    """A trial, because the real thing comes late: at the first full batch."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        raise VaflowError(
            explain(
                f"torch cannot compile for {device} here",
                expected="a C++ compiler" if device.type == "cpu" else "Triton, which comes with torch for CUDA",
                got=next((line for line in str(error).splitlines() if line.strip()), type(error).__name__),
                remedy="Install it, or leave --compile out",
            )
        ) from error


BATCH_SIZES = {"cpu": {"visual": 16, "audio": 2}, "cuda": {"visual": 256, "audio": 64}}
LARGEST = {"visual": 1024, "audio": 256}  # of what is measured: larger batches gain nothing

Deliver = Callable[[NDArray[np.float32]], None]
Encode = Callable[[torch.Tensor], torch.Tensor]
Measure = Callable[[NDArray[Any]], int]  # the first row -> rows per batch


class FixedBatcher:
    """Collects rows until a batch is full, encodes it, delivers each result.

    On a GPU one batch is in flight while the next one is filled: two pinned buffers alternate, and a batch's results
    are fetched only after its successor has been launched. A batch that does not fit into the device's memory is
    encoded in halves from then on.

    Args:
        encode: [size, ...] tensor on `device` -> [size, ...] float32 tensor on the same device.
        size: rows per batch, or what finds it out from the first row.
        device: where to encode.

    Attributes:
        rows: encoded so far; seconds: of the calling thread; device_seconds: of the device, copies to it included.
        delivering: size of the batch whose results are being delivered: half-precision results depend on it.
    """

    def __init__(self, encode: Encode, size: int | Measure, device: torch.device) -> None:
        self.device = device
        self._measure = size if callable(size) else None
        self._size = 0 if callable(size) else size
        self._parts = InParts(encode, device, self._size)
        self._buffers: list[torch.Tensor] = []
        self._turn = 0
        self._waiting: list[Deliver] = []
        self._in_flight: _Batch | None = None
        self.rows = 0
        self.seconds = self.device_seconds = 0.0
        self.delivering = 0

    def add(self, row: NDArray[Any], deliver: Deliver) -> None:
        """Queue one row; `deliver` gets its result, now or at a later `add` or `flush`."""
        if not self._buffers:
            if self._measure is not None:
                self._size = self._parts.size = self._measure(row)
            self._buffers = [self._new_buffer(row) for _ in range(1 if self.device.type == "cpu" else 2)]
        self._buffers[self._turn][len(self._waiting)] = torch.from_numpy(np.ascontiguousarray(row))
        self._waiting.append(deliver)
        if len(self._waiting) == self._size:
            self._launch()

    def flush(self) -> None:
        """Encode what waits, padded to the fixed size, and deliver everything."""
        if self._waiting:
            self._launch()
        self._collect()

    def _new_buffer(self, row: NDArray[Any]) -> torch.Tensor:
        like = torch.from_numpy(np.empty(0, row.dtype)).dtype
        return torch.zeros((self._size, *row.shape), dtype=like, pin_memory=self.device.type == "cuda")

    def _launch(self) -> None:
        buffer = self._buffers[self._turn]
        buffer[len(self._waiting) :] = 0
        began = time.perf_counter()
        work = Stopwatch(self.device)
        result = self._parts(buffer.to(self.device, non_blocking=True))
        work.stop()
        self.rows += len(self._waiting)
        before, self._in_flight = self._in_flight, _Batch(result, self._waiting, self._parts.size, work)
        self._waiting = []
        self._turn = (self._turn + 1) % len(self._buffers)
        self._hand_out(before)
        if self.device.type == "cpu":
            self._collect()
        self.seconds += time.perf_counter() - began

    def _collect(self) -> None:
        before, self._in_flight = self._in_flight, None
        self._hand_out(before)

    def _hand_out(self, batch: "_Batch | None") -> None:
        if batch is None:
            return
        self.delivering = batch.size
        rows = batch.result.float().cpu().numpy()
        self.device_seconds += batch.work.seconds
        for row, deliver in zip(rows, batch.receivers, strict=False):
            deliver(row)


@dataclass(frozen=True)
class _Batch:
    """Results under way to their receivers, how many rows went through the encoder at once, how long it worked."""

    result: torch.Tensor
    receivers: list[Deliver]
    size: int
    work: Stopwatch


@dataclass(frozen=True)
class Encoders:
    """Every encoder of a run with the batcher that feeds it, by stream name; and what finds faces on their device."""

    visual: dict[str, tuple[VisualEncoder, FixedBatcher]] = field(default_factory=dict)
    audio: dict[str, tuple[AudioEncoder, FixedBatcher]] = field(default_factory=dict)
    detector: TorchDetector | None = None

    @property
    def batchers(self) -> dict[str, FixedBatcher]:
        """Stream name -> batcher, of both kinds."""
        return {name: batcher for name, (_, batcher) in (*self.visual.items(), *self.audio.items())}


def make_encoders(
    config: ExtractConfig, device: torch.device, visual: list[VisualEncoder], audio: list[AudioEncoder]
) -> Encoders:
    """Give each encoder a batcher of the size that the settings or the device ask for.

    An audio encoder that reads a window in several stretches gets as many rows as there are images: each is small.
    """
    sizes = BATCH_SIZES[device.type]
    parts = max(1, len(visual) + len(audio))

    def batcher(encode: Encode, asked: int, kind: str) -> FixedBatcher:
        if asked == AUTO and device.type == "cuda":
            measure = partial(fitting, encode, device, CudaMemory(device), parts=parts, most=LARGEST[kind])
            return FixedBatcher(encode, measure, device)
        return FixedBatcher(encode, sizes[kind] if asked in (0, AUTO) else asked, device)

    def heard(encoder: AudioEncoder) -> FixedBatcher:
        encode = partial(encoder.encode, window=config.window, steps=config.audio_steps)
        if len(encoder.stretches(config.window, config.audio_steps).first) == 1:
            return batcher(encode, config.window_batch, "audio")
        return batcher(encode, config.image_batch, "visual")

    return Encoders(
        {e.name: (e, batcher(e.encode, config.image_batch, "visual")) for e in visual},
        {e.name: (e, heard(e)) for e in audio},
        TorchDetector(device) if config.detector == "torch" and config.face_source != "none" else None,
    )
