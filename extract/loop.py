"""Extraction loop: decode -> batch -> encode -> commit, overlapped and in bounded memory.

Worker processes decode; the main thread fills batches and encodes; one writer thread commits. Every queue is bounded,
so memory does not grow with the data set, and a clip is committed as soon as its last row is encoded.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vaflow.cache import Cache
from vaflow.cache.costs import Cost
from vaflow.cache.schema import CROPS, FACES, LABELS, PIXELS
from vaflow.datasets.clip import person_item
from vaflow.device import device_name
from vaflow.encoders.base import KALDI, count_parameters
from vaflow.errors import DataError, MediaError
from vaflow.extract.clip_assembly import ClipAssembly
from vaflow.extract.config import ExtractConfig
from vaflow.extract.decoding_pool import Detect, Done, Failed, Job, WorkerPool
from vaflow.extract.encoding import Encoders
from vaflow.extract.faces.choice import ALL, MAIN
from vaflow.extract.faces.detection_torch import QUESTION
from vaflow.extract.faces.identity import resolve
from vaflow.extract.plan import Extracted, Outcome, PendingClip
from vaflow.extract.streams import NewStreams, provenance, source_of
from vaflow.extract.video import check_parity
from vaflow.extract.worker import run_job
from vaflow.files import Failure

PENDING_COMMITS = 4
WAITING = "waiting for decoders"
COMMITTING = "committing (in its own thread)"
WAITING_FOR_WRITER = "waiting for the writer"
REST = "filter banks, bookkeeping"
DETECTING = "detecting faces"
ON_DEVICE = "encoding (device clock)"
DETECTING_ON_DEVICE = "detecting (device clock)"  # only with --detector torch
BESIDE = (COMMITTING, ON_DEVICE, DETECTING_ON_DEVICE)  # in other threads
REMEDIES = {
    WAITING: "decoding is the bottleneck: use more --workers, --faces auto if there are crops, or --detector torch",
    DETECTING: "face detection is the bottleneck: use --faces auto if there are crops, or another --detector",
    WAITING_FOR_WRITER: "the disk is the bottleneck: use a faster one, or --store hdf5 (fewer files)",
    REST: "the main process is the bottleneck: run several processes with --shard",
}
T = TypeVar("T")


class Ledger(Protocol):
    """Receives the outcomes and the progress of a run. Any thread may call."""

    def take(self, outcome: Outcome) -> None:
        """An item has been committed, or has failed."""
        ...

    def progress(self, item: str, share: float) -> None:
        """A share (0 to 1) of an item has been read."""
        ...

    def count(self, rows: Mapping[str, int], stages: Mapping[str, float], costs: Mapping[str, Cost]) -> None:
        """Rows encoded by each encoder so far, and seconds of each stage and cost of each stream in this run."""
        ...


class Extraction:
    """One extraction: the clips in progress and the commits that wait."""

    def __init__(
        self, cache: Cache, config: ExtractConfig, streams: NewStreams, encoders: Encoders, workers: int, ledger: Ledger
    ) -> None:
        self._cache, self._config, self._streams, self._infos = cache, config, streams, streams.infos
        self._encoders, self._workers, self._ledger = encoders, workers, ledger
        self._tasks: dict[int, PendingClip] = {}
        self._open: dict[int, ClipAssembly] = {}
        self._questions: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)  # job -> images for the face detector
        self._writer = ThreadPoolExecutor(1, "vaflow-writer")
        self._slots = threading.Semaphore(PENDING_COMMITS)
        self._commits: list[Future[None]] = []
        self._profile = Profile()
        self._gpu = next((str(b.device) for b in encoders.batchers.values()), "cuda")
        self._compared = False
        self._before = self._encoding()
        self._media: Counter[str] = Counter()  # stream -> seconds of committed clips
        self._costs_before = {  # encoders may have worked in earlier runs, too
            name: Cost(
                device_name(b.device), getattr(e, "precision", "float32"), count_parameters(e), -b.row_seconds, 0.0
            )
            for name, (e, b) in (*encoders.visual.items(), *encoders.audio.items())
        }

    def run(self, tasks: Iterable[PendingClip]) -> None:
        """Process the tasks; the iterable is advanced when a worker is free, so tasks may still be arriving.

        Raises:
            CacheError: the cache cannot be written (a full disk); committed items stay.
        """
        workers = WorkerPool(self._jobs(tasks), self._workers, run_job, item_timeout=self._config.item_timeout)
        with self._writer, workers as pool:
            for message in self._profile.waiting(pool):
                if isinstance(message, Failed):
                    self._fail(message)
                    continue
                if isinstance(message, Detect):
                    self._detect(message, pool)
                    continue
                clip = self._assembly(message.job)
                clip.take(message)
                self._ledger.progress(clip.task.clip.id, clip.share_read)
                if isinstance(message, Done):
                    self._report()
                self._commit_complete()
            for batcher in self._encoders.batchers.values():
                batcher.flush()
            self._commit_complete()
            self._check_commits(wait=True)
        self._report()

    def _detect(self, question: Detect, pool: WorkerPool) -> None:
        """Collect the images of a detection request and answer it after the last one."""
        self._questions[question.job].append(question.image)
        if not question.last:
            return
        if self._encoders.detector is None:
            raise RuntimeError("A worker sent images for a face detector that this run does not have")
        with self._profile.measure(DETECTING):
            cells = self._encoders.detector.detect(self._questions.pop(question.job))
            pool.answer(question.job, cells)

    def _report(self) -> None:
        now = self._encoding()
        self._profile.seconds |= {stage: seconds - self._before[stage] for stage, seconds in now.items()}
        batchers = self._encoders.batchers
        rows = {name: batcher.rows for name, batcher in batchers.items()}
        costs = {
            name: replace(cost, seconds=cost.seconds + batchers[name].row_seconds, media_seconds=self._media[name])
            for name, cost in self._costs_before.items()
        }
        self._ledger.count(rows, self._profile.stages(), costs)

    def _encoding(self) -> dict[str, float]:
        """Stage -> seconds, summed over all runs of these encoders."""
        batchers = self._encoders.batchers
        seconds = {f"encoding {name}": batcher.seconds for name, batcher in batchers.items()}
        seconds[ON_DEVICE] = sum(batcher.device_seconds for batcher in batchers.values())
        if self._encoders.detector is not None:
            seconds[DETECTING_ON_DEVICE] = self._encoders.detector.device_seconds
        return seconds

    def _jobs(self, tasks: Iterable[PendingClip]) -> Iterable[Job]:
        preparations = tuple(dict.fromkeys(encoder.preparation for encoder, _ in self._encoders.visual.values()))
        ask = QUESTION if self._encoders.detector is not None else 0
        chosen = MAIN if self._config.person == ALL else self._config.person
        for number, task in enumerate(tasks):
            self._tasks[number] = task
            kinds = {self._infos[name].kind for name in task.streams}
            faces = bool(kinds & {"visual", "pixels", FACES, CROPS})
            yield Job(
                number=number,
                clip=task.clip,
                grid=self._config.grid,
                audio="logmel" in kinds or self._needs_audio(task),
                faces=faces,
                person=ALL if task.everyone else chosen,
                identity=resolve(self._config.identity),
                face_source=self._config.face_source,
                preparations=preparations,
                keep_jpeg=PIXELS in task.streams,
                keep_everyone=CROPS in task.streams,
                decode_on=self._decode_on(task) if faces else "",
                ask=ask,
                stored=task.stored,
            )

    def _decode_on(self, task: PendingClip) -> str:
        """The GPU that decodes frames, or ""; compared with PyAV on the first clip that it decodes."""
        if self._config.decoder != "nvdec":
            return ""
        if not self._compared and task.clip.video is not None:
            with suppress(MediaError):  # its decoding process reports the clip as failed; the next one is compared
                check_parity(task.clip.video, self._gpu)
                self._compared = True
        return self._gpu

    def _needs_audio(self, task: PendingClip) -> bool:
        """Whether a stream needs sources other than the cached log-Mel."""
        audio = self._encoders.audio
        return any(audio[name][0].front_end != KALDI for name in task.streams if name in audio)

    def _assembly(self, number: int) -> ClipAssembly:
        if number not in self._open:
            task = self._tasks.pop(number)
            self._open[number] = ClipAssembly(task, self._config, self._infos, self._encoders, self._cache)
        return self._open[number]

    def _fail(self, failed: Failed) -> None:
        self._questions.pop(failed.job, None)
        clip = self._open.pop(failed.job, None)
        task = clip.task if clip is not None else self._tasks.pop(failed.job)
        self._ledger.take(Failure(task.clip.id, failed.stage, failed.error, failed.message, {"split": task.clip.split}))

    def _commit_complete(self) -> None:
        for number in [n for n, clip in self._open.items() if clip.complete]:
            clip = self._open.pop(number)
            with self._profile.measure(WAITING_FOR_WRITER):
                self._slots.acquire()
            self._commits.append(self._writer.submit(self._commit, clip))
        self._check_commits(wait=False)

    def _check_commits(self, *, wait: bool) -> None:
        """Raise the error of a commit: a cache that cannot be written ends the run."""
        pending = []
        for commit in self._commits:
            if wait or commit.done():
                commit.result()
            else:
                pending.append(commit)
        self._commits = pending

    def _commit(self, clip: ClipAssembly) -> None:
        """Commit every stream of one clip, labels last; of several people, the first one last.

        Runs in the writer thread. Once the labels of the first person are there, everyone is.
        """
        task = clip.task
        try:
            self._streams.create(self._cache)
            for item, results in clip.items():
                for name in task.streams:
                    info = self._infos[name]
                    arrays, facts = results[name]
                    meta = facts | clip.made_in(name) | provenance()
                    source = source_of(info.kind, clip.sources)
                    with self._profile.measure(COMMITTING):
                        self._cache.write(name, item, arrays, source=source, meta=meta)
            for item in self._replaced(task, clip.people):
                for name in (LABELS, *(name for name in self._infos if name != LABELS)):
                    self._cache.drop(name, item)
        except DataError as error:  # such as values that are not finite; a cache that cannot be written ends the run
            split = {"split": task.clip.split}
            self._ledger.take(Failure(task.clip.id, "commit", type(error).__name__, str(error), split))
        else:
            self._media.update(dict.fromkeys(task.streams, clip.duration))
            people = clip.facts["faces"].get("notable", 0)
            self._ledger.take(Extracted(task.clip.id, clip.duration, people, clip.label_problem))
        finally:
            self._slots.release()

    def _replaced(self, task: PendingClip, people: int) -> list[str]:
        """Items that the cache has from an earlier version of the clip: further people, or the clip without division.

        A clip is divided if it has no crops of the dataset, which may come or go between two runs.
        """
        clip = task.clip.id
        first = people + 1 if task.everyone else 1
        items = [person_item(clip, number) for number in range(first, task.people + 1)]
        items += [clip] if task.everyone and self._cache.has(LABELS, clip) else []
        metas = {item: self._cache.meta(item) for item in items if self._cache.has(LABELS, item)}
        # An item whose labels are gone is the rest of a dropped one; another clip may have the name of a person.
        return [item for item in items if item not in metas or metas[item].get("clip", item) == clip]


class Profile:
    """Seconds per stage. One thread per stage name, so no locks are needed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began

    def waiting(self, source: Iterable[T]) -> Iterator[T]:
        """Yield the items of `source`, adding the time until each arrives to `WAITING`."""
        iterator = iter(source)
        while True:
            with self.measure(WAITING):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def stages(self) -> dict[str, float]:
        """Stage -> seconds: stages of the main thread, which add up to the wall time, then those of other threads."""
        total = time.perf_counter() - self._began
        main = _of_main(self.seconds)
        beside = {COMMITTING: 0.0, ON_DEVICE: 0.0} | {k: v for k, v in self.seconds.items() if k in BESIDE}
        return {**main, REST: total - sum(main.values()), **beside}


def bottleneck(stages: Mapping[str, float]) -> str:
    """The stage that takes most of the main thread's time, its remedy, and the idle share of the device."""
    main = _of_main(stages)
    worst = max(main, key=lambda stage: main[stage])
    total = max(sum(main.values()), 1e-9)
    remedy = REMEDIES.get(worst, "the encoder is the bottleneck, which is the best case")
    line = f"{worst}: {main[worst] / total:.0%} of the time; {remedy}"
    return f"{line}. The encoders' device was idle for {idle_share(stages):.0%} of it."


def idle_share(stages: Mapping[str, float]) -> float:
    """Share of the run, 0 to 1, in which the device was idle."""
    busy = stages.get(ON_DEVICE, 0.0) + stages.get(DETECTING_ON_DEVICE, 0.0)
    return max(0.0, 1 - busy / max(sum(_of_main(stages).values()), 1e-9))


def _of_main(stages: Mapping[str, float]) -> dict[str, float]:
    return {stage: seconds for stage, seconds in stages.items() if stage not in BESIDE}
