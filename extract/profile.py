"""Where the time of an extraction goes: `vaflow extract --profile`."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

WAITING = "waiting for decoders"
COMMITTING = "committing (in its own thread)"
WAITING_FOR_WRITER = "waiting for the writer"
REST = "filter banks, bookkeeping"
ON_DEVICE = "encoding, by the device's own clock"
BESIDE = (COMMITTING, ON_DEVICE)  # not of the main thread
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
        """Stage -> seconds of the main thread, which add up to the wall time since the start, then those beside it."""
        total = time.perf_counter() - self._began
        main = _of_main(self.seconds)
        return {**main, REST: total - sum(main.values()), **{stage: self.seconds[stage] for stage in BESIDE}}


def bottleneck(stages: Mapping[str, float]) -> str:
    """What takes most of the main thread's time, the cure where there is one, and how long the device was idle."""
    main = _of_main(stages)
    worst = max(main, key=lambda stage: main[stage])
    total = max(sum(main.values()), 1e-9)
    cure = CURES.get(worst, "the encoder is the bottleneck, as it should be")
    line = f"{worst}: {main[worst] / total:.0%} of the time; {cure}"
    return f"{line}. The encoders' device was idle {idle_share(stages):.0%} of it."


def idle_share(stages: Mapping[str, float]) -> float:
    """The part of a run, 0 to 1, in which the device had nothing to encode."""
    return max(0.0, 1 - stages.get(ON_DEVICE, 0.0) / max(sum(_of_main(stages).values()), 1e-9))


def _of_main(stages: Mapping[str, float]) -> dict[str, float]:
    return {stage: seconds for stage, seconds in stages.items() if stage not in BESIDE}
