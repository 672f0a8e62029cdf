"""Outcomes of an extraction while it runs, its summary, and the time per stage (`--profile`); for every engine."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from vaflow.cache.costs import Cost
from vaflow.items import Failure, FailureLog

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


@dataclass
class Summary:
    """Summary of an extraction.

    Attributes:
        extracted: items committed; done: items that were complete before; changed: items extracted again because their
            source files have changed; outdated: items with changed source files that could not be extracted again.
        failures: items that failed, with their reasons; `failures_file` lists them.
        encoded: encoder name -> rows encoded.
        several_people: extracted items that show several people; without a face-recognition network, several tracks.
        label_problems: code of `vaflow.datasets.labels.clock_problem` -> extracted items with that problem.
        media_seconds: duration of the extracted items; wall_seconds: of the extraction.
        stages: stage -> seconds of the main process; with several processes, their sum.
        costs: stream -> what encoding its clips cost.
    """

    extracted: int = 0
    done: int = 0
    changed: int = 0
    outdated: int = 0
    failures: list[Failure] = field(default_factory=list)
    failures_file: Path | str = Path()
    encoded: dict[str, int] = field(default_factory=dict)
    several_people: int = 0
    label_problems: dict[str, list[str]] = field(default_factory=dict)
    media_seconds: float = 0.0
    wall_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)


@dataclass(frozen=True)
class Extracted:
    """An item that has been committed.

    Attributes:
        seconds: its duration.
        people: number of people with at least a tenth of the clear faces of the first one.
        label_problem: why its labels may not belong to it, a code, or "".
    """

    item: str
    seconds: float
    people: int = 0
    label_problem: str = ""


Outcome = Extracted | Failure


class OutcomeRecorder:
    """Records the outcome of every item in the summary, the failure log and the progress bar. Thread-safe.

    The bar counts seconds of video, so that it moves within long clips. Use as a context manager.

    Args:
        seconds: item -> estimated duration, of all items of the run.
    """

    def __init__(self, summary: Summary, log: FailureLog, seconds: Mapping[str, float], *, show_progress: bool) -> None:
        self.summary = summary
        self._log = log
        self._lock = threading.Lock()
        self._seconds = {item: max(length, 1.0) for item, length in seconds.items()}
        self._shares: dict[str, float] = {}  # item -> share that the bar has counted
        self._rates = ""
        self._ended = 0
        self._total = sum(self._seconds.values())
        self._bar = tqdm(
            total=self._total,
            desc="extract",
            disable=not show_progress,
            smoothing=0.1,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s of video "
            "[{elapsed}<{remaining}{postfix}]",
        )
        self._show_state()

    def __enter__(self) -> "OutcomeRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def take(self, outcome: Outcome) -> None:
        """Record that an item was committed or failed."""
        with self._lock:
            if isinstance(outcome, Failure):
                self._log.add(outcome)
            else:
                self.summary.extracted += 1
                self.summary.media_seconds += outcome.seconds
                self.summary.several_people += outcome.people > 1
                if outcome.label_problem:
                    self.summary.label_problems.setdefault(outcome.label_problem, []).append(outcome.item)
            self._ended += 1
            self._advance(outcome.item, 1.0)
            self._show_state()

    def progress(self, item: str, share: float) -> None:
        """Record that a share (0 to 1) of an item has been read."""
        with self._lock:
            self._advance(item, share)

    def count(
        self, rows: Mapping[str, int], stages: Mapping[str, float], costs: Mapping[str, Cost], note: str = ""
    ) -> None:
        """Record rows encoded so far, by encoder, seconds by stage, and costs by stream; the bar shows rates."""
        with self._lock:
            self.summary.encoded, self.summary.stages, self.summary.costs = dict(rows), dict(stages), dict(costs)
            seconds = max(self._bar.format_dict["elapsed"], 1e-3)
            rates = [f"{name} {number / seconds:.0f}/s" for name, number in rows.items()]
            self._rates = ", ".join([*rates, note] if note else rates)
            self._show_state()

    def _advance(self, item: str, share: float) -> None:
        before = self._shares.get(item, 0.0)
        if share > before:
            self._shares[item] = share
            step = (share - before) * self._seconds.get(item, 1.0)
            self._bar.update(min(step, self._total - self._bar.n))  # beyond its total, the bar prints a warning

    def _show_state(self) -> None:
        clips = f"{self._ended}/{len(self._seconds)} clips"
        self._bar.set_postfix_str(", ".join(filter(None, [clips, self._rates])), refresh=False)


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
