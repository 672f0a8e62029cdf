"""The device that computes: choosing it, its float32 arithmetic, its memory, and its clock."""

from __future__ import annotations

import ctypes
import logging
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vaflow.errors import UsageError, VaflowError, explain, is_out_of_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Encode: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


def choose_device(name: str) -> torch.device:
    """The device of `--device`; "auto" is the first GPU, or the CPU on a machine without one.

    Raises:
        UsageError: the name is not "auto", "cpu" or "cuda[:N]", or the GPU does not exist.
    """
    import torch

    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is None:
        raise UsageError(explain("Unknown device", got=name, choices=("auto", "cpu", "cuda", "cuda:N")))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        available = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        problem = "This machine has no such GPU"
        raise UsageError(explain(problem, expected=available, got=name, remedy="Use --device auto"))
    return device


def forbid_tf32() -> None:
    """Compute float32 as float32 on every GPU, whatever the process was set to before.

    With TF32, matrix products and convolutions keep 10 bits of each factor: results then differ between GPU models by
    more than the stated tolerance, and PyTorch allows TF32 in convolutions by default.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@cache
def keep_memory() -> None:
    """Let the C library of this process keep freed memory, in huge pages, where that is glibc on Linux.

    By default it returns large blocks to the system at once, and a step of training spends up to 12 % of its time on
    clearing the same pages again. Huge pages save 3 to 5 % more, because a step reads all its memory several times.
    """
    size = 512 * 2**20  # of the heap from which memory is taken first; only what is used counts as memory
    trim_threshold, top_pad, mmap_threshold, huge_pages = -1, -2, -3, 14  # of malloc.h and sys/mman.h
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2 * size)
        libc.mallopt(top_pad, size)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # its upper limit
        libc.malloc.restype = ctypes.c_void_p
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(16 * 2**20))))  # the heap grows by this and the padding
        heap = re.search(r"^(\w+)-(\w+) .*\[heap\]$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    except (AttributeError, OSError, TypeError):  # another C library, or not Linux
        return
    if heap is not None:
        start, end = (int(bound, 16) for bound in heap.groups())
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), huge_pages)


def device_name(device: torch.device) -> str:
    """The model of a GPU, or "cpu" with its model and the number of threads."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    model = f"{match[1].strip()}, " if match else ""
    threads = torch.get_num_threads()
    return f"cpu ({model}{threads} thread{'' if threads == 1 else 's'})"


class Stopwatch:
    """Measures the seconds a device works between construction and `stop`.

    A GPU runs behind the thread that gives it work, so two events in its current stream take the time, and nothing
    waits. On the CPU the calling thread does the work itself.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(self._stream)
        self._began = time.perf_counter()
        self._ended = self._began

    def stop(self) -> None:
        """End the measurement: all work has been queued."""
        if self._events is not None:
            self._events[1].record(self._stream)
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds between construction and `stop`. Waits until the work is done."""
        if self._events is None:
            return self._ended - self._began
        began, ended = self._events
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000


class InParts:
    """Encodes whole batches, or parts of them once a batch did not fit into the device's memory.

    Args:
        encode: [rows, ...] tensor on `device` -> [rows, ...] tensor on the same device.

    Attributes:
        size: rows encoded at once.
    """

    def __init__(self, encode: Encode, device: torch.device, size: int) -> None:
        self._encode, self._device, self.size = encode, device, size

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Encode a batch.

        Raises:
            VaflowError: a single row does not fit.
        """
        import torch

        while True:
            try:
                parts = [self._encode(part) for part in batch.split(self.size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    problem = "The device has too little memory for a batch of one row"
                    got = (str(error) or type(error).__name__).splitlines()[0]
                    remedy = "Free the device or use another --device, then run the same command again to resume"
                    raise VaflowError(explain(problem, got=got, remedy=remedy)) from error
                self.size = max(1, self.size // 2)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning("Too little memory on %s: using batches of %d", self._device, self.size)
