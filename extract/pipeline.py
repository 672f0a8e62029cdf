"""Stage one as a whole: decode -> batch -> encode -> commit, overlapped and bounded. Only this file knows the order.

Worker processes decode; the main thread fills batches and encodes; one writer thread commits. Each hand-over is
bounded, so memory does not grow with the data set, and a clip is committed as soon as its last row is encoded.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import LOGMEL, PIXELS, StreamInfo
from vaflow.datasets import Dataset
from vaflow.encoders import build_encoder
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.encoders.frontend import KALDI
from vaflow.encoders.prompts import load_prompts
from vaflow.errors import DataError, VaflowError, explain
from vaflow.extract.assembly import ClipAssembly, LogMel
from vaflow.extract.batching import Encoders, make_encoders
from vaflow.extract.config import ExtractConfig, Shard, default_workers
from vaflow.extract.failures import Failure, FailureLog
from vaflow.extract.messages import Done, Failed, Job
from vaflow.extract.plan import Plan, Task, make_plan
from vaflow.extract.pool import WorkerPool
from vaflow.extract.profile import COMMITTING, WAITING_FOR_WRITER, Profile
from vaflow.extract.prompts import write_prompts
from vaflow.extract.streams import provenance, source_of, stream_infos

PENDING_COMMITS = 4
FACTS_OF = {"labels": "labels", "logmel": "audio", "audio": "audio", "visual": "visual", "pixels": "visual"}


@dataclass
class Summary:
    """What a run did.

    Attributes:
        extracted: items committed; done: items that had nothing to do; changed: items redone for a changed source.
        failures: items that failed, with their reasons; `failures_file` lists them.
        encoded: encoder name -> rows encoded.
        media_seconds: video time of the extracted items; wall_seconds: of the run.
        stages: where the time of the main process went, in seconds.
    """

    extracted: int = 0
    done: int = 0
    changed: int = 0
    failures: list[Failure] = field(default_factory=list)
    failures_file: Path | str = Path()
    encoded: dict[str, int] = field(default_factory=dict)
    media_seconds: float = 0.0
    wall_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


def extract(
    dataset: Dataset,
    out: Path,
    config: ExtractConfig,
    *,
    store: str = "zarr",
    shard: Shard | None = None,
    show_progress: bool = False,
) -> Summary:
    """Encode a data set into the cache at `out`; run again to resume. Items that fail do not stop the others.

    Raises:
        UsageError: a name or path is wrong.
        FingerprintError: a stream in the cache was made with other settings.
        WeightsError: weights are missing or do not fit.
        CacheError: the cache cannot be written to any more (a full disk, say); what was committed stays.
    """
    device = resolve_device(config.device)
    visual, audio = build_encoders(config, device)
    return extract_with(
        dataset, out, config, visual, audio, device, store=store, shard=shard, show_progress=show_progress
    )


def extract_with(
    dataset: Dataset,
    out: Path,
    config: ExtractConfig,
    visual: list[VisualEncoder],
    audio: list[AudioEncoder],
    device: torch.device,
    *,
    store: str = "zarr",
    shard: Shard | None = None,
    show_progress: bool = False,
) -> Summary:
    """As `extract`, with encoders that the caller has built."""
    began, shard = time.perf_counter(), shard or Shard()
    cache = create_cache(out, store=store)
    infos = stream_infos(config, visual, audio)
    for info in infos.values():
        cache.declare(info)
    write_prompts(cache, load_prompts(config.prompts), visual)
    plan = make_plan(cache, infos, dataset.clips, shard)
    log = FailureLog(cache.path / f"failures{shard.suffix}.jsonl")
    run = _Run(cache, config, infos, plan, log, make_encoders(config, device, visual, audio))
    summary = Summary(done=plan.done, changed=plan.changed, failures=log.failures)
    summary.failures_file = cache.layout.named(log.path)
    try:
        if plan.tasks:
            run.run(summary, show_progress)
    finally:
        cache.refresh_index()
    summary.wall_seconds = time.perf_counter() - began
    return summary


def resolve_device(name: str) -> torch.device:
    """ "auto" -> the first GPU if there is one, else the CPU.

    Raises:
        VaflowError: a GPU was named that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise VaflowError(explain("No GPU is available", expected="a CUDA device", got=name, remedy="Use --device cpu"))
    return device


def build_encoders(config: ExtractConfig, device: torch.device) -> tuple[list[VisualEncoder], list[AudioEncoder]]:
    """Build every encoder named in the settings, visual ones and audio ones."""
    built = [
        build_encoder(name, weights=config.weights.get(name), device=str(device), precision=config.precision)
        for name in config.encoders
    ]
    visual = [encoder for encoder in built if encoder.kind == "visual"]
    audio = [encoder for encoder in built if encoder.kind == "audio"]
    return visual, audio  # type: ignore[return-value]


class _Run:
    """The state of one run: which clips are under way, what is being committed."""

    def __init__(
        self,
        cache: Cache,
        config: ExtractConfig,
        infos: Mapping[str, StreamInfo],
        plan: Plan,
        log: FailureLog,
        encoders: Encoders,
    ) -> None:
        self._cache, self._config, self._infos = cache, config, infos
        self._plan, self._log, self._encoders = plan, log, encoders
        self._open: dict[int, ClipAssembly] = {}
        self._writer = ThreadPoolExecutor(1, "vaflow-writer")
        self._slots = threading.Semaphore(PENDING_COMMITS)
        self._commits: list[Future[None]] = []
        self._profile = Profile()

    def run(self, summary: Summary, show_progress: bool) -> None:
        """Work off the plan."""
        device = next((batcher.device.type for batcher in self._encoders.batchers.values()), "cpu")
        workers = self._config.workers or default_workers(device)
        bar = tqdm(total=len(self._plan.tasks), unit="clip", desc="extract", disable=not show_progress, smoothing=0.1)
        with bar, self._writer, WorkerPool(self._jobs(), min(workers, len(self._plan.tasks))) as pool:
            for message in self._profile.waiting(pool):
                if isinstance(message, Failed):
                    self._fail(message)
                    bar.update()
                    continue
                clip = self._assembly(message.job)
                clip.take(message)
                if isinstance(message, Done):
                    bar.set_postfix_str(self._rates(bar.format_dict["elapsed"]), refresh=False)
                    bar.update()
                self._commit_complete(summary)
            for batcher in self._encoders.batchers.values():
                batcher.flush()
            self._commit_complete(summary)
            self._check_commits(wait=True)
        summary.encoded = {name: batcher.rows for name, batcher in self._encoders.batchers.items()}
        self._profile.seconds |= {f"encoding {n}": b.seconds for n, b in self._encoders.batchers.items()}
        summary.stages = self._profile.stages()

    def _jobs(self) -> Iterable[Job]:
        preparations = tuple(dict.fromkeys(encoder.preparation for encoder, _ in self._encoders.visual.values()))
        for number, task in enumerate(self._plan.tasks):
            kinds = {self._infos[name].kind for name in task.streams}
            yield Job(
                number=number,
                clip=task.clip,
                grid=self._config.grid,
                audio="logmel" in kinds or self._needs_sound(task),
                faces=bool(kinds & {"visual", "pixels"}),
                face_source=self._config.face_source,
                preparations=preparations,
                keep_jpeg=PIXELS in task.streams,
            )

    def _needs_sound(self, task: Task) -> bool:
        """Whether a stream is made from anything but the log-Mel, which the cache has."""
        audio = self._encoders.audio
        return any(audio[name][0].front_end != KALDI for name in task.streams if name in audio)

    def _assembly(self, number: int) -> ClipAssembly:
        if number not in self._open:
            task = self._plan.tasks[number]
            self._open[number] = ClipAssembly(task, self._config, self._infos, self._encoders, self._cached_logmel)
        return self._open[number]

    def _cached_logmel(self, item: str) -> LogMel:
        stored = self._cache.read(LOGMEL, item)
        return stored.embedding, stored.valid

    def _rates(self, seconds: float) -> str:
        rates = {name: batcher.rows / max(seconds, 1e-3) for name, batcher in self._encoders.batchers.items()}
        return ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items())

    def _fail(self, failed: Failed) -> None:
        self._open.pop(failed.job, None)
        task = self._plan.tasks[failed.job]
        self._log.add(Failure(task.clip.id, failed.stage, failed.error, failed.message, task.clip.split))

    def _commit_complete(self, summary: Summary) -> None:
        for number in [n for n, clip in self._open.items() if clip.complete]:
            clip = self._open.pop(number)
            with self._profile.measure(WAITING_FOR_WRITER):
                self._slots.acquire()
            self._commits.append(self._writer.submit(self._commit, clip, summary))
        self._check_commits(wait=False)

    def _check_commits(self, *, wait: bool) -> None:
        """Raise what a commit raised: a cache that cannot be written to ends the run."""
        pending = []
        for commit in self._commits:
            if wait or commit.done():
                commit.result()
            else:
                pending.append(commit)
        self._commits = pending

    def _commit(self, clip: ClipAssembly, summary: Summary) -> None:
        """Writer thread: every stream of one clip, labels last."""
        task: Task = clip.task
        try:
            for name in task.streams:
                info = self._infos[name]
                facts = clip.facts[FACTS_OF[info.kind]]
                source = source_of(info.kind, clip.sources)
                with self._profile.measure(COMMITTING):
                    self._cache.write(name, task.clip.id, clip.arrays[name], source=source, meta=facts | provenance())
        except DataError as error:  # not finite, say; a cache that cannot be written to ends the run instead
            self._log.add(Failure(task.clip.id, "commit", type(error).__name__, str(error), task.clip.split))
        else:
            summary.extracted += 1
            summary.media_seconds += clip.duration
        finally:
            self._slots.release()
