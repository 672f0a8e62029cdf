"""Train the runs of a study, in this process or in several; a process that dies fails its run only.

Each process trains runs one after the other, or several together, and keeps the data that the next run shares.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from vaflow.cache import Cache, open_cache
from vaflow.device import choose_device
from vaflow.process import ChildProcess
from vaflow.train.ablate.plan import Job, data_key
from vaflow.train.ablate.statistics import moments_file, video_moments_of, write_moments
from vaflow.train.config import TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.runs import RunFolder
from vaflow.train.session import Data, load_data
from vaflow.train.settings_files import from_toml, to_toml
from vaflow.train.together.choice import choose
from vaflow.train.together.compatible import batches_of
from vaflow.train.together.epochs import FAILURES
from vaflow.train.together.runs import train_together
from vaflow.train.training import Result, train_run


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


log = logging.getLogger(__name__)


class Runner:
    """Trains runs on one cache. Both splits stay loaded until a run needs others."""

    def __init__(self, cache: Cache, *, allow_missing: bool = False) -> None:
        self._cache = cache
        self._allow_missing = allow_missing
        self._loaded: tuple[tuple[object, ...], Data] | None = None

    def run_together(
        self, runs: Sequence[tuple[TrainConfig, Path]], on_choice: Callable[[str], None]
    ) -> Iterator[tuple[int, Ended]]:
        """Train runs that can train together, together if that measures faster; yields number and end of each run.

        Runs that are left when the batch fails as a whole, as for lack of memory, are trained alone.
        """
        waiting = dict(enumerate(runs))
        begun = time.perf_counter()
        try:
            data = self._data(runs[0][0])
            choice = choose(self._cache, [config for config, _ in runs], data)
            if choice.alone:
                on_choice(str(choice))
            if choice.faster:
                for number, result in train_together(self._cache, runs, data, allow_missing=self._allow_missing):
                    config, out = waiting.pop(number)
                    yield number, self._end(begun, result, config, out)
        except FAILURES as error:
            log.warning("%d runs train one after the other: %s", len(waiting), error)
        for number, (config, out) in waiting.items():
            yield number, self.run(config, out)

    def _end(self, begun: float, result: Result | Exception, config: TrainConfig, out: Path) -> Ended:
        """The end of a run that was begun at `begun`; its moments per video are written beside it."""
        try:
            if isinstance(result, Exception):
                raise result
            if not moments_file(out).is_file():
                write_moments(out, video_moments_of(RunFolder(out), self._cache, config.val_split))
        except FAILURES as error:
            return Ended(time.perf_counter() - begun, error=type(error).__name__, message=str(error))
        return Ended(time.perf_counter() - begun, result.metrics["ccc"]["mean"])

    def run(self, config: TrainConfig, out: Path) -> Ended:
        """Train the run in `out`, or go on with it, and leave its moments per video beside it."""
        begun = time.perf_counter()
        try:
            data = None if RunFolder(out).done or config.finetune else self._data(config)
            result = train_run(
                self._cache,
                config,
                out,
                data=data,
                allow_missing=self._allow_missing,
                tensorboard=False,
                figures=False,
                keep_checkpoint=False,
            )
        except FAILURES as error:
            return self._end(begun, error, config, out)
        return self._end(begun, result, config, out)

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
    """The process: a batch of settings and folders in, a message per ended run out; ends with its parent."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    runner = Runner(open_cache(cache), allow_missing=allow_missing)
    with one_thread(level):
        while True:
            try:
                message = receive(connection)
            except EOFError:
                return
            runs = [(from_toml(run["config"]), Path(run["out"])) for run in message["runs"]]
            for number, ended in train_batch(runner, runs, lambda text: send(connection, {"choice": text})):
                send(connection, {"number": number, "ended": asdict(ended)})


def train_batch(
    runner: Runner, runs: Sequence[tuple[TrainConfig, Path]], on_choice: Callable[[str], None]
) -> Iterator[tuple[int, Ended]]:
    """Train one run, or several that can train together; yields number and end of each."""
    if len(runs) == 1:
        yield 0, runner.run(*runs[0])
    else:
        yield from runner.run_together(runs, on_choice)


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
    together: bool = False,
    allow_missing: bool = False,
    level: int = logging.ERROR,
    on_choice: Callable[[str], None] = log.info,
) -> Generator[Outcome, None, None]:
    """Train every job in `out/runs/<hash>`, and yield each outcome as its run ends.

    Args:
        jobs: what to train, in the order in which they are begun.
        cache: what to train on.
        out: the study's folder.
        processes: how many at once; 1: in this process.
        together: train runs of one architecture together, where that measures faster.
        allow_missing: as of `train_run`.
        level: of log lines that are shown while runs go on.
        on_choice: called with a line about each batch of runs that could train together.
    """
    batches = batches_of(jobs, lambda job: job.config, processes) if together else [[job] for job in jobs]
    if processes <= 1 or len(jobs) <= 1:
        runner = Runner(cache, allow_missing=allow_missing)
        with one_thread(level):
            for batch in batches:
                runs = [(job.config, out / RUNS / job.key) for job in batch]
                for number, ended in train_batch(runner, runs, on_choice):
                    yield Outcome(batch[number], ended)
        return
    with ExitStack() as stack:
        waiting = deque(batches)
        busy: dict[Connection, _Worker] = {}

        def begin(worker: _Worker) -> None:
            worker.give(waiting.popleft(), out / RUNS)
            busy[worker.connection] = worker

        def new_worker() -> _Worker:
            return stack.enter_context(_Worker(Path(cache.place), level, allow_missing, on_choice))

        for _ in range(min(processes, len(batches))):
            begin(new_worker())
        while busy:
            ready = set(wait(list(busy)))
            for connection in [connection for connection in busy if connection in ready]:
                worker = busy[connection]
                outcome = worker.take()
                if not worker.alive and worker.jobs:  # which run of the batch ended the process is not known
                    waiting.extend([job] for job in worker.jobs.values())
                    worker.jobs.clear()
                if not worker.jobs:
                    del busy[connection]
                    if waiting:
                        begin(worker if worker.alive else new_worker())
                if outcome is not None:
                    yield outcome


class _Worker:
    """A process of `serve` and the pipe to it.

    Attributes:
        jobs: number in its batch -> run that has not ended.
    """

    def __init__(self, cache: Path, level: int, allow_missing: bool, on_choice: Callable[[str], None]) -> None:
        self._process = ChildProcess(serve, (cache, level, allow_missing), name="vaflow-ablate")
        self.connection = self._process.pipe
        self.alive = True
        self.jobs: dict[int, Job] = {}
        self._on_choice = on_choice

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        if error[0] is not None:
            self._process.kill()  # runs resume from their checkpoints: only an epoch is lost
        self._process.join()

    def give(self, batch: Sequence[Job], folder: Path) -> None:
        """Begin a batch of runs. A process that is gone is noticed by `take`."""
        self.jobs = dict(enumerate(batch))
        runs = [{"config": to_toml(job.config), "out": str(folder / job.key)} for job in batch]
        try:
            send(self.connection, {"runs": runs})
        except OSError:
            self.alive = False

    def take(self) -> Outcome | None:
        """How a run ended, once there is something to read, be it the end of the process; None: no run has ended."""
        try:
            message = receive(self.connection)
        except (EOFError, OSError):
            self.alive = False
            self._process.join()
            if len(self.jobs) > 1:
                return None
            _, job = self.jobs.popitem()
            text = f"The process of this run ended with {self._process.ending}"
            return Outcome(job, Ended(error="ProcessEnded", message=text))
        if "choice" in message:
            self._on_choice(message["choice"])
            return None
        return Outcome(self.jobs.pop(message["number"]), Ended(**message["ended"]))
