"""Time per stage of an extraction: `vaflow extract --profile`."""

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
DETECTING = "detecting faces"
ON_DEVICE = "encoding (device clock)"
DETECTING_ON_DEVICE = "detecting (device clock)"  # only with --detector torch
BESIDE = (COMMITTING, ON_DEVICE, DETECTING_ON_DEVICE)  # in other threads
REMEDIES = {
    WAITING: "decoding is the bottleneck: use more --workers, --faces auto if there are crops, or --detector torch",
    DETECTING: "face detection is the bottleneck: use --faces auto if there are crops, or another --detector",
    WAITING_FOR_WRITER: "the disk is the bottleneck: use a faster one, or --store hdf5 (fewer files)",
    REST: "the main process is the bottleneck: run several processes with --shard",
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
        """Yield the items of `source`, adding the time until each arrives to `WAITING`."""
        iterator = iter(source)
        while True:
            with self.measure(WAITING):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def stages(self) -> dict[str, float]:
        """Stage -> seconds: stages of the main thread, which add up to the wall time, then those of other threads."""
        total = time.perf_counter() - self._began
        main = _of_main(self.seconds)
        beside = {COMMITTING: 0.0, ON_DEVICE: 0.0} | {k: v for k, v in self.seconds.items() if k in BESIDE}
        return {**main, REST: total - sum(main.values()), **beside}


def bottleneck(stages: Mapping[str, float]) -> str:
    """The stage that takes most of the main thread's time, its remedy, and the idle share of the device."""
    main = _of_main(stages)
    worst = max(main, key=lambda stage: main[stage])
    total = max(sum(main.values()), 1e-9)
    remedy = REMEDIES.get(worst, "the encoder is the bottleneck, which is the best case")
    line = f"{worst}: {main[worst] / total:.0%} of the time; {remedy}"
    return f"{line}. The encoders' device was idle for {idle_share(stages):.0%} of it."


def idle_share(stages: Mapping[str, float]) -> float:
    """Share of the run, 0 to 1, in which the device was idle."""
    busy = stages.get(ON_DEVICE, 0.0) + stages.get(DETECTING_ON_DEVICE, 0.0)
    return max(0.0, 1 - busy / max(sum(_of_main(stages).values()), 1e-9))


def _of_main(stages: Mapping[str, float]) -> dict[str, float]:
    return {stage: seconds for stage, seconds in stages.items() if stage not in BESIDE}
