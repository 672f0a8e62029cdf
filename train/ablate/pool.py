"""Train the runs of a study in this process or in several; a process that dies fails only its run.

Each process trains runs one after the other, or several together, and keeps the data that the next run shares.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vaflow.cache import Cache, open_cache
from vaflow.process import ChildProcess
from vaflow.train.ablate.plan import Job
from vaflow.train.ablate.statistics import moments_file, video_moments_of, write_moments
from vaflow.train.config import TrainConfig
from vaflow.train.runs import RunFolder
from vaflow.train.settings_files import from_toml, to_toml
from vaflow.train.together.epochs import FAILURES
from vaflow.train.together.runs import Trainer, batches_of, check_mode, one_thread


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
    """Trains runs of a study on one cache, and writes the moments of each run per video.

    Args:
        cache: what to train on.
        options: keyword arguments of `Trainer`.
    """

    def __init__(self, cache: Cache, **options: Any) -> None:
        self._cache = cache
        self._trainer = Trainer(cache, **options)

    def train(self, runs: Sequence[tuple[TrainConfig, Path]]) -> Iterator[tuple[int, Ended]]:
        """Train a batch of runs; yields the number and the outcome of each."""
        begun = time.perf_counter()
        for number, result in self._trainer.train(runs):
            config, out = runs[number]
            try:
                if isinstance(result, Exception):
                    raise result
                if not moments_file(out).is_file():
                    write_moments(out, video_moments_of(RunFolder(out), self._cache, config.val_split))
                score, error = result.metrics["ccc"]["mean"], {}
            except FAILURES as failure:
                score, error = None, {"error": type(failure).__name__, "message": str(failure)}
            now = time.perf_counter()
            yield number, Ended(now - begun, score, **error)
            begun = now


def serve(connection: Connection, cache: Path, level: int, options: Mapping[str, Any]) -> None:
    """Main function of the process: receives batches of settings and folders, sends a message per ended run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    runner = Runner(open_cache(cache), on_choice=lambda text: send(connection, {"choice": text}), **options)
    with one_thread(level):
        while True:
            try:
                message = receive(connection)
            except EOFError:
                return
            runs = [(from_toml(run["config"]), Path(run["out"])) for run in message["runs"]]
            for number, ended in runner.train(runs):
                send(connection, {"number": number, "ended": asdict(ended)})


def send(connection: Connection, message: Mapping[str, Any]) -> None:
    """Send a message over the pipe as JSON."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """Receive a message of `send`.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


RUNS = "runs"  # the folder of runs below the study's


@dataclass(frozen=True)
class Outcome:
    """A run that has ended, and its outcome."""

    job: Job
    ended: Ended


def run_jobs(
    jobs: Sequence[Job],
    cache: Cache,
    out: Path,
    *,
    processes: int = 1,
    together: str = "auto",
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
        together: as of `Trainer`.
        allow_missing: as of `train_run`.
        level: of log lines that are shown while runs go on.
        on_choice: called with a line about each batch that was timed.
    """
    batches = [[job] for job in jobs]
    if check_mode(together) != "never":
        batches = batches_of(jobs, lambda job: job.config, processes)
    options = {"together": together, "allow_missing": allow_missing}
    if processes <= 1 or len(jobs) <= 1:
        runner = Runner(cache, on_choice=on_choice, **options)
        with one_thread(level):
            for batch in batches:
                runs = [(job.config, out / RUNS / job.key) for job in batch]
                for number, ended in runner.train(runs):
                    yield Outcome(batch[number], ended)
        return
    with ExitStack() as stack:
        waiting = deque(batches)
        busy: dict[Connection, _Worker] = {}

        def begin(worker: _Worker) -> None:
            worker.give(waiting.popleft(), out / RUNS)
            busy[worker.connection] = worker

        def new_worker() -> _Worker:
            return stack.enter_context(_Worker(Path(cache.place), level, options, on_choice))

        for _ in range(min(processes, len(batches))):
            begin(new_worker())
        while busy:
            ready = set(wait(list(busy)))
            for connection in [connection for connection in busy if connection in ready]:
                worker = busy[connection]
                outcome = worker.take()
                if not worker.alive and worker.jobs:  # it is unknown which run of the batch ended the process
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

    def __init__(self, cache: Path, level: int, options: Mapping[str, Any], on_choice: Callable[[str], None]) -> None:
        self._process = ChildProcess(serve, (cache, level, dict(options)), name="vaflow-ablate")
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
        """Start a batch of runs. `take` detects a process that has died."""
        self.jobs = dict(enumerate(batch))
        runs = [{"config": to_toml(job.config), "out": str(folder / job.key)} for job in batch]
        try:
            send(self.connection, {"runs": runs})
        except OSError:
            self.alive = False

    def take(self) -> Outcome | None:
        """Wait for a message or the end of the process; return the outcome, or None if no run has ended."""
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
