"""How large a batch may be: measured on two trial batches, from the memory that is free then; halved if need be."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.errors import VaflowError, explain, is_out_of_memory

logger = logging.getLogger(__name__)

TRIAL = (4, 16)  # rows
SHARE = 0.8  # of the free memory: allocators fragment, and others may use the card


class Memory(Protocol):
    """A device's memory, in bytes."""

    def free(self) -> int:
        """What new tensors may take."""
        ...

    def peak(self, work: Callable[[], object]) -> int:
        """The most that `work` takes at once, beyond what was taken before it."""
        ...


class CudaMemory:
    """A GPU's memory, as the driver and torch's allocator tell it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Free on the card, and what torch holds without using it."""
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0]) + kept

    def peak(self, work: Callable[[], object]) -> int:
        """By torch's own count."""
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
    """The largest batch, a power of two, that fits into a part of the free memory: small changes of what is free
    rarely change it.

    Args:
        row: one row, which says shape and type.
        parts: into how many the free memory is divided (one for each encoder).
        most: rows at most.
    """

    def trial(rows: int) -> object:
        return encode(torch.zeros((rows, *row.shape), dtype=torch.from_numpy(row[..., :0]).dtype, device=device))

    small, large = TRIAL
    try:
        trial(small)  # libraries take their workspaces on the first call
        low, high = memory.peak(lambda: trial(small)), memory.peak(lambda: trial(large))
    except torch.OutOfMemoryError:
        return small
    each = max(1.0, (high - low) / (large - small))
    fixed = max(0.0, low - small * each)
    rows = (memory.free() * SHARE / parts - fixed) / each
    return int(2 ** np.floor(np.log2(min(max(rows, 1), most))))


class InParts:
    """Encodes batches whole, or in parts where one has once been too large for the device's memory.

    Args:
        encode: [rows, ...] tensor on `device` -> [rows, ...] tensor on the same device.
        device: where to encode.
        size: rows of a batch.

    Attributes:
        size: rows that are encoded at once.
    """

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], device: torch.device, size: int) -> None:
        self._encode, self._device, self.size = encode, device, size

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Encode a batch.

        Raises:
            VaflowError: not even a single row fits.
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
                            "The device has too little memory for a single row",
                            got=(str(error) or type(error).__name__).splitlines()[0],
                            remedy="Free the device, or use another with --device; what was committed stays",
                        )
                    ) from error
                self.size = max(1, self.size // 2)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning("Too little memory on %s: going on with batches of %d", self._device, self.size)
