"""Decoding processes and the queue behind them. A worker that dies costs the clip it was reading, nothing else."""

import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from vaflow.extract.messages import Done, Failed, Job, Message
from vaflow.extract.worker import serve

QUEUED_MESSAGES = 64  # of at most a crop or a second of sound each: what bounds memory between decoding and encoding
POLL_SECONDS = 0.2


class _Worker:
    """One process, its pipe, and the job it is at."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of torch and FFmpeg
        ours, theirs = context.Pipe()
        self.pipe: Connection = ours
        self.process: BaseProcess = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()  # it holds nothing that must be tidied up, and does not listen to gentler signals
        self.process.join()
        self.pipe.close()


class WorkerPool:
    """Runs jobs on `count` processes and yields their messages, each job's in order.

    Use as a context manager: leaving it stops every process, whatever they are doing.
    """

    def __init__(self, jobs: Iterable[Job], count: int) -> None:
        self._jobs = iter(jobs)
        self._count = count
        self._queue: queue.Queue[Message | None] = queue.Queue(QUEUED_MESSAGES)
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

    def _read(self) -> None:
        """Thread: deal out jobs, collect messages; whatever goes wrong here is raised where messages are read."""
        # Workers inherit this: a Ctrl-C while they still start is not theirs to handle, either.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
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
            workers.append(_Worker())
            workers[-1].give(job)
            if len(workers) == self._count:
                break
        while workers and not self._stop.is_set():
            pipes = {worker.pipe: worker for worker in workers}
            for pipe in wait(list(pipes), POLL_SECONDS):
                self._take(pipes[pipe], workers)  # type: ignore[index]

    def _take(self, worker: _Worker, workers: list[_Worker]) -> None:
        """Pass one message on; when a job ends, give the worker the next one or let it go."""
        try:
            message: Message = worker.pipe.recv()
        except (EOFError, OSError):
            message = _death(worker)
            workers[workers.index(worker)] = worker = _replace(worker)
        self._put(message)
        if isinstance(message, Done | Failed):
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


def _replace(worker: _Worker) -> _Worker:
    worker.stop()
    return _Worker()


def _death(worker: _Worker) -> Failed:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    number = worker.job.number if worker.job else -1
    return Failed(
        number,
        "worker",
        "WorkerDied",
        f"The decoding process died ({how}) while it read this clip; other clips went on. "
        "A crash inside a decoder or too little memory are the usual causes: run again to retry.",
    )
