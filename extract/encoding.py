"""The encoders of an extraction, and the batches that feed them.

Rows of many clips are collected into batches of one size, the last one padded with zeros, and each result goes back to
its clip: half-precision results depend on the batch size, not on the other rows of the batch, so the cache does not
depend on the order in which clips arrive. On a GPU the size can be measured on two trial batches; it is halved when a
batch does not fit.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.device import Encode, InParts, Stopwatch
from vaflow.encoders import build_encoder
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.errors import VaflowError, explain
from vaflow.extract.config import AUTO, ExtractConfig
from vaflow.extract.faces.detection_torch import TorchDetector

BATCH_SIZES = {"cpu": {"visual": 16, "audio": 2}, "cuda": {"visual": 256, "audio": 64}}
LARGEST = {"visual": 1024, "audio": 256}  # limit of measured sizes: larger batches gain nothing
TRIAL = (4, 16)  # rows of two batches from which the memory per row is measured
SHARE = 0.8  # of the free memory: allocators fragment, and other processes may use the GPU

Deliver = Callable[[NDArray[np.float32]], None]
Measure = Callable[[NDArray[Any]], int]  # the first row -> rows per batch


class Memory(Protocol):
    """A device's memory, in bytes."""

    def free(self) -> int:
        """Bytes available to new tensors."""
        ...

    def peak(self, work: Callable[[], object]) -> int:
        """Peak memory of `work`, beyond what was allocated before it."""
        ...


class CudaMemory:
    """A GPU's memory, from the driver and torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Free GPU memory, plus memory reserved but unused by torch."""
        reserved = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0]) + reserved

    def peak(self, work: Callable[[], object]) -> int:
        """Peak memory from torch's statistics."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device)) - before


def fitting(encode: Encode, device: torch.device, memory: Memory, row: NDArray[Any], *, parts: int, most: int) -> int:
    """The largest power-of-two batch that fits into a share of the free memory. Small changes of it rarely matter.

    Args:
        row: one row, for its shape and type.
        parts: number of shares of the free memory, one for each encoder.
        most: largest number of rows.
    """

    def trial(rows: int) -> object:
        return encode(torch.zeros((rows, *row.shape), dtype=torch.from_numpy(row[..., :0]).dtype, device=device))

    small, large = TRIAL
    try:
        trial(small)  # libraries allocate their workspaces on the first call
        low, high = memory.peak(lambda: trial(small)), memory.peak(lambda: trial(large))
    except torch.OutOfMemoryError:
        return small
    each = max(1.0, (high - low) / (large - small))
    fixed = max(0.0, low - small * each)
    rows = (memory.free() * SHARE / parts - fixed) / each
    return int(2 ** np.floor(np.log2(min(max(rows, 1), most))))


class FixedBatcher:
    """Collects rows until a batch is full, encodes it, delivers each result.

    On a GPU one batch is in flight while the next one is filled. The copy of its results into pinned memory is queued
    right behind it, with an event; when the next batch has been launched, the host waits for that event only, so the
    device does not idle. A batch that does not fit into the device's memory is encoded in halves from then on.

    Args:
        encode: [size, ...] tensor on `device` -> [size, ...] float32 tensor on the same device.
        size: rows per batch, or a function that computes it from the first row.

    Attributes:
        rows: encoded so far; seconds: of the calling thread; device_seconds: of the device, including copies to it.
        row_seconds: of the device, without the share of padding rows.
        delivering: size of the batch whose results are being delivered: half-precision results depend on it.
    """

    def __init__(self, encode: Encode, size: int | Measure, device: torch.device) -> None:
        self.device = device
        self._measure = size if callable(size) else None
        self._size = 0 if callable(size) else size
        self._parts = InParts(encode, device, self._size)
        self._buffers: list[torch.Tensor] = []  # of rows; pinned for a GPU
        self._results: list[torch.Tensor] = []  # the same for results; none on a CPU
        self._turn = 0
        self._waiting: list[Deliver] = []
        self._in_flight: _Batch | None = None
        self.rows = 0
        self.seconds = self.device_seconds = self.row_seconds = 0.0
        self.delivering = 0

    def add(self, row: NDArray[Any], deliver: Deliver) -> None:
        """Queue one row; `deliver` gets its result, now or at a later `add` or `flush`."""
        if not self._buffers:
            if self._measure is not None:
                self._size = self._parts.size = self._measure(row)
            like = torch.from_numpy(np.empty(0, row.dtype)).dtype
            self._buffers = self._host_memory((self._size, *row.shape), like)
        self._buffers[self._turn][len(self._waiting)] = torch.from_numpy(np.ascontiguousarray(row))
        self._waiting.append(deliver)
        if len(self._waiting) == self._size:
            self._launch()

    def flush(self) -> None:
        """Encode the queued rows, padded to the fixed size, and deliver everything."""
        if self._waiting:
            self._launch()
        self._deliver_batch_in_flight()

    def _host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """One buffer per batch that can be under way: two, pinned, for a GPU."""
        pinned = self.device.type == "cuda"
        return [torch.zeros(shape, dtype=dtype, pin_memory=pinned) for _ in range(2 if pinned else 1)]

    def _launch(self) -> None:
        buffer = self._buffers[self._turn]
        buffer[len(self._waiting) :] = 0
        began = time.perf_counter()
        work = Stopwatch(self.device)
        result = self._parts(buffer.to(self.device, non_blocking=True)).float()
        if self.device.type == "cuda":
            self._results = self._results or self._host_memory(tuple(result.shape), torch.float32)
            result = self._results[self._turn].copy_(result, non_blocking=True)
        work.stop()  # an event after the copy: the result can be read once it has completed
        self.rows += len(self._waiting)
        launched = _Batch(result, self._waiting, self._parts.size, work)
        self._waiting = []
        self._turn = (self._turn + 1) % len(self._buffers)
        self._deliver_batch_in_flight()
        self._in_flight = launched
        if self.device.type == "cpu":
            self._deliver_batch_in_flight()
        self.seconds += time.perf_counter() - began

    def _deliver_batch_in_flight(self) -> None:
        batch, self._in_flight = self._in_flight, None
        if batch is None:
            return
        self.delivering = batch.size
        self.device_seconds += batch.work.seconds  # waits for the event after the batch only
        self.row_seconds += batch.work.seconds * len(batch.receivers) / self._size
        for row, deliver in zip(batch.result.numpy(), batch.receivers, strict=False):
            deliver(row)


@dataclass(frozen=True)
class _Batch:
    """A launched batch: its results in host memory, their receivers, rows encoded at once, and the time it takes."""

    result: torch.Tensor
    receivers: list[Deliver]
    size: int
    work: Stopwatch


def build_encoders(config: ExtractConfig, device: torch.device) -> tuple[list[VisualEncoder], list[AudioEncoder]]:
    """Build every encoder named in the settings: visual ones, audio ones.

    Raises:
        WeightsError: weights are missing or do not fit.
        VaflowError: the settings ask for compiled encoders, and this machine cannot compile.
    """
    named = [(name, "visual") for name in config.visual] + [(name, "audio") for name in config.audio]
    options: dict[str, Any] = {"device": str(device), "precision": config.precision}
    built = [build_encoder(name, weights=config.weights.get(name), kind=kind, **options) for name, kind in named]
    if config.compile:
        for encoder in built:
            compile_network(encoder)
    visual = [encoder for encoder in built if encoder.kind == "visual"]
    audio = [encoder for encoder in built if encoder.kind == "audio"]
    return visual, audio  # type: ignore[return-value]


def compile_network(encoder: VisualEncoder | AudioEncoder) -> None:
    """Have torch compile an encoder's network at its first batch; weights, identity and output shapes do not change.

    Raises:
        VaflowError: this machine cannot compile for the encoder's device.
    """
    parameters = next(encoder.module.parameters(), None)
    if parameters is None:  # an ONNX graph, or openSMILE
        return
    from torch._dynamo.exc import TorchDynamoException

    device = parameters.device
    try:  # a trial function: the networks are compiled only at their first full batch
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        expected = "a C++ compiler" if device.type == "cpu" else "Triton, which comes with torch for CUDA"
        got = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        problem, remedy = f"torch cannot compile for {device} here", "Install it, or run without --compile"
        raise VaflowError(explain(problem, expected=expected, got=got, remedy=remedy)) from error
    encoder.module.compile(dynamic=False)


@dataclass(frozen=True)
class Encoders:
    """Encoders by stream name, each with the batcher that feeds it; and the face detector on their device, if used."""

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
    """Give each encoder a batcher of the size given by the settings or the device.

    An audio encoder that reads a window in several segments uses the batch size of images: each segment is small.
    """
    sizes = BATCH_SIZES[device.type]
    parts = max(1, len(visual) + len(audio))

    def batcher(encode: Encode, setting: int, kind: str) -> FixedBatcher:
        if setting == AUTO and device.type == "cuda":
            measure = partial(fitting, encode, device, CudaMemory(device), parts=parts, most=LARGEST[kind])
            return FixedBatcher(encode, measure, device)
        return FixedBatcher(encode, sizes[kind] if setting in (0, AUTO) else setting, device)

    def audio_batcher(encoder: AudioEncoder) -> FixedBatcher:
        encode = partial(encoder.encode, window=config.window, steps=config.audio_steps)
        if len(encoder.segments(config.window, config.audio_steps).first) == 1:
            return batcher(encode, config.window_batch, "audio")
        return batcher(encode, config.image_batch, "visual")

    return Encoders(
        {e.name: (e, batcher(e.encode, config.image_batch, "visual")) for e in visual},
        {e.name: (e, audio_batcher(e)) for e in audio},
        TorchDetector(device) if config.detector == "torch" and config.face_source != "none" else None,
    )
