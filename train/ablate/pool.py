"""Train the runs of a study, in this process or in several; a process that dies fails its run only.

Each process trains runs one after the other and keeps the data that the next run shares.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from vaflow.cache import Cache, open_cache
from vaflow.device import choose_device
from vaflow.errors import VaflowError
from vaflow.process import ChildProcess
from vaflow.train.ablate.plan import Job, data_key
from vaflow.train.ablate.statistics import moments_file, video_moments_of, write_moments
from vaflow.train.config import TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.runs import RunFolder
from vaflow.train.session import Data, load_data
from vaflow.train.settings_files import from_toml, to_toml
from vaflow.train.training import train_run

# What a run may fail of while the others go on: bad data, a device that refuses, memory, a full disk.
FAILURES = (VaflowError, RuntimeError, MemoryError, OSError, ValueError)


@dataclass(frozen=True)
class Ended:
    """Outcome of one run.

    Attributes:
        seconds: duration.
        score: mean CCC; None if the run failed or no clip is labelled.
        error, message: class and message of the error; empty if the run finished.
    """

    seconds: float = 0.0
    score: float | None = None
    error: str = ""
    message: str = ""


class Runner:
    """Trains runs on one cache. Both splits stay loaded until a run needs others."""

    def __init__(self, cache: Cache, *, allow_missing: bool = False) -> None:
        self._cache = cache
        self._allow_missing = allow_missing
        self._loaded: tuple[tuple[object, ...], Data] | None = None

    def run(self, config: TrainConfig, out: Path) -> Ended:
        """Train the run in `out`, or go on with it, and leave its moments per video beside it."""
        begun = time.perf_counter()
        try:
            folder = RunFolder(out)
            data = None if folder.done or config.finetune else self._data(config)
            result = train_run(
                self._cache,
                config,
                out,
                data=data,
                allow_missing=self._allow_missing,
                tensorboard=False,
                pictures=False,
                keep_checkpoint=False,
            )
            if not moments_file(out).is_file():
                write_moments(out, video_moments_of(folder, self._cache, config.val_split))
        except FAILURES as error:
            return Ended(time.perf_counter() - begun, error=type(error).__name__, message=str(error))
        return Ended(time.perf_counter() - begun, result.metrics["ccc"]["mean"])

    def _data(self, config: TrainConfig) -> Data:
        key = data_key(config)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # let go of the old data before the new is read
            config, inputs = resolve(self._cache, config)
            self._loaded = key, load_data(self._cache, config, inputs, device=choose_device(config.device))
        return self._loaded[1]


@contextmanager
def one_thread(level: int) -> Iterator[None]:
    """Run torch with one thread: light heads gain nothing from more, and results do not depend on the number of
    processes. Log messages below `level` are dropped.
    """
    log, threads = logging.getLogger("vaflow"), torch.get_num_threads()
    before = log.level
    torch.set_num_threads(1)
    log.setLevel(level)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(before)


def serve(connection: Connection, cache: Path, level: int, allow_missing: bool) -> None:
    """The process: settings and a folder in, an outcome out, both as one message of text; ends with its parent."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    runner = Runner(open_cache(cache), allow_missing=allow_missing)
    with one_thread(level):
        while True:
            try:
                message = receive(connection)
            except EOFError:
                return
            send(connection, asdict(runner.run(from_toml(message["config"]), Path(message["out"]))))


def send(connection: Connection, message: Mapping[str, Any]) -> None:
    """Text over the pipe, as JSON."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """What `send` sent.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


RUNS = "runs"  # the folder of runs below the study's


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
    """Train every job in `out/runs/<hash>`, and yield each outcome as its run ends.

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


class _Worker:
    """A process of `serve` and the pipe to it."""

    def __init__(self, cache: Path, level: int, allow_missing: bool) -> None:
        self._process = ChildProcess(serve, (cache, level, allow_missing), name="vaflow-ablate")
        self.connection = self._process.pipe
        self.alive = True

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        if error[0] is not None:
            self._process.kill()  # runs resume from their checkpoints: only an epoch is lost
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
            ended = receive(self.connection)
        except (EOFError, OSError):
            self.alive = False
            self._process.join()
            message = f"The process of this run ended with {self._process.ending}"
            return Outcome(job, Ended(error="ProcessEnded", message=message))
        return Outcome(job, Ended(**ended))
