"""`--engine ray` of `ablate` and `search`: workers of a pool as Ray actors, one per GPU or CPU, on every node."""

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

from vaflow.cache import Cache, open_cache
from vaflow.errors import UsageError, VaflowError, explain
from vaflow.files import lock_folder, write_file
from vaflow.ray_cluster import Notes, connected, import_ray, starts_here
from vaflow.train.ablate.workers import Crew, Message, Run, Runner, Worker, documents_of, runs_from
from vaflow.train.together import one_thread

log = logging.getLogger(__name__)

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
        address: as `vaflow.ray_cluster.connected` takes it.

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

    def places(self, runs: Sequence[Run]) -> int:
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

    def give(self, runs: Sequence[Run]) -> None:
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


class Shared:
    """What every node must see alike.

    Args:
        cache: path or URL.
        contents: of the cache, as `contents` lists them.
        token, text: a file in the folder of the runs, and what it holds.
    """

    def __init__(self, cache: str, contents: Mapping[str, object], token: str, text: str) -> None:
        self.cache, self.contents, self.token, self.text = cache, contents, token, text

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

    def _train(self, runs: Sequence[Run]) -> None:
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
