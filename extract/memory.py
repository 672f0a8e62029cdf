"""Batch sizes from free memory: measured on two trial batches, and halved when a batch does not fit."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.errors import VaflowError, explain, is_out_of_memory

logger = logging.getLogger(__name__)

TRIAL = (4, 16)  # rows
SHARE = 0.8  # of the free memory: allocators fragment, and other processes may use the GPU


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


def fitting(
    encode: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    memory: Memory,
    row: NDArray[Any],
    *,
    parts: int,
    most: int,
) -> int:
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


class InParts:
    """Encodes whole batches, or parts of them once a batch did not fit into the device's memory.

    Args:
        encode: [rows, ...] tensor on `device` -> [rows, ...] tensor on the same device.
        device: where to encode.
        size: rows of a batch.

    Attributes:
        size: rows encoded at once.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], device: torch.device, size: int) -> None:
        self._encode, self._device, self.size = encode, device, size

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Encode a batch.

        Raises:
            VaflowError: a single row does not fit.
        """
        while True:
            try:
                parts = [self._encode(part) for part in batch.split(self.size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise VaflowError(
                        explain(
                            "The device has too little memory for a batch of one row",
                            got=(str(error) or type(error).__name__).splitlines()[0],
                            remedy="Free the device or use another --device, then run the same command again to resume",
                        )
                    ) from error
                self.size = max(1, self.size // 2)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning("Too little memory on %s: using batches of %d", self._device, self.size)
