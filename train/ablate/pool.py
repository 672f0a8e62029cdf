"""Several runs at once: a process each, a new one where one dies, and the rest goes on."""

import logging
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from vaflow.cache import Cache
from vaflow.train.ablate.plan import Job
from vaflow.train.ablate.worker import Ended, Runner, one_thread, receive, send, serve
from vaflow.train.config import to_toml

RUNS = "runs"  # the folder of runs below the study's
TO_THE_GROUP = (signal.SIGINT, signal.SIGTERM)  # what a terminal or a scheduler sends to workers, too


@dataclass(frozen=True)
class Outcome:
    """A run that has ended, and how."""

    job: Job
    ended: Ended


def run_jobs(
    jobs: Sequence[Job],
    cache: Cache,
    out: Path,
    *,
    processes: int = 1,
    allow_missing: bool = False,
    level: int = logging.ERROR,
) -> Generator[Outcome, None, None]:
    """Train every job in `out/runs/<hash>`, and say which have ended as they end.

    Args:
        jobs: what to train, in the order in which they are begun.
        cache: what to train on.
        out: the study's folder.
        processes: how many at once; 1: in this process.
        allow_missing: as of `train_run`.
        level: of log lines that are shown while runs go on.
    """
    if processes <= 1 or len(jobs) <= 1:
        runner = Runner(cache, allow_missing=allow_missing)
        with one_thread(level):
            for job in jobs:
                yield Outcome(job, runner.run(job.config, out / RUNS / job.key))
        return
    with ExitStack() as stack:
        waiting = deque(jobs)
        busy: dict[Connection, tuple[_Worker, Job]] = {}

        def begin(worker: _Worker) -> None:
            job = waiting.popleft()
            worker.give(job, out / RUNS / job.key)
            busy[worker.connection] = worker, job

        def new_worker() -> _Worker:
            return stack.enter_context(_Worker(Path(cache.place), level, allow_missing))

        for _ in range(min(processes, len(jobs))):
            begin(new_worker())
        while busy:
            ready = set(wait(list(busy)))
            for connection in [connection for connection in busy if connection in ready]:
                worker, job = busy.pop(connection)
                outcome = worker.take(job)
                if waiting:
                    begin(worker if worker.alive else new_worker())
                yield outcome


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What a terminal or a scheduler sends waits until the end, and a process that is started inside never hears it.

    A process whose start is broken off complains that it was not told what to do.
    """
    came: list[tuple[int, FrameType | None]] = []
    ours = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.signal(n, lambda *what: came.append(what)) for n in TO_THE_GROUP} if ours else {}
    resource_tracker.ensure_running()  # where a process starts it, it unblocks what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        for number, _ in came[:1]:
            signal.raise_signal(number)


class _Worker:
    """A process of `serve` and the pipe to it."""

    def __init__(self, cache: Path, level: int, allow_missing: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=serve, args=(other, cache, level, allow_missing), name="vaflow-ablate", daemon=True
        )
        try:
            with _undisturbed():
                self._process.start()
        except BaseException:
            if self._process.pid is not None:
                self._process.kill()
            raise
        other.close()
        self.alive = True

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        if error[0] is not None:
            self._process.kill()  # nothing is lost but its run's epoch: runs go on from their checkpoints
        self._process.join()

    def give(self, job: Job, folder: Path) -> None:
        """Begin a run. A process that is gone is noticed by `take`."""
        try:
            send(self.connection, {"config": to_toml(job.config), "out": str(folder)})
        except OSError:
            self.alive = False

    def take(self, job: Job) -> Outcome:
        """How the run ended, once there is something to read, be it the end of the process."""
        try:
            message = receive(self.connection)
        except (EOFError, OSError):
            self.alive = False
            self._process.join()
            code = self._process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Outcome(job, Ended(error="ProcessEnded", message=f"The process of this run ended with {how}"))
        return Outcome(job, Ended(**message))
