"""One process that trains runs, one after the other, and keeps the data that the next one shares."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from vaflow.cache import Cache, open_cache
from vaflow.errors import VaflowError
from vaflow.train.ablate.plan import data_key
from vaflow.train.ablate.statistics import moments_file, video_moments_of, write_moments
from vaflow.train.builder import choose_device
from vaflow.train.config import TrainConfig, from_toml
from vaflow.train.inputs import resolve
from vaflow.train.runs import RunFolder
from vaflow.train.training import Data, load_data, train_run

# What a run may fail of while the others go on: bad data, a device that refuses, memory, a full disk.
FAILURES = (VaflowError, RuntimeError, MemoryError, OSError, ValueError)


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        seconds: that it took.
        score: its mean concordance; None where it failed, or nothing is labelled.
        error, message: the kind of error and what it says; empty: all went well.
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
    """Torch computes with one thread inside: light heads gain nothing from more, and sums do not depend on how many
    runs go on at once. The log says what is of `level` or above.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    runner = Runner(open_cache(cache), allow_missing=allow_missing)
    with one_thread(level):
        while True:
            try:
                message = receive(connection)
            except EOFError:
                return
            send(connection, asdict(runner.run(from_toml(message["config"]), Path(message["out"]))))


def _end_with_parent() -> None:
    """A killed parent must not leave writers behind: the next start would meet them in the same folders."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


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
