"""Signs of life from deep inside a decoder's loop, so that slow work is told apart from work that hangs.

Whatever goes on step by step (packets, pictures, blocks of a file) calls `beat` at every step. In a decoding process
somebody listens and passes it on, at most once a second; elsewhere it does nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 1.0  # between two beats that are passed on

_listeners: list[Callable[[], None]] = []
_last = [0.0]


def beat() -> None:
    """One step was made."""
    if _listeners and (now := time.monotonic()) - _last[0] >= SECONDS:
        _last[0] = now
        _listeners[-1]()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Have `listener` called while steps are made."""
    _listeners.append(listener)
    _last[0] = time.monotonic()
    try:
        yield
    finally:
        _listeners.remove(listener)
