"""Decoding processes: the jobs and messages between them and the main process, and the pool that runs them.

If a process dies or hangs, only its clip fails; a new process takes the next one. `each` applies a function to many
files in such processes. Jobs and messages are plain data without torch or cache types.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Clip
from vaflow.encoders.preprocessing import Preparation, Prepared
from vaflow.errors import UsageError, VaflowError, explain
from vaflow.extract.config import ExtractConfig, default_workers, limit_memory, too_much_memory
from vaflow.extract.faces.detection import Cells
from vaflow.process import ChildProcess, listening
from vaflow.timeline import Grid

# Messages, each at most a crop or a second of audio: bounds the memory between decoding and encoding.
QUEUED_MESSAGES = 64
POLL_SECONDS = 0.2
ITEM_TIMEOUT = ExtractConfig.item_timeout
STARTING = 60.0  # seconds: least time until the first message of a new process
_LONGEST_TURN = 2.0  # seconds; longer intervals mean that this process was stopped or overloaded

Image = NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")
Send = Callable[[Any], None]  # sends a message
Ask = Callable[[int, Sequence[Image]], Sequence[Cells]]  # number of the job, prepared images -> cells of each
Work = Callable[[Any, Send, Ask], None]  # processes a job


@dataclass(frozen=True)
class StoredPerson:
    """A person whose crops a cache holds.

    Attributes:
        cache: its path or URL; item: the item with the crops.
        stream: a stream of images of that item, whose samples are those of the features.
        facts: members of the features' record.
    """

    cache: str
    item: str
    stream: str
    person: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One clip to read.

    Attributes:
        number: of the job; every message about it carries the number.
        audio, faces: which parts to read, besides the clock and the labels.
        person, identity: who is estimated, and the network that tells people apart, as in the settings.
        face_source: "auto" (crops where the clip has them, else detection), "centerface" or "none" (whole frames).
        preparations: the inputs that the visual encoders expect.
        keep_jpeg, keep_everyone: send the JPEG of every crop; of every face, where the clip shows several people.
        decode_on: the GPU that decodes frames; empty for PyAV.
        stored: read the crops of this person from a cache; no media file is read.
        ask: images per question to the parent's face detector; 0: the worker detects faces itself.
    """

    number: int
    clip: Clip
    grid: Grid
    audio: bool
    faces: bool
    face_source: str
    preparations: tuple[Preparation, ...]
    keep_jpeg: bool
    decode_on: str = ""
    ask: int = 0
    person: str = "largest"  # "all": everyone is read
    identity: str = "none"
    stored: StoredPerson | None = None
    keep_everyone: bool = False


@dataclass(frozen=True)
class Clock:
    """First message of a clip: its labels on its frame clock, and the identity of its sources.

    Attributes:
        labels: arrays of the labels stream (`vaflow.cache.schema.KINDS`).
        duration: seconds; last frame's presentation time plus the median interval.
        sources: part -> identity, for "video", "audio", "crops", "labels" where present.
        facts: further members of the labels record: frames, rows, rates, sizes.
        people: number -> labels of that person, and the members of their record that differ between people, if
            everyone is read and the person has labels.
        label_problem: why labels may not belong to the clip, of `vaflow.datasets.labels.clock_problem`.
    """

    job: int
    labels: dict[str, NDArray[Any]]
    duration: float
    sources: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    people: dict[int, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    label_problem: str = ""


@dataclass(frozen=True)
class AudioBlock:
    """The next block of the clip's audio: [n] float32, 16 kHz mono, without gaps from time 0."""

    job: int
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class AudioEnd:
    """End of the audio. `covered`: the (start, stop) seconds that came from the file; the rest are zeros."""

    job: int
    covered: tuple[tuple[float, float], ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Face:
    """The crop of one grid sample: preparation -> [size, size, 3], and its JPEG if it is kept.

    Crops of a person are sent in the order of their samples. `person`: number, if everyone is read, else 0.
    """

    job: int
    sample: int
    images: dict[Preparation, Prepared]
    jpeg: bytes | None
    person: int = 0


@dataclass(frozen=True)
class FaceCrop:
    """The JPEG of the next row of the faces stream; sent for every row or for none."""

    job: int
    jpeg: bytes


@dataclass(frozen=True)
class FacesEnd:
    """End of the crops.

    Attributes:
        frame: [T] 0-based video frame of every grid sample, with or without a face.
        everyone: arrays of the faces stream; None if the faces were not detected.
        people: number of people whose crops were sent, if everyone is read.
    """

    job: int
    frame: NDArray[np.int64]
    facts: dict[str, Any]
    everyone: dict[str, NDArray[Any]] | None = None
    people: int = 0


@dataclass(frozen=True)
class Detect:
    """Question to the parent's face detector: one image [h, w, 3] uint8, prepared for the network.

    Images of a question have one size and are sent one by one: a pipe takes small messages several times as fast.
    After the `last` one the worker only reads until the answer arrives, so that neither side blocks in `send`.
    """

    job: int
    image: Image
    last: bool


@dataclass(frozen=True)
class Done:
    """End of a clip: everything needed of it has been sent."""

    job: int


@dataclass(frozen=True)
class Failed:
    """The clip cannot be used. `stage` is one of open, labels, audio, faces, worker, encode or commit."""

    job: int
    stage: str
    error: str
    message: str

    @classmethod
    def by(cls, error: Exception, job: int, stage: str) -> "Failed":
        """The message for an error of a clip."""
        message = too_much_memory() if isinstance(error, MemoryError) else str(error) or repr(error)
        return cls(job, stage, type(error).__name__, message)


@dataclass(frozen=True)
class Alive:
    """Heartbeat of a worker; not forwarded by the pool."""

    job: int


Message = Clock | AudioBlock | AudioEnd | Face | FaceCrop | FacesEnd | Detect | Done | Failed


def serve(pipe: Connection, work: Work) -> None:
    """Process jobs until None arrives or the parent exits; the target of a decoding process.

    The pipe provides back-pressure: it holds little, so a process that is ahead waits in `send`.
    """

    def ask(job: int, images: Sequence[Image]) -> Sequence[Cells]:
        for number, image in enumerate(images, start=1):
            pipe.send(Detect(job, image, number == len(images)))
        cells: Sequence[Cells] = pipe.recv()  # nothing else can arrive: the parent gives jobs to idle processes only
        return cells

    limit_memory()
    with suppress(EOFError, ConnectionError):  # the parent was killed
        while (job := pipe.recv()) is not None:
            pipe.send(Alive(job.number))
            with listening(partial(pipe.send, Alive(job.number))):
                work(job, pipe.send, ask)


class _Worker:
    """A decoding process and the job it works on. One thread reads the pipe; another one may answer on it.

    Attributes:
        silence: seconds without a message while we listened.
        started: whether any message has arrived; waiting: whether it waits for an answer of the parent.
    """

    def __init__(self, work: Work) -> None:
        self.process = ChildProcess(serve, (work,), name="vaflow-decode")
        self.pipe = self.process.pipe
        self.job: Any = None
        self.silence = 0.0
        self.started = self.waiting = False
        self._open = threading.Lock()  # held while sending: the pipe is not closed and its descriptor not reused

    def give(self, job: Any) -> None:
        self.job = job
        self.send(job)

    def send(self, message: Any) -> None:
        self.silence, self.waiting = 0.0, False
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
        work: function that processes a job, importable by name.
        item_timeout: seconds; 0: however long it takes.
    """

    def __init__(self, jobs: Iterable[Any], count: int, work: Work, *, item_timeout: float = ITEM_TIMEOUT) -> None:
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

    def answer(self, job: int, cells: Sequence[Cells]) -> None:
        """Answer a `Detect` with the likely cells of each image. Does not wait for the worker, which reads."""
        if (worker := self._asking.pop(job, None)) is not None:  # one that has died needs no answer
            worker.send(cells)

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
        while len(workers) < self._count and self._start(workers):
            pass
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
                elif not worker.waiting:
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
            if (job := next(self._jobs, None)) is not None:
                worker.give(job)
            else:
                workers.remove(worker)
                worker.stop()

    def _wait_for(self, worker: _Worker, seconds: float, workers: list[_Worker]) -> None:
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
        self._asking.pop(worker.job.number, None)
        workers.remove(worker)
        worker.stop()
        self._put(Failed(worker.job.number, "worker", error, f"The decoding process {what}"))
        self._start(workers)

    def _start(self, workers: list[_Worker]) -> bool:
        """Start a worker on the next job; return False if there is none."""
        if (job := next(self._jobs, None)) is None:
            return False
        workers.append(_Worker(self._work))
        workers[-1].give(job)
        return True

    def _put(self, message: Message | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(message, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return


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
    calls = (Call(number, function, item) for number, item in enumerate(items))
    count = min(workers or default_workers("cuda"), len(items))
    with WorkerPool(calls, count, call, item_timeout=item_timeout) as pool:
        for message in pool:
            if isinstance(message, Failed | Returned):
                yield message.job, message if isinstance(message, Failed) else message.result


def call(job: Call, send: Send, _: object = None) -> None:
    """Make the call; runs in a decoding process."""
    try:
        send(Returned(job.number, job.function(job.argument)))
    except (VaflowError, OSError, MemoryError) as error:
        send(Failed.by(error, job.number, "worker"))
    else:
        send(Done(job.number))
