"""How long a device works: a GPU runs behind the thread that gives it work, so only its own clock can tell."""

import time

import torch


class Stopwatch:
    """Measures what is asked of a device between its making and `stop`.

    On a GPU by two events in its current stream, so nothing waits; elsewhere the calling thread works itself.

    Args:
        device: that works.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record(self._stream)
        self._began = time.perf_counter()
        self._ended = self._began

    def stop(self) -> None:
        """The last piece of work has been asked for."""
        if self._events is not None:
            self._events[1].record(self._stream)
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Waits until the work is done."""
        if self._events is None:
            return self._ended - self._began
        began, ended = self._events
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000
