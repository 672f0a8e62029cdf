"""Items that could not be copied, listed as extraction lists failures; and such lists of the caches that were read.

Evaluation counts the clips that are listed and not in the cache, so a list must not be lost with the cache's copy.

Everything that is committed in a cache, record by record, and what is damaged.

Items from cache to cache, whichever their stores: bit for bit, checked on the way, going on where a kill stopped it.

An item keeps its source, facts and time of making; only its attempt is new. What cannot be read is listed, and does
not stop the rest.

A cache in another store: the same arrays, sources and fingerprints.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from vaflow.cache import files
from vaflow.cache.cache import Cache
from vaflow.cache.commit import load_record
from vaflow.cache.layout import cannot_write, escape
from vaflow.cache.opening import PathLike, create_cache, layout_of
from vaflow.cache.schema import LABELS, Json, Record
from vaflow.cache.verify import load_streams
from vaflow.errors import CacheError, CorruptError, DataError, MissingError, UsageError, explain

FAILURES = "failures.jsonl"
CARRIED = "failures-carried.jsonl"


@dataclass(frozen=True)
class ItemFailure:
    """One item that could not be copied: where it is, at which stage, the error's class, what to tell a person."""

    item: str
    stream: str
    stage: str
    error: str
    message: str


def write_failures(target: Cache, failures: Iterable[ItemFailure], splits: Mapping[str, str | None]) -> Path:
    """Write `failures.jsonl` anew; returns its path.

    Args:
        target: the cache that items were copied into.
        failures: of this run.
        splits: of the clips that are known. A line without a split counts for every split; a prompt set is of none.
    """
    texts = {name for name, info in target.streams().items() if info.kind == "text"}
    lines = []
    for failure in failures:
        line: Json = {name: getattr(failure, name) for name in ("item", "stage", "error", "message", "stream")}
        if failure.stream in texts or failure.item in splits:
            line["split"] = None if failure.stream in texts else splits[failure.item]
        lines.append(line)
    path = target.path / FAILURES
    _write_lines(path, lines)
    return path


def listed_failures(target: Cache, sources: Iterable[Cache]) -> list[Json]:
    """What runs into all these caches listed as failed, without what copying into the target listed itself."""
    own = [line for line in _lines(target) if "stream" not in line]
    return own + [line for cache in sources for line in _lines(cache)]


def _lines(cache: Cache) -> Iterator[Json]:
    """Whole lines of the lists in a cache; others are left out."""
    for path in sorted(cache.path.glob("failures*.jsonl")):
        for text in path.read_text("utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("item"), str):
                yield line


def carry(target: Cache, lines: Iterable[Json]) -> None:
    """Keep, in `failures-carried.jsonl`, what lists of other caches say of clips that the target does not have."""
    path = target.path / CARRIED
    try:
        known = set(target.items())
    except CacheError:  # a damaged record in the target: better too many lines than too few
        known = set()
    unique = {json.dumps(line, sort_keys=True): line for line in lines if line["item"] not in known}
    if unique or path.exists():
        _write_lines(path, unique.values())


def _write_lines(path: Path, lines: Iterable[Json]) -> None:
    files.replace(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


Key = tuple[str, str]  # stream, item


@dataclass(frozen=True)
class Brief:
    """What is remembered of a record while items are chosen: what it was made from, when, and a clip's split."""

    source: Json
    created: str
    split: str | None


@dataclass(frozen=True)
class Survey:
    """Every committed item of a cache by stream and item, and what cannot be used."""

    briefs: dict[Key, Brief]
    damaged: list[ItemFailure]

    @property
    def splits(self) -> dict[str, str | None]:
        """Clip -> split."""
        return {item: brief.split for (stream, item), brief in self.briefs.items() if stream == LABELS}


def survey(cache: Cache, stage: str) -> Survey:
    """Read all records. Those that cannot be read, or whose stream's file is lost, are failures of `stage`."""
    layout = cache.layout
    streams, _ = load_streams(layout)
    found = Survey({}, [])
    for folder in sorted(p for p in layout.all_records.glob("*") if p.is_dir()):
        for path in sorted(p for p in folder.glob("*.json") if not p.name.startswith(".")):
            try:
                record = load_record(layout, path)
                if streams.get(f"{folder.name}.json") is None:
                    raise ValueError(f"streams/{folder.name}.json, which says what made its stream, is lost or damaged")
            except FileNotFoundError:  # dropped since it was listed
                continue
            except (OSError, ValueError) as error:
                found.damaged.append(_failure(cache, path, stage, str(error)))
                continue
            split = record.meta.get("split") if record.stream == LABELS else None
            found.briefs[record.stream, record.item] = Brief(record.source, record.created, split)
    return found


def _failure(cache: Cache, path: Path, stage: str, problem: str) -> ItemFailure:
    message = explain(
        f"{cache.layout.shown(path)} of the cache {cache.place} cannot be used: {problem}",
        remedy=f"Run `vaflow cache repair {cache.place}`, and extract again",
    )
    return ItemFailure(_name_of(path.stem), _name_of(path.parent.name), stage, "CorruptError", message)


def _name_of(file_name: str) -> str:
    """The name that a file name was made of, where that can be told."""
    name = unquote(file_name, errors="surrogatepass")
    return name if name and escape(name) == file_name else file_name


THREADS = 4  # commits wait for the disk to flush
COPY_OF = ("source", "meta", "created", "arrays", "fingerprint")  # members in which an item and its copy agree

Outcome = Literal["there", "new", "replaced"]


@dataclass(frozen=True)
class Job:
    """One item to copy, from the first of these caches that holds it whole."""

    key: Key
    origins: tuple[Cache, ...]


@dataclass(frozen=True)
class TransferSummary:
    """What a run did.

    Attributes:
        out: the cache that items were copied into.
        copied: items written; replaced: of those, how many took the place of another version.
        there: items that were there already.
        failures: items that could not be read; `failures_file` lists them.
    """

    out: str
    copied: int
    replaced: int
    there: int
    failures: tuple[ItemFailure, ...]
    failures_file: Path | str

    @property
    def nothing_done(self) -> bool:
        """Whether every item failed."""
        return bool(self.failures) and not self.copied and not self.there


def transfer(
    target: Cache,
    sources: Sequence[Cache],
    jobs: Iterable[Job],
    damaged: Iterable[ItemFailure],
    splits: Mapping[str, str | None],
    stage: str,
    *,
    show_progress: bool = False,
) -> TransferSummary:
    """Do all jobs, labels last: a clip exists once its clock and annotation do. The target lists what failed.

    Args:
        target: where to; it has every stream that the jobs name.
        sources: the caches that are read; what their runs listed as failed is carried over.
        jobs: what to copy.
        damaged: what is known not to be readable.
        splits: of the clips, for the list.
        stage: what is being done, for the list and the bar.
        show_progress: a bar.

    Raises:
        CacheError: the disk refuses; the same call goes on later.
    """
    from tqdm import tqdm

    ordered = sorted(jobs, key=lambda job: (job.key[0] == LABELS, job.key))
    features = sum(job.key[0] != LABELS for job in ordered)
    failures, done = list(damaged), Counter[Outcome]()
    carried = listed_failures(target, sources)
    try:
        with tqdm(total=len(ordered), desc=stage, unit="item", disable=not show_progress, smoothing=0.1) as bar:
            for part in (ordered[:features], ordered[features:]):
                for result in _copies(target, part, stage):
                    if isinstance(result, ItemFailure):
                        failures.append(result)
                    else:
                        done[result] += 1
                    bar.update()
    finally:
        try:
            path = write_failures(target, failures, splits)
            carry(target, carried)
            target.refresh_index()
        except OSError as error:
            raise cannot_write(target.layout, error) from error
    written = done["new"] + done["replaced"]
    return TransferSummary(
        target.place, written, done["replaced"], done["there"], tuple(failures), target.layout.named(path)
    )


def _copies(target: Cache, jobs: Sequence[Job], stage: str) -> Iterable[Outcome | ItemFailure]:
    """Several at a time; what one of them raises cancels those that have not begun."""
    with (
        ThreadPoolExecutor(THREADS, "vaflow-copy") as pool,
        closing(pool.map(lambda job: _copy(target, job, stage), jobs)) as results,  # type: ignore[type-var]
    ):
        yield from results


def _copy(target: Cache, job: Job, stage: str) -> Outcome | ItemFailure:
    """Copy one item unless its copy is there; a failure says why none of the origins has it whole."""
    stream, item = job.key
    known = _known(target, stream, item)
    reasons: list[Exception] = []
    for origin in job.origins:
        try:
            if known is not None and _is_copy(known, origin.record(stream, item)):
                return "there"
            record, arrays = origin.committed(stream, item)
            # What the target's disk refuses is no fault of the item, and is raised.
            target.adopt(record, arrays)
        except (CorruptError, MissingError, DataError, OSError) as error:
            reasons.append(error)
        else:
            return "new" if known is None else "replaced"
    message = " ".join(dict.fromkeys(map(str, reasons)))
    return ItemFailure(item, stream, stage, type(reasons[0]).__name__, message)


def _known(target: Cache, stream: str, item: str) -> Record | None:
    """What the target has; None where there is nothing that can be used."""
    if not target.has(stream, item):
        return None
    try:
        return target.record(stream, item)
    except (CorruptError, MissingError):
        return None


def _is_copy(first: Record, second: Record) -> bool:
    return all(getattr(first, name) == getattr(second, name) for name in COPY_OF)


STAGE = "convert"


def convert(source: Cache, out: PathLike, store: str, *, show_progress: bool = False) -> TransferSummary:
    """Copy a cache into one of another store, or go on with that. Damaged items are listed; the others go on.

    An item that was made anew in `source` since takes the place of its copy; one that was dropped there stays.

    Raises:
        UsageError: there is no such store, or `out` cannot be written, has another store, or lies in `source`.
        SchemaError: `out` holds something that is no cache.
        FingerprintError: `out` has a stream of the same name that was made with other settings.
        CacheError: the disk refuses; the same call goes on later.
    """
    refuse_inside(source, out)
    target = create_cache(out, store=store)
    declare_streams(target, source)
    found = survey(source, STAGE)
    jobs = [Job(key, (source,)) for key in found.briefs]
    return transfer(target, [source], jobs, found.damaged, found.splits, STAGE, show_progress=show_progress)


def refuse_inside(source: Cache, out: PathLike) -> None:
    """Nothing is written into a cache that is being read.

    Raises:
        UsageError: `out` is `source`, or lies in it.
    """
    target = layout_of(out)
    if target.remote is not None:
        inside = f"{target.place}/".startswith(f"{source.place}/")
    else:
        place = target.root.resolve()
        inside = source.path.resolve() in (place, *place.parents)
    if inside:
        problem = f"{out} is the cache that is read, or lies in it"
        raise UsageError(explain(problem, expected="another folder", remedy="Choose another folder to write"))


def declare_streams(target: Cache, source: Cache) -> None:
    """Every stream of `source` whose file is whole becomes one of `target`; raises as `Cache.declare`."""
    for info in load_streams(source.layout)[0].values():
        if info is not None:
            target.declare(info)
