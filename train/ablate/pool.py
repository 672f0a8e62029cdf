"""Train the runs of a study or a search in this process, in several, or on a Ray cluster.

Each worker trains runs one after the other, or several together, and keeps the data that the next run shares. A worker
that dies fails only its run, or none if another worker may try it again. With `--engine ray`, the workers are Ray
actors, one per GPU or CPU, on every node.
"""

import logging
import os
import queue
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from vaflow.cache import Cache, open_cache
from vaflow.errors import UsageError, VaflowError, explain
from vaflow.files import lock_folder, write_file
from vaflow.process import Notes, check_engine, connected, import_ray, starts_here
from vaflow.train.ablate.tables import ScheduledRun
from vaflow.train.ablate.workers import (
    Crew,
    Ended,
    Message,
    Processes,
    Runner,
    RunSpec,
    Worker,
    documents_of,
    runs_from,
)
from vaflow.train.repeats import batches_of, check_mode, one_thread

log = logging.getLogger(__name__)

RUNS = "runs"  # the folder of runs below the study's
STILLBORN = 3  # workers in a row that may die before they train; then the study ends


@dataclass(frozen=True)
class Outcome:
    """A run that has ended, and its outcome."""

    run: ScheduledRun
    ended: Ended


class Pool:
    """Workers that train runs, from the first batch until the end of the context.

    Args:
        processes: how many at once; 1: in this process. With Ray, the most; None: as many as the cluster has room for.
        engine: "local" or "ray".
        ray_address: of the cluster, as `ray.init` takes it.
        level: of log lines that are shown while runs go on.
        on_choice: called with a line about each batch that was timed.
    """

    def __init__(
        self,
        cache: Cache,
        out: Path,
        *,
        processes: int | None = None,
        engine: str = "local",
        ray_address: str | None = None,
        level: int = logging.ERROR,
        together: str = "auto",
        on_choice: Callable[[str], None] = log.info,
        **options: Any,
    ) -> None:
        check_engine(engine, ray_address)
        self._together, self._on_choice, self._level = check_mode(together), on_choice, level
        options["together"] = together
        self._runner: Runner | None = None
        self._crew: Crew | None = None
        if engine == "ray":
            self._crew = RayActors(cache, out, processes, level, options, ray_address)
        elif (processes or 1) > 1:
            self._crew = Processes(cache.place, processes or 1, level, options)
        else:
            self._runner = Runner(cache, on_choice=on_choice, **options)
        self._workers: list[Worker] = []
        self._stillborn = 0

    def __enter__(self) -> "Pool":
        self._stack = ExitStack()
        self._stack.enter_context(one_thread(self._level) if self._crew is None else self._crew)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def train(self, runs: Sequence[RunSpec]) -> Generator[tuple[int, Ended], None, None]:
        """Train runs; yields the number and the outcome of each as it ends.

        Raises:
            UsageError: a node of the cluster cannot reach the cache or the folder.
            VaflowError: workers die before they train.
        """
        batches = [[number] for number in range(len(runs))]
        if self._together != "never":
            places = 1 if self._crew is None else self._crew.places(runs)
            batches = batches_of(range(len(runs)), lambda number: runs[number][0], places)
        if self._runner is not None:
            for batch in batches:
                for place, ended in self._runner.train([runs[number] for number in batch]):
                    yield batch[place], ended
        elif self._crew is not None:
            yield from self._train_on(self._crew, runs, deque(batches))

    def _train_on(
        self, crew: Crew, runs: Sequence[RunSpec], waiting: deque[list[int]]
    ) -> Generator[tuple[int, Ended], None, None]:
        deaths: Counter[int] = Counter()
        while waiting or any(worker.batch for worker in self._workers):
            useful = len(waiting) + sum(bool(worker.batch) for worker in self._workers)
            while len(self._workers) < min(crew.places(runs), useful):
                self._workers.append(crew.start())
            for worker in self._workers:
                if worker.ready and not worker.batch and waiting:
                    batch = waiting.popleft()
                    worker.batch = dict(enumerate(batch))
                    worker.give([runs[number] for number in batch])
            for worker in crew.wait([worker for worker in self._workers if worker.batch or not worker.ready]):
                for message in worker.take():
                    if "choice" in message:
                        self._on_choice(message["choice"])
                    if "note" in message:
                        log.warning("%s", message["note"])
                    if "number" in message:
                        self._stillborn = 0
                        yield worker.batch.pop(message["number"]), Ended(**message["ended"])
                if not worker.alive:
                    self._workers.remove(worker)
                    yield from self._lost(worker, crew, deaths, waiting)

    def _lost(
        self, worker: Worker, crew: Crew, deaths: Counter[int], waiting: deque[list[int]]
    ) -> Generator[tuple[int, Ended], None, None]:
        """Handle a worker that died: its runs are tried again alone, or fail."""
        error, message = worker.ending
        if not worker.batch:
            self._stillborn += 1
            if self._stillborn >= STILLBORN:
                remedy = "See Ray's logs in /tmp/ray/session_latest/logs; too little memory is the usual cause"
                raise VaflowError(explain("Workers died before they trained", got=message, remedy=remedy))
        alone = len(worker.batch) == 1  # of a larger batch, it is unknown which run ended the process
        for number in worker.batch.values():
            deaths[number] += alone
            if deaths[number] > crew.retries:
                yield number, Ended(error=error, message=message)
            else:
                waiting.append([number])


def run_all(
    runs: Sequence[ScheduledRun],
    cache: Cache,
    out: Path,
    *,
    processes: int | None = None,
    engine: str = "local",
    **options: Any,
) -> Generator[Outcome, None, None]:
    """Train every run in `out/runs/<hash>`, and yield each outcome as its run ends."""
    if not runs:
        return
    if engine == "local":
        processes = min(processes or 1, len(runs))
    with Pool(cache, out, processes=processes, engine=engine, moments=True, **options) as pool:
        for number, ended in pool.train([(run.config, out / RUNS / run.key) for run in runs]):
            yield Outcome(runs[number], ended)


ATTEMPTS = 3  # attempts per run whose actor died
ANSWER_SECONDS = 1.0  # after which an actor answers even if nothing has happened
LOOK_SECONDS = 10.0  # between checks for nodes that have joined
HINT_SECONDS = 60.0  # without a ready actor; then a hint is logged
LOCK_SECONDS = 60.0  # wait for the process of a dead node to release its run
DEVICES = ("auto", "cpu", "cuda")


class RayActors(Crew):
    """Actors on the nodes of a cluster.

    Args:
        cache: what to train on; every node must reach it under this path or URL.
        out: folder of all runs, likewise.
        count: the most actors; None: one per GPU, or per CPU of a cluster without GPUs.
        address: as `vaflow.process.connected` takes it.

    Raises:
        UsageError: Ray is not installed, or the cache is in memory.
    """

    retries = ATTEMPTS - 1

    def __init__(
        self, cache: Cache, out: Path, count: int | None, level: int, options: Mapping[str, Any], address: str | None
    ) -> None:
        if str(cache.place).startswith("memory:"):
            got, remedy = cache.place, "Use a folder or a bucket"
            raise UsageError(explain("A cache in memory belongs to one process", got=got, remedy=remedy))
        self._ray = import_ray(loopback=starts_here(address))
        self._cache, self._out, self._count, self._address = cache, out.absolute(), count, address
        self._level, self._options = level, dict(options)
        self._gpus = 0
        self._actors: list[Any] = []
        self._begun = time.monotonic()

    def __enter__(self) -> "RayActors":
        self._stack = ExitStack()
        self._stack.enter_context(connected(self._ray, self._address))
        self._out.mkdir(parents=True, exist_ok=True)
        self._token, text = self._out / f".ray-{token_hex(8)}", token_hex(16)
        self._stack.callback(self._token.unlink, missing_ok=True)
        write_file(self._token, text)
        place = str(self._cache.path.absolute()) if self._cache.layout.remote is None else str(self._cache.place)
        shared = Shared(place, contents(self._cache), str(self._token), text)
        self._arguments = (shared, self._level, self._options)
        return self

    def __exit__(self, *error: Any) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._stack.__exit__(*error)

    def places(self, runs: Sequence[RunSpec]) -> int:
        """One actor per GPU, or per CPU of a cluster without GPUs: a run trains with one thread.

        Raises:
            UsageError: a run names one GPU.
            VaflowError: a run needs a GPU and no node has one, or no node has a CPU.
        """
        devices = {config.device for config, _ in runs}
        if devices - set(DEVICES):
            got, remedy = sorted(devices - set(DEVICES))[0], "Ray assigns the GPUs: remove the number"
            raise UsageError(explain("--engine ray takes the device auto, cpu or cuda", got=got, remedy=remedy))
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = 0 if devices == {"cpu"} else sum(int(node.get("GPU", 0)) for node in nodes)
        if "cuda" in devices and not gpus:
            remedy = "Use --device cpu (ablate: --set device=cpu)"
            raise VaflowError(explain("No node of the Ray cluster has a GPU", expected="a GPU", remedy=remedy))
        places = gpus or sum(int(node.get("CPU", 0)) for node in nodes)
        if not places:
            raise VaflowError(explain("No node of the Ray cluster has a CPU", got=f"{len(nodes)} nodes"))
        self._gpus = min(gpus, 1)
        return min(places, self._count or places)

    def start(self) -> Worker:
        """Create an actor; it becomes ready once Ray has placed it on a node that reaches the shared folders."""
        actor = self._ray.remote(Member).options(num_cpus=1, num_gpus=self._gpus, max_restarts=0)
        self._actors.append(actor.remote(*self._arguments))
        return RayWorker(self._ray, self._actors[-1])

    def wait(self, workers: Sequence[Worker]) -> list[Worker]:
        """Wait for an answer."""
        calls = {worker.call: worker for worker in workers if isinstance(worker, RayWorker)}
        answered, _ = self._ray.wait(list(calls), num_returns=1, timeout=LOOK_SECONDS)
        now = time.monotonic()
        if any(worker.ready for worker in workers):
            self._begun = now
        elif now - self._begun > HINT_SECONDS:
            self._begun = now
            log.warning("No Ray actor is ready yet; `ray status` lists the free resources of the cluster")
        return [calls[call] for call in answered]


class RayWorker(Worker):
    """The driver's side of an actor.

    Attributes:
        call: the pending call, of which there is always one.
    """

    ready = False

    def __init__(self, ray: Any, actor: Any) -> None:
        super().__init__()
        self._ray, self._actor = ray, actor
        self.call = actor.prepare.remote()

    def give(self, runs: Sequence[RunSpec]) -> None:
        """Send a batch."""
        self.call = self._actor.exchange.remote(documents_of([(config, out.absolute()) for config, out in runs]))

    def take(self) -> list[Message]:
        """The messages of an answer; asks for the next ones.

        Raises:
            UsageError: the node of the actor cannot reach the cache or the folder.
        """
        try:
            messages: list[Message] = self._ray.get(self.call)
        except self._ray.exceptions.RayTaskError:  # an error in this package, not a death
            raise
        except self._ray.exceptions.RayError as error:
            self.alive = False
            self._ray.kill(self._actor)  # it may still be running but unreachable
            why = str(error).strip().partition("\n")[0]
            text = f"The Ray actor of this run died {ATTEMPTS} times ({why}). Run again to retry."
            self.ending = ("ActorDied", text)
            log.warning("A Ray actor died with %d runs in progress: %s", len(self.batch), why)
            return []
        if not self.ready:
            if messages:
                raise UsageError(messages[0]["refused"])
            self.ready = True
        elif len(self.batch) > sum("number" in message for message in messages):
            self.call = self._actor.exchange.remote([])
        return messages


@dataclass(frozen=True)
class Shared:
    """The cache and its contents, a file in the folder of the runs and its text, which every node must see alike."""

    cache: str
    contents: Mapping[str, object]
    token: str
    text: str

    def open(self) -> Cache:
        """The cache, as this node sees it.

        Raises:
            UsageError: it is another cache, or the folder of the runs is another folder.
        """
        node, folder = socket.gethostname(), Path(self.token).parent
        remedy = "Put it on a disk that all nodes mount under the same path"
        try:
            shared = Path(self.token).read_text("utf-8") == self.text and os.access(folder, os.W_OK)
        except OSError:
            shared = False
        if not shared:
            raise UsageError(explain(f"Node {node} cannot write to {folder} of the driver", remedy=remedy))
        try:
            cache = open_cache(self.cache)
            equal = contents(cache) == self.contents
        except VaflowError:
            equal = False
        if not equal:
            remedy += ", or in a bucket"
            raise UsageError(explain(f"Node {node} does not see the cache {self.cache}", remedy=remedy))
        return cache


def contents(cache: Cache) -> dict[str, object]:
    """Fingerprints of the streams, and the clips."""
    return {"streams": {name: cache.fingerprint(name) for name in cache.streams()}, "items": cache.items()}


class Member:
    """Code of an actor: trains batches of runs in a thread, so that it can answer meanwhile. Does not import Ray."""

    def __init__(self, shared: Shared, level: int, options: Mapping[str, Any]) -> None:
        self._shared, self._level, self._options = shared, level, options
        self._news: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._notes = Notes(logging.NOTSET)

    def prepare(self) -> list[Message]:
        """Open the cache; returns nothing, or why this node cannot train."""
        logging.getLogger("vaflow").addHandler(self._notes)
        try:
            cache = self._shared.open()
        except UsageError as error:
            return [{"refused": str(error)}]
        self._runner = Runner(cache, on_choice=lambda text: self._news.put({"choice": text}), **self._options)
        return []

    def exchange(self, documents: Sequence[Mapping[str, str]]) -> list[Message]:
        """Start a batch of runs, if any; return messages, after waiting for the first. Unexpected errors are raised."""
        if documents:
            threading.Thread(target=self._train, args=(runs_from(documents),), name="vaflow-runs", daemon=True).start()
        messages: list[Message] = []
        try:
            messages.append(self._news.get(timeout=ANSWER_SECONDS))
            while True:
                messages.append(self._news.get_nowait())
        except queue.Empty:
            pass
        if self._error is not None:
            raise self._error
        return [*({"note": note} for note in self._notes.collect()), *messages]

    def _train(self, runs: Sequence[RunSpec]) -> None:
        try:
            for _, out in runs:
                wait_for_lock(out)
            with one_thread(self._level):  # torch counts its threads per calling thread
                for number, ended in self._runner.train(runs):
                    self._news.put({"number": number, "ended": asdict(ended)})
        except BaseException as error:  # noqa: BLE001 - handed over whole to whoever reads the messages
            self._error = error
            self._news.put({})


def wait_for_lock(out: Path) -> None:
    """Wait until no process writes to a run: the processes of a dead node end some seconds after Ray has noticed."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            with lock_folder(out, "vaflow train"):
                return
        except UsageError:
            time.sleep(0.5)
