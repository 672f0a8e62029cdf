"""Read the next batch while the current one is used; for a GPU, copy its rows ahead on a stream of its own.

Needed where features do not fit in the memory of the device: they stay in host memory, or in a memory-mapped file. The
reading thread gathers rows into page-locked memory and copies them to the device while a step runs, and the stream of
the step waits for the copy by an event, so neither thread waits for a copy. The GPU part has not run on a GPU; the
tests rehearse it with pretended tensors, and on a CPU the same code gives the same bits as features in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vaflow.train.batch import Batch
from vaflow.train.windows import WindowSet

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Like `map`, but a thread computes the next result while the caller uses the current one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


class Prefetcher(Generic[Item]):
    """Gathers batches, ahead of their use if features are not on the device.

    Args:
        windows: a set on the device of the batches; whether it is `off_device` decides how batches are read.
        gather: item -> batch; None: `windows.gather`.
    """

    def __init__(self, windows: WindowSet, gather: Callable[[Item], Batch] | None = None) -> None:
        self._gather: Callable[[Any], Batch] = gather or windows.gather
        self._off_device, self._stream = windows.off_device, None
        if self._off_device and windows.device.type == "cuda":
            self._stream = torch.cuda.Stream(windows.device)
            self._stream.wait_stream(torch.cuda.current_stream(windows.device))  # masks and labels may be pending

    def batches(self, items: Iterable[Item]) -> Iterator[Batch]:
        """The batch of every item, in order."""
        order: Callable[..., Iterable[tuple[Batch, Any]]] = ahead if self._off_device else map
        for batch, copied in order(self.read, items):
            yield self.take(batch, copied)

    def read(self, item: Item) -> tuple[Batch, Any]:
        """A batch whose copies may be under way, and the event after them. Called by the reading thread."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = self._gather(item)
        return batch, None if self._stream is None else self._stream.record_event()

    def take(self, batch: Batch, copied: Any) -> Batch:
        """The batch for use on the current stream, which waits for the copies; this thread does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(copied)
            for tensor in tensors_of(vars(batch)):
                tensor.record_stream(current)  # its memory is not reused for the next copy before this step ends
        return batch


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(vars(value))
