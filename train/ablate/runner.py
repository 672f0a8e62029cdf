"""Train batches of runs on one cache: what every worker of a pool does, in whichever process it runs."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.train.ablate.statistics import moments_file, video_moments_of, write_moments
from vaflow.train.config import TrainConfig
from vaflow.train.runs import RunFolder
from vaflow.train.settings_files import from_toml, to_toml
from vaflow.train.together.epochs import FAILURES
from vaflow.train.together.runs import Trainer

Run = tuple[TrainConfig, Path]  # resolved settings and directory
Message = dict[str, Any]  # JSON: "number" and "ended" of a run, "choice" or "note" to print


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
    """Trains runs on one cache; the latest splits stay loaded.

    Args:
        cache: what to train on.
        moments: write the moments of each run per video, for the tables of a study.
        options: keyword arguments of `Trainer`.
    """

    def __init__(self, cache: Cache, *, moments: bool = False, **options: Any) -> None:
        self._cache, self._moments = cache, moments
        self._trainer = Trainer(cache, **options)

    def train(self, runs: Sequence[Run]) -> Iterator[tuple[int, Ended]]:
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


def documents_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The runs as JSON."""
    return [{"config": to_toml(config), "out": str(out)} for config, out in runs]


def runs_from(documents: Sequence[Mapping[str, str]]) -> list[Run]:
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

    def give(self, runs: Sequence[Run]) -> None:
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

    def places(self, runs: Sequence[Run]) -> int:
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
