"""Plan of an extraction: which streams of which clips are missing or out of date; and the outcome of its work."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapreplace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vaflow.cache import Cache, is_cache, open_cache
from vaflow.cache.costs import Cost, append_costs
from vaflow.cache.layout import source_stamp
from vaflow.cache.maintenance import clip_streams, other_versions
from vaflow.cache.remote import shown_place
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip, clip_and_person, person_item
from vaflow.errors import (
    MediaError,
    UsageError,
    count,
    examples,
    explain,
)
from vaflow.extract.audio import ends_in_a_short_step
from vaflow.extract.config import Shard
from vaflow.extract.decoding_pool import Failed, StoredPerson, each
from vaflow.extract.durations import lengths
from vaflow.extract.faces.choice import ALL
from vaflow.extract.source_files import IMAGES_DIGEST, SourceComparison, file_status, images_digest, sources_of
from vaflow.extract.streams import SOURCES, reading_version, source_of
from vaflow.extract.video import READING, misread_before
from vaflow.files import LISTS, Failure, FailureLog, read_failures
from vaflow.timeline import Grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingClip:
    """A clip and the streams to make of it.

    Attributes:
        changed: the cache holds streams of an earlier version of its files.
        stored: the images are read from a cache.
        everyone: every person of the clip becomes an item.
        people: how many people of the clip are items of the cache, even where the clip has become one item.
    """

    clip: Clip
    streams: tuple[str, ...]
    changed: bool
    everyone: bool = False
    people: int = 0
    stored: StoredPerson | None = None

    @property
    def first_item(self) -> str:
        """The item that is committed last and marks the clip as complete."""
        return person_item(self.clip.id, 1) if self.everyone else self.clip.id


@dataclass(frozen=True)
class Plan:
    """What an extraction will do.

    Attributes:
        tasks: clips with streams to make, longest first.
        done: number of clips of this shard that are complete.
        seconds: item of every task -> duration, estimated from headers.
    """

    tasks: tuple[PendingClip, ...]
    done: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def make_plan(
    cache: Cache, infos: dict[str, StreamInfo], clips: Iterable[Clip], shard: Shard, *, rehash: bool = False
) -> Plan:
    """Compare the data set with the cache, clip by clip and stream by stream.

    An item of a stream is complete if it is committed and its source files are unchanged: their sizes and times
    agree, or their contents do. With `rehash`, contents are always compared.
    """
    mine = shard_clips(clips, shard)
    stamps = {name: cache.source_stamps(name) for name in infos}  # item -> stamp of its sources
    for name in filter(cache.has_damage, infos):  # "" for a damaged record, which raises when it is needed
        stamps[name] |= {c.id: "" for c in mine if c.id not in stamps[name] and cache.has(name, c.id)}
    misread = _misread(cache, infos, stamps, mine)
    images = [info.identity.get("picture", {}) for info in infos.values() if info.kind in ("visual", "pixels")]
    faces: dict[str, Any] = images[0].get("faces", {}) if images else {}
    people: dict[str, int] = {}
    if faces.get("person") == ALL:
        for item in set().union(*stamps.values()):
            source, number = clip_and_person(item)
            people[source] = max(people.get(source, 0), number)
    tasks = {}
    for clip in mine:
        everyone = faces.get("person") == ALL and is_divided(clip, faces["source"])
        number, first = people.get(clip.id, 0), person_item(clip.id, 1)
        if everyone and first in stamps.get(LABELS, ()):  # the last person may have been removed from every stream
            number = max(number, int(cache.meta(first).get("persons", 0)))
        task = _task(cache, infos, stamps, clip, rehash, misread.get(clip.id, ()), everyone, number)
        if task.streams:
            tasks[clip.id] = task
    seconds = lengths([task.clip for task in tasks.values()])
    return Plan(tuple(longest_first(tasks.values(), seconds)), len(mine) - len(tasks), seconds)


def is_divided(clip: Clip, face_source: str) -> bool:
    """Whether `--person all` makes an item of every person of a clip: its faces are detected, and it has no side."""
    has_crops = bool(clip.crops) and face_source != "centerface"
    return (clip.video is not None or clip.frames is not None) and not clip.side and not has_crops


def check_items(clips: Iterable[Clip], person: str, face_source: str) -> None:
    """Check that no clip has the name of a person of another clip, as `talk#2` beside `talk` with `--person all`.

    Raises:
        UsageError: both would write the same item.
    """
    clips = list(clips) if person == ALL else []
    divided = {clip.id for clip in clips if is_divided(clip, face_source)}
    numbered = [(clip.id, clip_and_person(clip.id)[0]) for clip in clips if clip.id not in divided]
    taken = [(item, source) for item, source in numbered if source != item and source in divided]
    if taken:
        problem = "With --person all, clips have the names of people of other clips"
        got = examples([f"{item!r}, a person of {source!r} and a clip" for item, source in taken])
        remedy = "Rename these clips, or extract them into a cache of their own"
        raise UsageError(explain(problem, expected="a name for one item only", got=got, remedy=remedy))


def longest_first(tasks: Iterable[PendingClip], seconds: Mapping[str, float]) -> list[PendingClip]:
    """Tasks by descending duration, so that no worker starts the longest clip last."""
    return sorted(tasks, key=lambda task: (-_milliseconds(seconds[task.clip.id]), task.clip.id))


def shard_clips(clips: Iterable[Clip], shard: Shard) -> list[Clip]:
    """Clips of one shard. Deals clips longest first, each to the shard with the least total: equal on every machine.

    Durations come from `vaflow.extract.durations`, to the millisecond; with one shard, no file is read. The largest
    shard exceeds the smallest by at most one clip.
    """
    clips = list(clips)
    if shard.count == 1:
        return clips
    seconds = lengths(clips)
    ordered = sorted(clips, key=lambda clip: (-_milliseconds(seconds[clip.id]), clip.id))
    loads = [(0, part) for part in range(1, shard.count + 1)]  # a heap: the least loaded part is on top
    mine = []
    for clip in ordered:
        load, part = loads[0]
        heapreplace(loads, (load + _milliseconds(seconds[clip.id]), part))
        if part == shard.index:
            mine.append(clip)
    return mine


def _task(
    cache: Cache,
    infos: dict[str, StreamInfo],
    stamps: dict[str, dict[str, str]],
    clip: Clip,
    rehash: bool,
    misread: Collection[str],
    everyone: bool,
    people: int,
) -> PendingClip:
    """Streams to make. Records are read only where the stamps of the sources differ, or for `rehash`.

    Args:
        everyone, people: as in `PendingClip`.
    """
    items = [person_item(clip.id, number + 1) for number in range(max(1, people))] if everyone else [clip.id]
    missing = {name for name in infos if any(item not in stamps[name] for item in items)}
    now = {} if rehash else _stamps_now(clip, {info.kind for name, info in infos.items() if name not in missing})
    comparison = SourceComparison(clip, rehash=rehash)
    changed = set()
    for name, item in ((name, item) for name in infos.keys() - missing for item in items):
        kind = infos[name].kind
        if kind in misread and cache.record(name, item).meta.get("reading", 1) < READING:
            changed.add(name)
            continue
        if stamps[name][item] == now.get(kind):
            continue
        recorded = cache.record(name, item)
        if not all(comparison.same(part, recorded.source.get(part)) for part in SOURCES[kind]):
            changed.add(name)
        elif rehash and IMAGES_DIGEST in recorded.meta:
            frames = cache.read(name, item).frame
            if recorded.meta[IMAGES_DIGEST] != images_digest(clip, frames):  # faces and crops do not state a digest
                changed |= {other for other in infos.keys() - missing if SOURCES[infos[other].kind] == SOURCES[kind]}
    streams = tuple(name for name in infos if name in missing | changed)
    return PendingClip(clip, streams, bool(changed), everyone, people)


def _misread(
    cache: Cache, infos: dict[str, StreamInfo], stamps: dict[str, dict[str, str]], clips: Iterable[Clip]
) -> dict[str, set[str]]:
    """Item -> kinds of its streams that an earlier version of this package computed wrongly."""
    older = [name for name, info in infos.items() if reading_version(info) < READING]
    misread: dict[str, set[str]] = {}
    videos = {}
    for clip in clips if older else ():
        records = {name: cache.record(name, clip.id).meta for name in older if clip.id in stamps[name]}
        reading = min((meta.get("reading", 1) for meta in records.values()), default=READING)
        if reading < 2 and clip.video is not None:
            videos[clip.id] = clip.video
        duration = records.get(LABELS, {}).get("duration", 0.0)
        audio = [name for name, meta in records.items() if meta.get("audio", "absent") != "absent"]
        for info in [infos[name] for name in audio if infos[name].kind == "audio" and reading < 3]:
            sampling = info.identity["sampling"]
            grid = Grid(sampling["window"], sampling["stride"], sampling["frames"])
            if ends_in_a_short_step(grid, sampling["audio_steps"], duration):  # which version 2 marked as missing
                misread[clip.id] = {"audio"}
    if videos:
        logger.info("Checking %s that an earlier version extracted", count(len(videos), "clip"))
    items = list(videos)
    for number, kinds in each(misread_before, list(videos.values())):
        if not isinstance(kinds, Failed):
            misread.setdefault(items[number], set()).update(kinds)
    return misread


def _stamps_now(clip: Clip, kinds: set[str]) -> dict[str, str]:
    """Kind of stream -> stamp of its sources as they are now; empty where files are missing."""
    try:
        sources = sources_of(clip, file_status) if kinds else {}
    except (OSError, MediaError):
        return {}
    return {kind: source_stamp(source_of(kind, sources)) for kind in kinds}


def _milliseconds(seconds: float) -> int:
    """Whole milliseconds, so that sums do not depend on their order; clips of unknown length count 1."""
    return max(1, round(seconds * 1000))


def only_failed(dataset: Dataset, cache: Path) -> Dataset:
    """The data set with only those clips that the failure lists of `cache` name.

    Raises:
        UsageError: the lists name no clip of this data set.
    """
    folder = open_cache(cache).path if is_cache(cache) else cache
    failed = {failure.item for failure in read_failures(folder)}
    clips = tuple(clip for clip in dataset.clips if clip.id in failed)
    if not clips:
        problem = f"No clip of {dataset.root} is listed as failed in {shown_place(cache)}"
        got = f"{len(failed)} failed items of other data" if failed else "no failed items"
        raise UsageError(explain(problem, expected=f"{LISTS} that names clips of this data set", got=got))
    return replace(dataset, clips=clips)


@dataclass
class Summary:
    """Summary of an extraction.

    Attributes:
        extracted: items committed; done: items that were complete before; changed: items extracted again because their
            source files have changed; outdated: items with changed source files that could not be extracted again.
        failures: items that failed, with their reasons; `failures_file` lists them.
        encoded: encoder name -> rows encoded.
        several_people: extracted items that show several people; without a face-recognition network, several tracks.
        label_problems: code of `vaflow.datasets.labels.clock_problem` -> extracted items with that problem.
        media_seconds: duration of the extracted items; wall_seconds: of the extraction.
        stages: stage -> seconds of the main process; with several processes, their sum.
        costs: stream -> what encoding its clips cost.
    """

    extracted: int = 0
    done: int = 0
    changed: int = 0
    outdated: int = 0
    failures: list[Failure] = field(default_factory=list)
    failures_file: Path | str = Path()
    encoded: dict[str, int] = field(default_factory=dict)
    several_people: int = 0
    label_problems: dict[str, list[str]] = field(default_factory=dict)
    media_seconds: float = 0.0
    wall_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)


@dataclass(frozen=True)
class Extracted:
    """An item that has been committed.

    Attributes:
        seconds: its duration.
        people: number of people with at least a tenth of the clear faces of the first one.
        label_problem: why its labels may not belong to it, a code, or "".
    """

    item: str
    seconds: float
    people: int = 0
    label_problem: str = ""


Outcome = Extracted | Failure


class OutcomeRecorder:
    """Records the outcome of every item in the summary, the failure log and the progress bar. Thread-safe.

    The bar counts seconds of video, so that it moves within long clips. Use as a context manager.

    Args:
        seconds: item -> estimated duration, of all items of the run.
    """

    def __init__(self, summary: Summary, log: FailureLog, seconds: Mapping[str, float], *, show_progress: bool) -> None:
        self.summary = summary
        self._log = log
        self._lock = threading.Lock()
        self._seconds = {item: max(length, 1.0) for item, length in seconds.items()}
        self._shares: dict[str, float] = {}  # item -> share that the bar has counted
        self._rates = ""
        self._ended = 0
        self._total = sum(self._seconds.values())
        self._bar = tqdm(
            total=self._total,
            desc="extract",
            disable=not show_progress,
            smoothing=0.1,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s of video "
            "[{elapsed}<{remaining}{postfix}]",
        )
        self._show_state()

    def __enter__(self) -> "OutcomeRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def take(self, outcome: Outcome) -> None:
        """Record that an item was committed or failed."""
        with self._lock:
            if isinstance(outcome, Failure):
                self._log.add(outcome)
            else:
                self.summary.extracted += 1
                self.summary.media_seconds += outcome.seconds
                self.summary.several_people += outcome.people > 1
                if outcome.label_problem:
                    self.summary.label_problems.setdefault(outcome.label_problem, []).append(outcome.item)
            self._ended += 1
            self._advance(outcome.item, 1.0)
            self._show_state()

    def progress(self, item: str, share: float) -> None:
        """Record that a share (0 to 1) of an item has been read."""
        with self._lock:
            self._advance(item, share)

    def count(
        self, rows: Mapping[str, int], stages: Mapping[str, float], costs: Mapping[str, Cost], note: str = ""
    ) -> None:
        """Record rows encoded so far, by encoder, seconds by stage, and costs by stream; the bar shows rates."""
        with self._lock:
            self.summary.encoded, self.summary.stages, self.summary.costs = dict(rows), dict(stages), dict(costs)
            seconds = max(self._bar.format_dict["elapsed"], 1e-3)
            rates = [f"{name} {number / seconds:.0f}/s" for name, number in rows.items()]
            self._rates = ", ".join([*rates, note] if note else rates)
            self._show_state()

    def _advance(self, item: str, share: float) -> None:
        before = self._shares.get(item, 0.0)
        if share > before:
            self._shares[item] = share
            step = (share - before) * self._seconds.get(item, 1.0)
            self._bar.update(min(step, self._total - self._bar.n))  # beyond its total, the bar prints a warning

    def _show_state(self) -> None:
        clips = f"{self._ended}/{len(self._seconds)} clips"
        self._bar.set_postfix_str(", ".join(filter(None, [clips, self._rates])), refresh=False)


def carry_out(
    cache: Cache,
    infos: dict[str, StreamInfo],
    dataset: Dataset,
    shard: Shard,
    work: Callable[[Sequence[PendingClip], OutcomeRecorder], None],
    *,
    rehash: bool = False,
    show_progress: bool = False,
) -> Summary:
    """Plan the extraction, call `work` with its tasks, and return the summary; `work` reports outcomes."""
    began = time.perf_counter()
    plan = make_plan(cache, infos, dataset.clips, shard, rehash=rehash)
    log = FailureLog(cache.path / f"failures{shard.suffix}.jsonl")
    summary = Summary(done=plan.done, failures=log.failures)
    summary.failures_file = cache.layout.named(log.path)
    with cache.indexed():
        if plan.tasks:
            with OutcomeRecorder(summary, log, plan.seconds, show_progress=show_progress) as recorder:
                try:
                    work(plan.tasks, recorder)
                finally:
                    append_costs(cache, summary.costs, shard.suffix)
    failed = {failure.item for failure in log.failures}
    changed = [task for task in plan.tasks if task.changed]
    summary.outdated = sum(not failed.isdisjoint((task.clip.id, task.first_item)) for task in changed)
    summary.changed = len(changed) - summary.outdated
    made = ("visual", "audio", "pixels", "targets")
    others = [name for name, info in cache.streams().items() if name not in infos and info.kind in made]
    for name, behind in other_versions(cache, others, [task.first_item for task in changed]).items():
        logger.warning("%s was made from earlier videos of %s. Extract or import it again", name, examples(behind))
    summary.wall_seconds = time.perf_counter() - began
    return summary


def absent_clips(cache: Cache, present: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the clips of the cache whose ids are not in `present`, sorted, with their streams as `clip_streams`.

    The people of a clip (`clip#1`, ...) are present if the clip is.
    """
    known = clip_streams(cache)
    absent = (item for item in known if item not in present and clip_and_person(item)[0] not in present)
    return {item: known[item] for item in absent}


def clips_to_drop(cache: Cache, present: Collection[str], origin: str) -> list[str]:
    """Return the ids of `absent_clips`, if at least one clip of the cache is in the data set `origin`.

    Raises:
        UsageError: the cache and the data set share no clip: it is not the data set of this cache.
    """
    known, absent = clip_streams(cache), list(absent_clips(cache, present))
    if known and len(absent) == len(known):
        expected = f"the data set of this cache, with clips such as {examples(list(known))}"
        got = f"{len(present)} other clips" if present else "no clips"
        raise UsageError(explain(f"No clip of {cache.place} is in {origin}", expected=expected, got=got))
    return absent
