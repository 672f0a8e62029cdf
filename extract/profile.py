"""Where the time of an extraction goes: `vaflow extract --profile`."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

WAITING = "waiting for decoders"
COMMITTING = "committing (in its own thread)"
WAITING_FOR_WRITER = "waiting for the writer"
REST = "filter banks, bookkeeping"
CURES = {
    WAITING: "decoding is the bottleneck: more --workers, or --faces auto where crops exist",
    WAITING_FOR_WRITER: "the disk is the bottleneck: a faster one, or --store hdf5 (fewer files)",
    REST: "the main process is the bottleneck: several processes with --shard",
}


class Profile:
    """Seconds per stage. One thread per stage name, so no locks are needed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began

    def waiting(self, source: Iterable[T]) -> Iterator[T]:
        """Pass items on, adding the time until each comes to `WAITING`."""
        iterator = iter(source)
        while True:
            with self.measure(WAITING):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def stages(self) -> dict[str, float]:
        """Stage -> seconds of the main thread, which add up to the wall time since the start, then the writer's own."""
        total = time.perf_counter() - self._began
        main = {stage: seconds for stage, seconds in self.seconds.items() if stage != COMMITTING}
        return {**main, REST: total - sum(main.values()), COMMITTING: self.seconds[COMMITTING]}


def bottleneck(stages: dict[str, float]) -> str:
    """One line on the stage that takes most of the main thread's time, and the cure where there is one."""
    main = {stage: seconds for stage, seconds in stages.items() if stage != COMMITTING}
    worst = max(main, key=lambda stage: main[stage])
    share = main[worst] / max(sum(main.values()), 1e-9)
    return f"{worst}: {share:.0%} of the time; {CURES.get(worst, 'the encoder is the bottleneck, as it should be')}"
