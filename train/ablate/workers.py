"""Workers of a pool: what each does with a batch of runs, in whichever process, and workers on this machine."""

import csv
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, open_cache
from vaflow.errors import CorruptError, explain
from vaflow.files import write_file
from vaflow.process import ChildProcess
from vaflow.timeline import Floats
from vaflow.train.config import TrainConfig, from_toml, to_toml
from vaflow.train.metrics import DIMENSIONS, video_moments
from vaflow.train.repeats import Trainer, one_thread
from vaflow.train.run_folder import RunFolder
from vaflow.train.stacked_loop import FAILURES

RunSpec = tuple[TrainConfig, Path]  # resolved settings and directory
Message = dict[str, Any]  # JSON: "number" and "ended" of a run, "choice" or "note" to print


@dataclass(frozen=True)
class Ended:
    """Outcome of one run.

    Attributes:
        score: mean CCC; None if the run failed or no clip is labelled.
        error, message: class and message of the error; empty if the run finished.
    """

    seconds: float = 0.0
    score: float | None = None
    error: str = ""
    message: str = ""


class Runner:
    """Trains runs on one cache; the latest splits stay loaded.

    Args:
        moments: write the moments of each run per video, for the tables of a study.
    """

    def __init__(self, cache: Cache, *, moments: bool = False, **options: Any) -> None:
        self._cache, self._moments = cache, moments
        self._trainer = Trainer(cache, **options)

    def train(self, runs: Sequence[RunSpec]) -> Iterator[tuple[int, Ended]]:
        """Train a batch of runs; yields the number and the outcome of each."""
        begun = time.perf_counter()
        for number, result in self._trainer.train(runs):
            config, out = runs[number]
            try:
                if isinstance(result, Exception):
                    raise result
                if self._moments and not moments_file(out).is_file():
                    write_moments(out, video_moments_of(RunFolder(out), self._cache, config.val_split))
                score, error = result.metrics["ccc"]["mean"], {}
            except FAILURES as failure:
                score, error = None, {"error": type(failure).__name__, "message": str(failure)}
            now = time.perf_counter()
            yield number, Ended(now - begun, score, **error)
            begun = now


def moments_file(run: Path) -> Path:
    """File of a run's moments."""
    return run / "moments.json"


def video_moments_of(folder: RunFolder, cache: Cache, split: str) -> dict[str, Floats]:
    """Moments of every video of a finished run's split, from its prediction files; people of one video are added up.

    Clips that the run's metrics leave out are left out.
    """
    left_out = set(folder.read_metrics()["missing"]["clips"])
    moments: dict[str, Floats] = {}
    files = folder.predictions(split)
    for path in sorted(files.rglob("*.csv")):
        item = path.relative_to(files).as_posix().removesuffix(".csv")
        of_clip = None if item in left_out else _moments_of_csv(path)
        if of_clip is not None:
            video = str(cache.meta(item).get("group") or item)
            moments[video] = moments.get(video, 0) + of_clip
    return moments


def _moments_of_csv(path: Path) -> Floats | None:
    """[6, 2] of one prediction file; None where nothing is labelled."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader)
        if f"label_{DIMENSIONS[0]}" not in header:
            return None
        columns = [header.index(name) for name in (*DIMENSIONS, *(f"label_{name}" for name in DIMENSIONS))]
        table = np.array([[float(row[k] or "nan") for k in columns] for row in reader])
    target = table[:, 2:]
    return video_moments(table[:, :2], target, np.isfinite(target))


def write_moments(run: Path, moments: Mapping[str, Floats]) -> None:
    """Store moments with a run."""
    document = {video: table.tolist() for video, table in moments.items()}
    write_file(moments_file(run), (json.dumps(document) + "\n"))


def read_moments(run: Path) -> dict[str, Floats]:
    """Read the moments stored with a run.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        document = json.loads(moments_file(run).read_text("utf-8"))
        return {video: np.array(table, np.float64).reshape(6, 2) for video, table in document.items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(explain(f"{moments_file(run)} is damaged", got=error, remedy="Delete it")) from error


def documents_of(runs: Sequence[RunSpec]) -> list[dict[str, str]]:
    """The runs as JSON."""
    return [{"config": to_toml(config), "out": str(out)} for config, out in runs]


def runs_from(documents: Sequence[Mapping[str, str]]) -> list[RunSpec]:
    """Invert `documents_of`."""
    return [(from_toml(run["config"]), Path(run["out"])) for run in documents]


class Worker:
    """A process that trains one batch of runs at a time, and the connection to it.

    Attributes:
        ready: a batch may be given.
        alive: it has not died.
        batch: place in its batch -> number of a run that has not ended.
        ending: error class and message for a run whose worker died.
    """

    ready = True
    alive = True
    ending = ("", "")

    def __init__(self) -> None:
        self.batch: dict[int, int] = {}

    def give(self, runs: Sequence[RunSpec]) -> None:
        """Start a batch. `take` detects a worker that has died."""
        raise NotImplementedError

    def take(self) -> list[Message]:
        """Wait for messages or the end of the worker, which clears `alive`."""
        raise NotImplementedError


class Crew:
    """Starts workers of one kind. Use as a context manager: leaving it ends every worker, at once after an error.

    Attributes:
        retries: how often a run whose worker died is tried again alone.
    """

    retries = 0

    def places(self, runs: Sequence[RunSpec]) -> int:
        """Number of workers that may work at once on these runs."""
        raise NotImplementedError

    def start(self) -> Worker:
        """A new worker."""
        raise NotImplementedError

    def wait(self, workers: Sequence[Worker]) -> list[Worker]:
        """Those that have a message or died, after at least one does or some time has passed."""
        raise NotImplementedError

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        raise NotImplementedError


class Processes(Crew):
    """Processes that train runs."""

    def __init__(self, cache: str, count: int, level: int, options: Mapping[str, Any]) -> None:
        self._arguments, self._count = (cache, level, dict(options)), count
        self._workers: list[Process] = []

    def places(self, runs: Sequence[RunSpec]) -> int:
        """The number of processes."""
        return self._count

    def start(self) -> Worker:
        """Start a process."""
        self._workers.append(Process(ChildProcess(serve, self._arguments, name="vaflow-ablate")))
        return self._workers[-1]

    def wait(self, workers: Sequence[Worker]) -> list[Worker]:
        """Wait for a message on a pipe, or for its end."""
        ready = wait([worker.pipe for worker in workers if isinstance(worker, Process)])
        return [worker for worker in workers if isinstance(worker, Process) and worker.pipe in ready]

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end(at_once=error[0] is not None)  # runs resume from their checkpoints: only an epoch is lost


class Process(Worker):
    """A process of `serve` and the pipe to it."""

    def __init__(self, child: ChildProcess) -> None:
        super().__init__()
        self._child, self.pipe = child, child.pipe

    def give(self, runs: Sequence[RunSpec]) -> None:
        """Send a batch."""
        try:
            self.pipe.send_bytes(json.dumps(documents_of(runs)).encode())
        except OSError:
            self.alive = False

    def take(self) -> list[Message]:
        """Wait for one message."""
        try:
            return [json.loads(self.pipe.recv_bytes())]
        except (EOFError, OSError):
            self.alive = False
            self._child.join()
            self.ending = ("ProcessEnded", f"The process of this run ended with {self._child.ending}")
            return []

    def end(self, *, at_once: bool) -> None:
        """Close the pipe and wait for the end of the process; `at_once`: kill it first."""
        self.pipe.close()
        if at_once:
            self._child.kill()
        self._child.join()


def serve(pipe: Connection, cache: str, level: int, options: Mapping[str, Any]) -> None:
    """Main function of the process: receives batches of runs, sends a message per ended run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)

    def send(message: Message) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    runner = Runner(open_cache(cache), on_choice=lambda text: send({"choice": text}), **options)
    with one_thread(level):
        while True:
            try:
                runs = runs_from(json.loads(pipe.recv_bytes()))
            except EOFError:
                return
            for number, ended in runner.train(runs):
                send({"number": number, "ended": asdict(ended)})
