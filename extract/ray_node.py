"""Code of one Ray actor: the local extraction loop, on tasks that arrive while it runs. Does not import Ray."""

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vaflow.cache import Cache, create_cache
from vaflow.cache.costs import Cost
from vaflow.cache.schema import StreamInfo
from vaflow.device import choose_device
from vaflow.errors import VaflowError
from vaflow.extract.config import ExtractConfig
from vaflow.extract.engine import Encoders, build_encoders, make_encoders, prepare
from vaflow.extract.extraction import Extraction
from vaflow.extract.nvdec import require_nvdec
from vaflow.extract.plan import PendingClip
from vaflow.extract.summary import Outcome
from vaflow.process import Notes

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
        self._feed: _Feed | None = None  # of the current run
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
        """Take tasks, wait for changes, report them. `last`: no further tasks until these have ended."""
        feed = self._feed or self._begin()
        for task in tasks:
            feed.put(task)
        if last:
            feed.close()
        return self._report(feed)

    # -- the extraction loop, in its own thread --------------------------------------------------------------------

    def _begin(self) -> "_Feed":
        self._feed = feed = _Feed(self._news)
        self._past, self._past_costs = dict(self._stages), dict(self._costs)
        threading.Thread(target=self._work, args=(feed,), name="vaflow-run", daemon=True).start()
        return feed

    def _work(self, feed: "_Feed") -> None:
        try:
            Extraction(self._cache, self._config, self._streams, self._encoders, self._workers, self).run(feed)
        except BaseException as error:  # noqa: BLE001 - handed over whole to whoever reads the report
            self._error = error
        finally:
            feed.ended = True
            self._news.put(None)

    def take(self, outcome: Outcome) -> None:
        """Outcome of an item, from the run."""
        self._news.put(outcome)

    def progress(self, item: str, share: float) -> None:
        """Not reported: the driver counts whole items."""

    def count(self, rows: Mapping[str, int], stages: Mapping[str, float], costs: Mapping[str, Cost]) -> None:
        """Seconds per stage and costs per stream, from the run."""
        self._stages = {name: seconds + self._past.get(name, 0.0) for name, seconds in stages.items()}
        past = self._past_costs
        self._costs = {name: cost + past[name] if name in past else cost for name, cost in costs.items()}

    # -- reports ---------------------------------------------------------------------------------------------------

    def _report(self, feed: "_Feed") -> Report:
        """Wait for changes and report them. Unexpected errors are raised, with their traceback."""
        outcomes = self._read_news(ANSWER_SECONDS)
        if ended := feed.ended:
            outcomes += self._read_news(0)  # outcomes that arrived before the end
            self._feed = None
        if self._error is not None and not isinstance(self._error, VaflowError | OSError):
            raise self._error
        rows = {name: batcher.rows for name, batcher in self._encoders.batchers.items()}
        notes = self._notes.collect()
        stages, costs = dict(self._stages), dict(self._costs)
        return Report(tuple(outcomes), feed.waiting, ended, rows, stages, notes, self._error, costs)

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


class _Feed:
    """Iterator over tasks that arrive one by one; it waits for the next until the feed is closed."""

    def __init__(self, news: "queue.SimpleQueue[Outcome | None]") -> None:
        self._queue: queue.SimpleQueue[PendingClip | None] = queue.SimpleQueue()
        self._news = news
        self._closed = False
        self.ended = False

    def put(self, task: PendingClip) -> None:
        self._queue.put(task)

    def close(self) -> None:
        """End the iteration after the tasks received so far. May be repeated."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    @property
    def waiting(self) -> int:
        """Number of tasks that were not started."""
        return self._queue.qsize()

    def __iter__(self) -> Iterator[PendingClip]:
        while (task := self._queue.get()) is not None:
            self._news.put(None)  # there is room for another task
            yield task
