"""Workers of a pool as processes on this machine."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

from vaflow.cache import open_cache
from vaflow.process import ChildProcess
from vaflow.train.ablate.runner import Crew, Message, Run, Runner, Worker, documents_of, runs_from
from vaflow.train.together.runs import one_thread


class Processes(Crew):
    """Processes that train runs.

    Args:
        cache: path or URL.
        count: how many.
        level: of log lines that are shown while runs go on.
        options: keyword arguments of `Runner`.
    """

    def __init__(self, cache: str, count: int, level: int, options: Mapping[str, Any]) -> None:
        self._arguments, self._count = (cache, level, dict(options)), count
        self._workers: list[Process] = []

    def places(self, runs: Sequence[Run]) -> int:
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

    def give(self, runs: Sequence[Run]) -> None:
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
