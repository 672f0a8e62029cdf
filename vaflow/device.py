"""The device that computes: choosing it, its float32 arithmetic, and its clock."""

from __future__ import annotations

import ctypes
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    import torch


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
        raise UsageError(
            explain("This machine has no such GPU", expected=available, got=name, remedy="Use --device auto")
        )
    return device


def forbid_tf32() -> None:
    """Compute float32 as float32 on every GPU, whatever the process was set to before.

    With TF32, matrix products and convolutions keep 10 bits of each factor: results then differ between GPU models by
    more than the stated tolerance, and PyTorch allows TF32 in convolutions by default.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def keep_freed_memory(megabytes: int = 256) -> None:
    """Let the C library keep freed memory of this process for its next use, where that is glibc.

    By default it returns large blocks to the system at once; a step of training then spends up to 12 % of its time on
    clearing the same pages again.
    """
    options = {-1: megabytes * 2**20, -3: 32 * 2**20}  # M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD at its upper limit
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or not Linux
        return
    for option, value in options.items():
        mallopt(option, value)


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

    Args:
        device: which device.
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
