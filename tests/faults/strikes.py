"""Inject faults into a command: a signal, an error or a clock change at the n-th call of a function.

Used in the code that a lab runs before a command: `strike("vaflow.cache.cache.Cache.write", 2, signal_self, 15)`.
"""

import ctypes
import functools
import importlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def find(name: str) -> tuple[Any, str]:
    """Split a dotted name into the object that holds it and its last part."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            holder = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise ModuleNotFoundError(name)


def strike(name: str, call: int, fault: Callable[..., None], *args: Any) -> None:
    """Call `fault(*args)` just before the `call`-th call of the function `name`, counted from 1."""
    holder, attribute = find(name)
    real, calls = getattr(holder, attribute), 0

    @functools.wraps(real)
    def struck(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            fault(*args)
        return real(*given, **named)

    setattr(holder, attribute, struck)


def signal_self(number: int) -> None:
    """Signal the command alone, as a scheduler does."""
    os.kill(os.getpid(), number)


def signal_group(number: int) -> None:
    """Signal the command and its workers, as a terminal does."""
    os.killpg(os.getpgrp(), number)


def fail(error: type[BaseException], *args: Any) -> None:
    """Raise."""
    raise error(*args)


def run(command: str) -> None:
    """Run a system command, such as a remount or a permission change."""
    if os.system(command):
        raise RuntimeError(command)


def no_privilege() -> None:
    """Drop root's permission overrides, in this process and its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    drop_bounding, overrides = 24, (1, 2)  # PR_CAPBSET_DROP; CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for capability in overrides:
        libc.prctl(drop_bounding, capability, 0, 0, 0)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("6I", data.raw))
    for word in range(3):  # effective, permitted, inheritable: of the first 32 capabilities
        for capability in overrides:
            words[word] &= ~(1 << capability)
    if libc.capset(header, struct.pack("6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")


def jump_clock(seconds: float, every: int = 7) -> None:
    """Make the wall clock jump back and forth at every few reads; the monotonic clock is unchanged."""
    looks = 0
    real, real_ns = time.time, time.time_ns

    def offset() -> float:
        nonlocal looks
        looks += 1
        return seconds if (looks // every) % 2 else -seconds

    time.time = lambda: real() + offset()
    time.time_ns = lambda: real_ns() + int(offset() * 1e9)


def jump_file_times(seconds: float) -> None:
    """Make the modification time of every replaced file and directory jump back and forth."""
    count = 0
    for name in ("link", "replace", "rename", "mkdir"):
        real = getattr(os, name)

        def jumping(*args: Any, _real: Any = real, **named: Any) -> Any:
            nonlocal count
            result = _real(*args, **named)
            count += 1
            path = Path(args[-1] if _real.__name__ != "mkdir" else args[0])
            now = time.monotonic() + 1.7e9 + (seconds if count % 2 else -seconds)
            for touched in (path, path.parent):
                if touched.exists():
                    os.utime(touched, (now, now))
            return result

        setattr(os, name, jumping)
