"""Train the runs of a study or a search in this process, in several, or on a Ray cluster.

Each worker trains runs one after the other, or several together, and keeps the data that the next run shares. A worker
that dies fails only its run, or none if another worker may try it again.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.errors import VaflowError, explain
from vaflow.ray_cluster import check_engine
from vaflow.train.ablate.schedule import ScheduledRun
from vaflow.train.ablate.workers import Crew, Ended, Processes, Run, Runner, Worker
from vaflow.train.together import batches_of, check_mode, one_thread

log = logging.getLogger(__name__)

RUNS = "runs"  # the folder of runs below the study's
STILLBORN = 3  # workers in a row that may die before they train; then the study ends


@dataclass(frozen=True)
class Outcome:
    """A run that has ended, and its outcome."""

    run: ScheduledRun
    ended: Ended


class Pool:
    """Workers that train runs, from the first batch until the end of the context.

    Args:
        processes: how many at once; 1: in this process. With Ray, the most; None: as many as the cluster has room for.
        engine: "local" or "ray".
        ray_address: of the cluster, as `ray.init` takes it.
        level: of log lines that are shown while runs go on.
        on_choice: called with a line about each batch that was timed.
    """

    def __init__(
        self,
        cache: Cache,
        out: Path,
        *,
        processes: int | None = None,
        engine: str = "local",
        ray_address: str | None = None,
        level: int = logging.ERROR,
        together: str = "auto",
        on_choice: Callable[[str], None] = log.info,
        **options: Any,
    ) -> None:
        check_engine(engine, ray_address)
        self._together, self._on_choice, self._level = check_mode(together), on_choice, level
        options["together"] = together
        self._runner: Runner | None = None
        self._crew: Crew | None = None
        if engine == "ray":
            from vaflow.train.ablate.ray_workers import RayActors

            self._crew = RayActors(cache, out, processes, level, options, ray_address)
        elif (processes or 1) > 1:
            self._crew = Processes(cache.place, processes or 1, level, options)
        else:
            self._runner = Runner(cache, on_choice=on_choice, **options)
        self._workers: list[Worker] = []
        self._stillborn = 0

    def __enter__(self) -> "Pool":
        self._stack = ExitStack()
        self._stack.enter_context(one_thread(self._level) if self._crew is None else self._crew)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def train(self, runs: Sequence[Run]) -> Generator[tuple[int, Ended], None, None]:
        """Train runs; yields the number and the outcome of each as it ends.

        Raises:
            UsageError: a node of the cluster cannot reach the cache or the folder.
            VaflowError: workers die before they train.
        """
        batches = [[number] for number in range(len(runs))]
        if self._together != "never":
            places = 1 if self._crew is None else self._crew.places(runs)
            batches = batches_of(range(len(runs)), lambda number: runs[number][0], places)
        if self._runner is not None:
            for batch in batches:
                for place, ended in self._runner.train([runs[number] for number in batch]):
                    yield batch[place], ended
        elif self._crew is not None:
            yield from self._train_on(self._crew, runs, deque(batches))

    def _train_on(
        self, crew: Crew, runs: Sequence[Run], waiting: deque[list[int]]
    ) -> Generator[tuple[int, Ended], None, None]:
        deaths: Counter[int] = Counter()
        while waiting or any(worker.batch for worker in self._workers):
            useful = len(waiting) + sum(bool(worker.batch) for worker in self._workers)
            while len(self._workers) < min(crew.places(runs), useful):
                self._workers.append(crew.start())
            for worker in self._workers:
                if worker.ready and not worker.batch and waiting:
                    batch = waiting.popleft()
                    worker.batch = dict(enumerate(batch))
                    worker.give([runs[number] for number in batch])
            for worker in crew.wait([worker for worker in self._workers if worker.batch or not worker.ready]):
                for message in worker.take():
                    if (ended := self._ended(worker, message)) is not None:
                        yield ended
                if not worker.alive:
                    self._workers.remove(worker)
                    yield from self._lost(worker, crew, deaths, waiting)

    def _ended(self, worker: Worker, message: dict[str, Any]) -> tuple[int, Ended] | None:
        """Handle a message; return the run that has ended, if it is about one."""
        if "choice" in message:
            self._on_choice(message["choice"])
        if "note" in message:
            log.warning("%s", message["note"])
        if "number" not in message:
            return None
        self._stillborn = 0
        return worker.batch.pop(message["number"]), Ended(**message["ended"])

    def _lost(
        self, worker: Worker, crew: Crew, deaths: Counter[int], waiting: deque[list[int]]
    ) -> Generator[tuple[int, Ended], None, None]:
        """Handle a worker that died: its runs are tried again alone, or fail."""
        error, message = worker.ending
        if not worker.batch:
            self._stillborn += 1
            if self._stillborn >= STILLBORN:
                remedy = "See Ray's logs in /tmp/ray/session_latest/logs; too little memory is the usual cause"
                raise VaflowError(explain("Workers died before they trained", got=message, remedy=remedy))
        alone = len(worker.batch) == 1  # of a larger batch, it is unknown which run ended the process
        for number in worker.batch.values():
            deaths[number] += alone
            if deaths[number] > crew.retries:
                yield number, Ended(error=error, message=message)
            else:
                waiting.append([number])


def run_all(
    runs: Sequence[ScheduledRun],
    cache: Cache,
    out: Path,
    *,
    processes: int | None = None,
    engine: str = "local",
    **options: Any,
) -> Generator[Outcome, None, None]:
    """Train every run in `out/runs/<hash>`, and yield each outcome as its run ends."""
    if not runs:
        return
    if engine == "local":
        processes = min(processes or 1, len(runs))
    with Pool(cache, out, processes=processes, engine=engine, moments=True, **options) as pool:
        for number, ended in pool.train([(run.config, out / RUNS / run.key) for run in runs]):
            yield Outcome(runs[number], ended)
