"""Where embeddings lie during training: packed tensors on the device, or a memory-mapped scratch file."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaflow.cache import Cache
from vaflow.train.inputs import InputStream

log = logging.getLogger(__name__)


@dataclass
class Pack:
    """The growing packed tensor of one stream; row 0 stays zeros."""

    rows: Tensor
    filled: int = 1

    def append(self, embedding: np.ndarray) -> int:
        """Add [T, D] rows; returns the number of the first."""
        first = self.filled
        self.filled += len(embedding)
        self.rows[first : self.filled].copy_(torch.from_numpy(embedding))
        return first


def make_packs(
    cache: Cache,
    items: Sequence[str],
    streams: Sequence[InputStream],
    device: torch.device,
    budget: int | None,
    scratch: Path | None,
) -> dict[str, Pack]:
    """Room for every stream: on the device while the budget lasts, then in a scratch file."""
    left = default_budget(device) if budget is None else budget
    packs = {}
    for stream in streams:
        dtype = getattr(torch, cache.streams()[stream.name].dtype)
        shape = (1 + sum(_row_count(cache, stream.name, item) for item in items), stream.dim)
        size = prod(shape) * dtype.itemsize
        if size <= left:
            left -= size
            packs[stream.name] = Pack(torch.zeros(shape, dtype=dtype, device=device))
        else:
            log.info("Stream %s (%.1f GB) does not fit in memory and is memory-mapped", stream.name, size / 1e9)
            packs[stream.name] = Pack(mapped(shape, dtype, scratch))
    return packs


def _row_count(cache: Cache, stream: str, item: str) -> int:
    if not cache.has(stream, item):
        return 0
    shape = cache.record(stream, item).arrays["embedding"]["shape"]
    return int(prod(shape[:-1]))


def mapped(shape: tuple[int, int], dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """Zeros in a file that has no name, so that nothing is left behind however the program ends."""
    with tempfile.TemporaryFile(dir=scratch, prefix="vaflow-") as file:
        file.truncate(prod(shape) * dtype.itemsize)
        array = np.memmap(file, np.uint8, "r+", shape=(prod(shape) * dtype.itemsize,))
    return torch.from_numpy(array).view(dtype).view(shape)


def default_budget(device: torch.device) -> int:
    """Bytes of embeddings that may lie on a device: half of what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return available_memory() // 2


def available_memory() -> int:
    """Bytes of memory that the machine could give without swapping; a guess of 2 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 2 * 2**30
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2 * 2**20)
    return kilobytes * 1024
