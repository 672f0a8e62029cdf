"""Pool of decoding processes. If a worker dies or hangs, only its clip fails; a new worker takes the next one.

`each` applies a function to many files in such processes: a crash or a hang fails that file only.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar

from vaflow.errors import UsageError, VaflowError, explain
from vaflow.extract.config import ExtractConfig, default_workers
from vaflow.extract.messages import Alive, Detect, Detected, Done, Failed, Job, Message
from vaflow.extract.worker import serve
from vaflow.process import ChildProcess

# Messages, each at most a crop or a second of audio: bounds the memory between decoding and encoding.
QUEUED_MESSAGES = 64
POLL_SECONDS = 0.2
ITEM_TIMEOUT = ExtractConfig.item_timeout
STARTING = 60.0  # seconds: least time until the first message of a new process
_LONGEST_TURN = 2.0  # seconds; longer intervals mean that this process was stopped or overloaded

Work = Callable[[Any, Callable[[Any], None]], None]  # processes a job, sending messages


class _Worker:
    """A decoding process and the job it works on. One thread reads the pipe; another one may answer on it.

    Attributes:
        silence: seconds without a message while we listened.
        started: whether any message has arrived; waiting: whether it waits for an answer of the parent.
    """

    def __init__(self, work: Work | None) -> None:
        self.process = ChildProcess(serve, () if work is None else (work,), name="vaflow-decode")
        self.pipe = self.process.pipe
        self.job: Job | None = None
        self.silence = 0.0
        self.started = self.waiting = False
        self._open = threading.Lock()  # held while sending: the pipe is not closed and its descriptor not reused

    @property
    def number(self) -> int:
        return self.job.number if self.job else -1

    def give(self, job: Job) -> None:
        self.job, self.silence = job, 0.0
        self._send(job)

    def answer(self, answer: Detected) -> None:
        self.silence, self.waiting = 0.0, False
        self._send(answer)

    def _send(self, message: Job | Detected) -> None:
        with self._open, suppress(OSError):  # the death of a process is detected where its pipe is read
            self.pipe.send(message)

    def stop(self) -> None:
        self.process.kill()
        with self._open:  # a thread blocked in `send` returned when the process ended
            self.pipe.close()


class WorkerPool:
    """Runs jobs on `count` processes and yields their messages, each job's in order.

    A worker without a message for `item_timeout` seconds is killed, and its job fails. Three kinds of waiting do not
    count: for the parent to read the pipe, for the consumer to take messages, and for an `answer`.

    Use as a context manager: leaving it kills every process.

    Args:
        jobs: what to do, each with a `number` of its own; asked for when a worker is free.
        item_timeout: seconds; 0: however long it takes.
        work: function that processes a job, importable by name; by default, it reads a clip.
    """

    def __init__(
        self, jobs: Iterable[Any], count: int, *, item_timeout: float = ITEM_TIMEOUT, work: Work | None = None
    ) -> None:
        self._jobs = iter(jobs)
        self._count = count
        self._timeout = item_timeout
        self._work = work
        self._queue: queue.Queue[Message | None] = queue.Queue(QUEUED_MESSAGES)
        self._asking: dict[int, _Worker] = {}  # by number of the job
        self._stop = threading.Event()
        self._broken: BaseException | None = None
        self._reader = threading.Thread(target=self._read, name="vaflow-reader", daemon=True)

    def __enter__(self) -> "WorkerPool":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._reader.join()

    def __iter__(self) -> Iterator[Message]:
        while (message := self._queue.get()) is not None:
            yield message
        if self._broken is not None:
            raise self._broken

    def answer(self, answer: Detected) -> None:
        """Answer a worker's `Detect`. Does not wait for the worker, which reads; one that has died needs none."""
        worker = self._asking.pop(answer.job, None)
        if worker is not None:
            worker.answer(answer)

    def _read(self) -> None:
        """Thread that assigns jobs and collects messages; its errors are raised where messages are read."""
        workers: list[_Worker] = []
        try:
            self._serve(workers)
        except BaseException as error:  # noqa: BLE001 - handed over whole to the consumer's thread
            self._broken = error
        finally:
            for worker in workers:
                worker.stop()
            self._put(None)

    def _serve(self, workers: list[_Worker]) -> None:
        for job in self._jobs:
            workers.append(_Worker(self._work))
            workers[-1].give(job)
            if len(workers) == self._count:
                break
        before = time.monotonic()
        while workers and not self._stop.is_set():
            pipes = {worker.pipe: worker for worker in workers}
            ready = [pipes[pipe] for pipe in wait(list(pipes), POLL_SECONDS)]  # type: ignore[index]
            now = time.monotonic()
            turn, before = min(now - before, _LONGEST_TURN), now
            for worker in pipes.values():
                if worker in ready:
                    worker.silence, worker.started = 0.0, True
                    self._take(worker, workers)
                else:
                    self._wait_for(worker, turn, workers)

    def _take(self, worker: _Worker, workers: list[_Worker]) -> None:
        """Forward one message; when a job ends, give the worker the next one or release it."""
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            if worker.process.ran_script_again:
                problem = "The script calls vaflow at its top level, and every decoding process imports the script"
                remedy = 'Put the calls into a function, and call it below `if __name__ == "__main__":`'
                raise UsageError(explain(problem, remedy=remedy)) from None
            what = f"died ({worker.process.ending}) while it read this clip; other clips are not affected. "
            causes = "Usual causes are a crash of the decoder and too little memory. Run again to retry."
            self._lose(worker, workers, "WorkerDied", what + causes)
            return
        if isinstance(message, Alive):
            return
        if isinstance(message, Detect) and message.last:
            worker.waiting = True
            self._asking[message.job] = worker
        self._put(message)
        if isinstance(message, Done | Failed):
            self._next(worker, workers)

    def _wait_for(self, worker: _Worker, seconds: float, workers: list[_Worker]) -> None:
        if worker.waiting:
            return
        worker.silence += seconds
        patience = self._timeout if worker.started else max(self._timeout, STARTING)
        if self._timeout and worker.silence >= patience:
            what = f"sent no message for {worker.silence:.0f} s while it read this clip, and was ended; "
            causes = (
                "other clips are not affected. Usual causes are a damaged file and a stalled disk: check the file, "
                "or run again with a longer --item-timeout."
            )
            self._lose(worker, workers, "WorkerHung", what + causes)

    def _lose(self, worker: _Worker, workers: list[_Worker], error: str, what: str) -> None:
        """Fail the job of a worker that died or stalled; start a new worker if jobs are left."""
        self._asking.pop(worker.number, None)
        worker.stop()
        self._put(Failed(worker.number, "worker", error, f"The decoding process {what}"))
        job = next(self._jobs, None)
        if job is None:
            workers.remove(worker)
        else:
            workers[workers.index(worker)] = worker = _Worker(self._work)
            worker.give(job)

    def _next(self, worker: _Worker, workers: list[_Worker]) -> None:
        job = next(self._jobs, None)
        if job is not None:
            worker.give(job)
        else:
            workers.remove(worker)
            worker.stop()

    def _put(self, message: Message | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(message, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """One call: `function(argument)`."""

    number: int
    function: Callable[[Any], Any]
    argument: Any


@dataclass(frozen=True)
class Returned:
    """Result of a call."""

    job: int
    result: Any


def each(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 0, item_timeout: float = ITEM_TIMEOUT
) -> Iterator[tuple[int, Result | Failed]]:
    """(index of the item, result of the function or its failure), as results arrive.

    Args:
        function: importable by name, or a `partial` of such. Errors of this package, of the system and of memory are
            failures of the item, as are crashes and hangs. Its result is sent between processes.
        workers: processes; 0 chooses by machine.
        item_timeout: seconds without a message after which an item has failed; 0: no limit.
    """
    if not items:
        return
    calls = (Call(number, function, item) for number, item in enumerate(items))
    count = min(workers or default_workers("cuda"), len(items))
    with WorkerPool(calls, count, item_timeout=item_timeout, work=call) as pool:
        for message in pool:
            if isinstance(message, Failed):
                yield message.job, message
            elif isinstance(message, Returned):
                yield message.job, message.result


def call(job: Call, send: Callable[[Any], None]) -> None:
    """Make the call; runs in a decoding process."""
    try:
        send(Returned(job.number, job.function(job.argument)))
    except (VaflowError, OSError, MemoryError) as error:
        send(Failed.by(error, job.number, "worker"))
    else:
        send(Done(job.number))
