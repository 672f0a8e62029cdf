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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from vaflow.cache.cache import Cache
from vaflow.cache.commit import load_record
from vaflow.cache.names import escape
from vaflow.cache.opening import PathLike, create_cache, layout_of
from vaflow.cache.schema import LABELS, Json, Record
from vaflow.cache.verify import load_streams
from vaflow.errors import CacheError, CorruptError, DataError, MissingError, UsageError, explain
from vaflow.failures import FAILURES, Failure, read_failures, write_failures

CARRIED = "failures-carried.jsonl"


def _carry(target: Cache, failures: Iterable[Failure]) -> None:
    """Keep, in `failures-carried.jsonl`, failures of other caches' lists whose clips are not in the target.

    Evaluation counts the clips that are listed and not in the cache, so a list must survive the copy.
    """
    try:
        known = set(target.items())
    except CacheError:  # a damaged record in the target: better too many lines than too few
        known = set()
    unique = {json.dumps(failure.line(), sort_keys=True): failure for failure in failures if failure.item not in known}
    write_failures(target.path / CARRIED, unique.values())


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
    damaged: list[Failure]

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


def _failure(cache: Cache, path: Path, stage: str, problem: str) -> Failure:
    message = explain(
        f"{cache.layout.shown(path)} of the cache {cache.place} cannot be used: {problem}",
        remedy=f"Run `vaflow cache repair {cache.place}`, and extract again",
    )
    stream = {"stream": _name_of(path.parent.name)}
    return Failure(_name_of(path.stem), stage, "CorruptError", message, stream)


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
    failures: tuple[Failure, ...]
    failures_file: Path | str

    @property
    def nothing_done(self) -> bool:
        """Whether every item failed."""
        return bool(self.failures) and not self.copied and not self.there


def transfer(
    target: Cache,
    sources: Sequence[Cache],
    jobs: Iterable[Job],
    damaged: Iterable[Failure],
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
    texts = {name for name, info in target.streams().items() if info.kind == "text"}
    path = target.path / FAILURES
    failures, done = [_with_split(failure, texts, splits) for failure in damaged], Counter[Outcome]()
    # Failures that an earlier copy into the target listed itself have a stream; they are found anew.
    carried = [failure for failure in read_failures(target.path) if "stream" not in failure.details]
    carried += [failure for cache in sources for failure in read_failures(cache.path)]
    try:
        with tqdm(total=len(ordered), desc=stage, unit="item", disable=not show_progress, smoothing=0.1) as bar:
            for part in (ordered[:features], ordered[features:]):
                for result in _copies(target, part, stage):
                    if isinstance(result, Failure):
                        failures.append(_with_split(result, texts, splits))
                    else:
                        done[result] += 1
                    bar.update()
    finally:
        try:
            write_failures(path, failures)
            _carry(target, carried)
            target.refresh_index()
        except OSError as error:
            raise target.layout.cannot_write(error) from error
    written = done["new"] + done["replaced"]
    return TransferSummary(
        target.place, written, done["replaced"], done["there"], tuple(failures), target.layout.named(path)
    )


def _with_split(failure: Failure, texts: set[str], splits: Mapping[str, str | None]) -> Failure:
    """The failure with its clip's split, if that is known; a prompt set belongs to no split."""
    if failure.details["stream"] in texts:
        return replace(failure, details={**failure.details, "split": None})
    if failure.item in splits:
        return replace(failure, details={**failure.details, "split": splits[failure.item]})
    return failure


def _copies(target: Cache, jobs: Sequence[Job], stage: str) -> Iterable[Outcome | Failure]:
    """Several at a time; what one of them raises cancels those that have not begun."""
    with (
        ThreadPoolExecutor(THREADS, "vaflow-copy") as pool,
        closing(pool.map(lambda job: _copy(target, job, stage), jobs)) as results,  # type: ignore[type-var]
    ):
        yield from results


def _copy(target: Cache, job: Job, stage: str) -> Outcome | Failure:
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
    return Failure(item, stage, type(reasons[0]).__name__, message, {"stream": stream})


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
