"""`--engine ray`: the local extraction loop in one Ray actor per GPU (or per few CPUs), on every node of a cluster.

The driver (`Team`) holds the queue, longest item first. An actor (`Member`) gets a task whenever one of its decoders is
about to be free, so fast nodes do more. If a member dies, only the tasks that it was given and has not committed are
lost. They are tried again one by one at the end, and listed as failures if that does not help.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vaflow.cache import Cache, create_cache
from vaflow.cache.costs import Cost
from vaflow.cache.schema import FACES, StreamInfo
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip
from vaflow.device import choose_device
from vaflow.errors import UsageError, VaflowError, explain
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.encoding import Encoders, build_encoders, make_encoders
from vaflow.extract.loop import Extraction
from vaflow.extract.plan import Extracted, Outcome, OutcomeRecorder, PendingClip, Summary, carry_out, make_plan
from vaflow.extract.streams import prepare
from vaflow.extract.video import require_nvdec
from vaflow.files import Failure
from vaflow.process import Notes, connected, import_ray, starts_here

logger = logging.getLogger(__name__)

CPUS_PER_MEMBER = 4  # without a GPU: half of them decode
LOOKAHEAD = 1  # tasks queued at a member, so that its decoders stay busy
ATTEMPTS = 3  # attempts per item whose member died: the first one, and two alone
STILLBORN = 3  # members in a row that may die before they are ready; then the extraction ends
LOOK_SECONDS = 10.0  # between checks for nodes that have joined
HINT_SECONDS = 60.0  # without a ready member; then a hint is logged
ANSWER_SECONDS = 1.0  # after which a report is returned even if nothing has happened


@dataclass(frozen=True)
class Prepared:
    """A member is ready, with the streams that it makes; or the error that prevents it."""

    infos: dict[str, StreamInfo] | None
    error: Exception | None = None


@dataclass(frozen=True)
class Report:
    """Changes since the last report.

    Attributes:
        outcomes: of tasks that have ended.
        waiting: tasks that were received and not started.
        ended: every task received has ended, and `last` was set.
        rows, stages: since the member was created, as `Summary.encoded` and `Summary.stages`.
        notes: warnings for the driver's log.
        error: what ended the member's work.
        costs: since the member was created, as `Summary.costs`.
    """

    outcomes: tuple[Outcome, ...]
    waiting: int
    ended: bool
    rows: dict[str, int]
    stages: dict[str, float]
    notes: tuple[str, ...]
    error: Exception | None
    costs: dict[str, Cost] = field(default_factory=dict)


class Member:
    """Encodes tasks into a cache to which other members write as well.

    Args:
        out: the cache's absolute path, or its URL.
        config: settings of the run; device "auto" is the GPU that Ray assigned, if any.
    """

    def __init__(self, out: str, store: str, config: ExtractConfig, workers: int) -> None:
        self._out, self._store, self._config, self._workers = out, store, config, workers
        self._news: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()  # None: another part of the state changed
        self._tasks: queue.SimpleQueue[PendingClip | None] | None = None  # of the current run; None ends it
        self._closed = self._ended = False
        self._error: BaseException | None = None
        self._stages: dict[str, float] = {}
        self._past: dict[str, float] = {}  # stages of earlier runs
        self._costs: dict[str, Cost] = {}
        self._past_costs: dict[str, Cost] = {}
        self._notes = Notes()

    def prepare(self) -> Prepared:
        """Load the encoders and compare the streams with those of the cache."""
        logging.getLogger("vaflow").addHandler(self._notes)
        try:
            device = choose_device(self._config.device)
            if self._config.decoder == "nvdec":
                require_nvdec(str(device))
            visual, audio = build_encoders(self._config, device)
            self._cache: Cache = create_cache(Path(self._out), store=self._store)
            self._streams = prepare(self._cache, self._config, visual, audio)
        except (VaflowError, OSError) as error:
            return Prepared(None, error)
        self._encoders: Encoders = make_encoders(self._config, device, visual, audio)
        return Prepared(self._streams.infos)

    def exchange(self, tasks: Sequence[PendingClip], last: bool) -> Report:
        """Take tasks, wait for changes, report them. Unexpected errors are raised, with their traceback.

        Args:
            last: no further tasks come until these have ended.
        """
        if self._tasks is None:
            self._tasks, self._closed, self._ended = queue.SimpleQueue(), False, False
            self._past, self._past_costs = dict(self._stages), dict(self._costs)
            threading.Thread(target=self._work, args=(self._tasks,), name="vaflow-run", daemon=True).start()
        waiting = self._tasks
        for task in tasks:
            waiting.put(task)
        if last and not self._closed:
            self._closed = True
            waiting.put(None)
        outcomes = self._read_news(ANSWER_SECONDS)
        if ended := self._ended:
            outcomes += self._read_news(0)  # outcomes that arrived before the end
            self._tasks = None
        if self._error is not None and not isinstance(self._error, VaflowError | OSError):
            raise self._error
        rows = {name: batcher.rows for name, batcher in self._encoders.batchers.items()}
        notes = self._notes.collect()
        stages, costs = dict(self._stages), dict(self._costs)
        return Report(tuple(outcomes), waiting.qsize(), ended, rows, stages, notes, self._error, costs)

    def _work(self, tasks: "queue.SimpleQueue[PendingClip | None]") -> None:
        """Run the extraction loop, in its own thread."""

        def arriving() -> Iterator[PendingClip]:
            while (task := tasks.get()) is not None:
                self._news.put(None)  # there is room for another task
                yield task

        try:
            Extraction(self._cache, self._config, self._streams, self._encoders, self._workers, self).run(arriving())
        except BaseException as error:  # noqa: BLE001 - handed over whole to whoever reads the report
            self._error = error
        finally:
            self._ended = True
            self._news.put(None)

    def take(self, outcome: Outcome) -> None:
        """Outcome of an item, from the run."""
        self._news.put(outcome)

    def progress(self, item: str, share: float) -> None:
        """Not reported: the driver counts whole items."""

    def count(self, rows: Mapping[str, int], stages: Mapping[str, float], costs: Mapping[str, Cost]) -> None:
        """Seconds per stage and costs per stream, from the run."""
        self._stages, self._costs = _sum((self._past, stages)), _sum((self._past_costs, costs))

    def _read_news(self, seconds: float) -> list[Outcome]:
        """All outcomes so far; waits for the first."""
        outcomes: list[Outcome] = []
        try:
            news = self._news.get(timeout=seconds) if seconds else self._news.get_nowait()
            while True:
                outcomes += [news] if news is not None else []
                news = self._news.get_nowait()
        except queue.Empty:
            return outcomes


def extract_on_ray(
    dataset: Dataset,
    out: Path,
    config: ExtractConfig,
    *,
    store: str = "zarr",
    shard: Shard | None = None,
    rehash: bool = False,
    address: str | None = None,
    show_progress: bool = False,
) -> Summary:
    """As `vaflow.extract.pipeline.extract`, on every node of a Ray cluster.

    Every node must see the data set, the weights and the cache under the same paths (or the cache under one URL), and
    have the same versions installed: another decoder is another fingerprint, which is refused.

    Args:
        address: as `ray.init` takes it: None joins the cluster of RAY_ADDRESS, or else starts Ray here, which listens
            on this machine only; "local" always does that; "auto", "HOST:PORT" and "ray://HOST:PORT" join.

    Raises:
        UsageError: Ray is not installed or cannot be reached, or an option cannot be meant for many machines.
        FingerprintError, WeightsError, CacheError: as the local engine.
    """
    if config.device not in ("auto", "cpu", "cuda"):
        got, remedy = config.device, "Ray assigns the GPUs: remove the number"
        raise UsageError(explain("--engine ray takes --device auto, cpu or cuda", got=got, remedy=remedy))
    if str(out).startswith("memory:"):
        problem, remedy = "A cache in memory belongs to one process", "Use a folder or a bucket"
        raise UsageError(explain(problem, got=out, remedy=remedy))
    ray = import_ray(loopback=starts_here(address))
    dataset = replace(dataset, clips=tuple(_absolute(clip) for clip in dataset.clips))
    weights = {name: path.absolute() for name, path in config.weights.items()}
    config = replace(config, weights=weights, prompts=config.prompts.absolute() if config.prompts else None)
    cache = create_cache(out, store=store)
    with connected(ray, address), Team(ray, cache, config, len(dataset.clips)) as team:
        infos = team.infos()
        return carry_out(cache, infos, dataset, shard or Shard(), team.work, rehash=rehash, show_progress=show_progress)


@dataclass(frozen=True)
class Places:
    """Number of members that fit into a cluster, and the resources of each."""

    count: int
    gpus: int
    cpus: int
    workers: int


def places(nodes: Sequence[Mapping[str, float]], config: ExtractConfig) -> Places:
    """One member per GPU; without GPUs, one per few CPUs.

    Args:
        nodes: resources of each node that is alive, as Ray names them.

    Raises:
        VaflowError: --device cuda and there is no GPU, or no node has a CPU.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if config.device == "cuda" and not with_gpu:
        raise VaflowError(explain("No node of the Ray cluster has a GPU", expected="a GPU", remedy="Use --device cpu"))
    if config.device != "cpu" and with_gpu:
        cpus = min(int(node.get("CPU", 0) // int(node["GPU"])) for node in with_gpu)
        return Places(sum(int(node["GPU"]) for node in with_gpu), 1, cpus, config.workers or max(1, cpus - 1))
    sizes = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not sizes:
        raise VaflowError(explain("No node of the Ray cluster has a CPU", got=f"{len(nodes)} nodes"))
    cpus = min(config.workers + 1 if config.workers else CPUS_PER_MEMBER, *sizes)
    return Places(sum(size // cpus for size in sizes), 0, cpus, config.workers or max(1, cpus // 2))


@dataclass
class _Hired:
    """The driver's record of a member. `idle`: no tasks, and none being sent."""

    handle: Any
    ready: bool = False
    idle: bool = True
    tasks: dict[str, PendingClip] = field(default_factory=dict)
    report: Report | None = None  # the last one


class Team:
    """The members and the queue of tasks. Use as a context manager: leaving it ends every member.

    Args:
        most: largest useful number of members.
    """

    def __init__(self, ray: Any, cache: Cache, config: ExtractConfig, most: int) -> None:
        self._ray, self._cache, self._config, self._most = ray, cache, config, most
        self._members: list[_Hired] = []
        self._pending_calls: dict[Any, _Hired] = {}  # pending call -> its member
        self._queue: deque[PendingClip] = deque()
        self._suspects: deque[PendingClip] = deque()  # were in progress when a member died
        self._attempts: dict[str, int] = {}
        self._infos: dict[str, StreamInfo] | None = None
        self._recorder: OutcomeRecorder | None = None
        self._past: list[_Hired] = []
        self._stillborn = 0
        self._began = self._looked = time.monotonic()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            self._ray.kill(member.handle)

    def infos(self) -> dict[str, StreamInfo]:
        """Every stream by name, once a member is ready."""
        self._hire()
        while self._infos is None:
            self._step()
        return self._infos

    def work(self, tasks: Sequence[PendingClip], recorder: OutcomeRecorder) -> None:
        """Process the tasks."""
        self._queue, self._recorder, self._most = deque(tasks), recorder, min(self._most, len(tasks))
        self._hire()
        self._deal_to_idle()
        while self._queue or self._suspects or any(not member.idle for member in self._members):
            self._step()
            self._look_around()

    # -- members -----------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Number of members to run: limited by the cluster and by the remaining tasks."""
        room = places([node["Resources"] for node in self._ray.nodes() if node["Alive"]], self._config)
        self._workers = room.workers
        # Independent of members that join later.
        self._config = replace(self._config, device="cuda" if room.gpus else "cpu")
        actor = self._ray.remote(Member).options(num_cpus=room.cpus, num_gpus=room.gpus, max_restarts=0)
        out = str(self._cache.path.absolute()) if self._cache.layout.remote is None else str(self._cache.place)
        for _ in range(min(room.count, self._most) - len(self._members)):
            member = _Hired(actor.remote(out, self._cache.store, self._config, room.workers))
            self._members.append(member)
            self._pending_calls[member.handle.prepare.remote()] = member

    def _look_around(self) -> None:
        """Hire members on nodes that have joined; log a hint if none is ready."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if self._queue:
            self._hire()
        if not any(member.ready for member in self._members) and now - self._began > HINT_SECONDS:
            self._began = now
            logger.warning("No Ray actor is ready yet; `ray status` lists the free resources of the cluster")

    def _lose(self, member: _Hired, error: Exception) -> None:
        """Handle a member that died: tasks that it has not committed are tried again at the end, one by one."""
        self._members.remove(member)
        self._past.append(member)
        self._ray.kill(member.handle)  # it may still be running but unreachable
        self._stillborn = 0 if member.ready else self._stillborn + 1
        why = str(error).strip().partition("\n")[0]
        if self._stillborn >= STILLBORN:
            remedy = "See Ray's logs in /tmp/ray/session_latest/logs; too little memory is the usual cause"
            raise VaflowError(explain("Ray actors died before they were ready", got=why, remedy=remedy)) from error
        logger.warning("A Ray actor died with %d items in progress: %s", len(member.tasks), why)
        self._try_again(member.tasks.values(), why)
        self._hire()
        self._deal_to_idle()

    def _try_again(self, tasks: Iterable[PendingClip], why: str) -> None:
        for lost in tasks:
            item = lost.clip.id
            self._attempts[item] = self._attempts.get(item, 0) + 1
            self._cache.refresh_index()
            left = make_plan(self._cache, self._infos or {}, [lost.clip], Shard()).tasks
            if not left:  # committed before the member died
                first_item = lost.first_item
                shown = self._cache.record(FACES, first_item).meta if self._cache.has(FACES, first_item) else {}
                seconds = float(self._cache.meta(first_item)["duration"])
                self._take(Extracted(item, seconds, int(shown.get("notable", 0))))
            elif self._attempts[item] < ATTEMPTS:
                self._suspects.append(left[0])
            else:
                message = f"The Ray actor that processed this item died {ATTEMPTS} times ({why}). Run again to retry."
                self._take(Failure(item, "worker", "ActorDied", message, {"split": lost.clip.split}))

    # -- calls -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Handle the answer of at most one member, and give it further tasks."""
        answered, _ = self._ray.wait(list(self._pending_calls), num_returns=1, timeout=1.0)
        for call in answered:
            member = self._pending_calls.pop(call)
            try:
                answer = self._ray.get(call)
            except self._ray.exceptions.RayTaskError:  # an error in this package, not a death
                raise
            except self._ray.exceptions.RayError as error:
                self._lose(member, error)
            else:
                self._handle(member, answer)

    def _handle(self, member: _Hired, answer: Prepared | Report) -> None:
        if answer.error is not None:
            raise answer.error
        if isinstance(answer, Prepared):
            self._infos, member.ready, self._stillborn = self._infos or answer.infos, True, 0
            self._deal_to_idle()
            return
        for note in answer.notes:
            logger.warning("%s", note)
        for outcome in answer.outcomes:
            member.tasks.pop(outcome.item, None)
            self._take(outcome)
        member.report = answer
        if self._recorder is not None:
            reports = [one.report for one in (*self._members, *self._past) if one.report is not None]
            ready = sum(one.ready for one in self._members)
            rows, stages, costs = (_sum(getattr(r, name) for r in reports) for name in ("rows", "stages", "costs"))
            self._recorder.count(rows, stages, costs, f"{ready} actors")
        if answer.ended:
            member.idle = True
            self._try_again(member.tasks.values(), "it did not finish")
            member.tasks.clear()
            self._deal_to_idle()
        else:
            self._give(member, LOOKAHEAD - answer.waiting)

    def _deal_to_idle(self) -> None:
        """Give tasks to idle members: from the queue as many as they can start, or one suspect."""
        for member in self._members:
            if member.ready and member.idle and self._queue:
                self._give(member, self._workers + LOOKAHEAD)
            elif member.ready and member.idle and self._suspects:
                self._ask(member, [self._suspects.popleft()], last=True)

    def _give(self, member: _Hired, count: int) -> None:
        tasks = [self._queue.popleft() for _ in range(min(max(count, 0), len(self._queue)))]
        self._ask(member, tasks, last=not self._queue)

    def _ask(self, member: _Hired, tasks: Sequence[PendingClip], *, last: bool) -> None:
        member.idle = False
        member.tasks |= {task.clip.id: task for task in tasks}
        self._pending_calls[member.handle.exchange.remote(tasks, last)] = member

    def _take(self, outcome: Outcome) -> None:
        if self._recorder is not None:
            self._recorder.take(outcome)


def _sum(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def _absolute(clip: Clip) -> Clip:
    """The clip with absolute paths, which are valid in every process."""
    paths: dict[str, Any] = {name: path.absolute() for name, path in vars(clip).items() if isinstance(path, Path)}
    return replace(
        clip,
        **paths,
        crops=tuple(folder.absolute() for folder in clip.crops),
        person_labels=tuple((number, path.absolute()) for number, path in clip.person_labels),
        dimensions=tuple((target, path.absolute()) for target, path in clip.dimensions),
    )
