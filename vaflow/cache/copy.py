"""Copy items between caches of any store, verified and bit for bit: convert a cache, merge caches.

A copy keeps source, facts and creation time; only its attempt is new. Unreadable items are listed in `failures.jsonl`
and skipped. Running the copy again resumes it.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from vaflow.cache import PathLike, create_cache, is_cache, layout_of, open_cache
from vaflow.cache.cache import Cache
from vaflow.cache.commit import differences
from vaflow.cache.costs import carry_costs
from vaflow.cache.layout import canonical
from vaflow.cache.maintenance import load_streams
from vaflow.cache.packed import refuse_writing
from vaflow.cache.schema import LABELS, PACKED, STORES, Array, Json, Record, StreamInfo, unescape
from vaflow.errors import (
    CacheError,
    CorruptError,
    DataError,
    FingerprintError,
    MissingError,
    UsageError,
    command,
    explain,
)
from vaflow.files import FAILURES, Failure, read_failures, write_failures

log = logging.getLogger(__name__)

CARRIED = "failures-carried.jsonl"
THREADS = 4  # commits wait for the disk to flush
COPY_OF = ("source", "meta", "created", "arrays", "fingerprint")  # members that an item and its copy share
PREFERENCES = ("first", "newest")
SHOWN = 10  # conflicts in an error message; the log lists all

Key = tuple[str, str]  # stream, item
Outcome = Literal["current", "new", "replaced"]


@dataclass(frozen=True)
class Brief:
    """The members of a record that decide which version of an item is copied."""

    source: Json
    created: str
    split: str | None


@dataclass(frozen=True)
class Survey:
    """The committed items of a cache, and those that cannot be used."""

    briefs: dict[Key, Brief]
    damaged: list[Failure]

    @property
    def splits(self) -> dict[str, str | None]:
        """Clip -> split."""
        return {item: brief.split for (stream, item), brief in self.briefs.items() if stream == LABELS}


def survey(cache: Cache, stage: str) -> Survey:
    """Read all records. Unreadable records, and those whose stream file is lost, are failures of `stage`."""
    layout = cache.layout
    streams, _ = load_streams(layout)
    result = Survey({}, [])
    for path in cache.record_files():
        try:
            record = cache.record_at(path)
            if streams.get(f"{path.parent.name}.json") is None:
                raise ValueError(f"streams/{path.parent.name}.json, which describes its stream, is missing or damaged")
        except FileNotFoundError:  # dropped since it was listed
            continue
        except (OSError, ValueError) as error:
            message = explain(
                f"{layout.shown(path)} of the cache {cache.place} cannot be used: {error}",
                remedy=f"Run `{command('cache', 'repair', cache.place)}`, then extract again",
            )
            stream = {"stream": unescape(path.parent.name)}
            result.damaged.append(Failure(unescape(path.stem), stage, "CorruptError", message, stream))
            continue
        split = record.meta.get("split") if record.stream == LABELS else None
        result.briefs[record.stream, record.item] = Brief(record.source, record.created, split)
    return result


@dataclass(frozen=True)
class ItemCopy:
    """One item to copy, from the first of `origins` that holds it undamaged.

    Attributes:
        key: stream and item of the copy.
        origin_item: the item in `origins`, if its id differs.
        change: returns the record of the copy; by default the same.
        change_arrays: returns the arrays of the copy, by name; None: the same.
    """

    key: Key
    origins: tuple[Cache, ...]
    origin_item: str = ""
    change: Callable[[Record], Record] = lambda record: record
    change_arrays: Callable[[Mapping[str, Array]], Mapping[str, Array]] | None = None

    @property
    def origin_key(self) -> Key:
        """Stream and item in `origins`."""
        return self.key[0], self.origin_item or self.key[1]


@dataclass(frozen=True)
class TransferSummary:
    """Counts and failures of a conversion or merge.

    Attributes:
        out: path or URL of the cache that items were copied into.
        copied: items written; replaced: of those, items that replaced another version.
        there: items that were up to date.
        failures: items that could not be read; `failures_file` lists them.
    """

    out: str
    copied: int
    replaced: int
    there: int
    failures: tuple[Failure, ...]
    failures_file: Path | str


def transfer(
    target: Cache,
    sources: Sequence[Cache],
    copies: Iterable[ItemCopy],
    damaged: Iterable[Failure],
    splits: Mapping[str, str | None],
    stage: str,
    *,
    show_progress: bool = False,
) -> TransferSummary:
    """Copy items, labels last: a clip exists once its labels do. The target lists the failures.

    Args:
        target: has every stream that the copies name.
        sources: caches that are read; their failure lists are carried over.
        damaged: items known to be unreadable, for the list.
        splits: clip -> split, for the list.
        stage: "convert", "merge" or "people", for the list and the progress bar.

    Raises:
        CacheError: writing fails; the same call resumes later.
    """
    from tqdm import tqdm

    ordered = sorted(copies, key=lambda copy: (copy.key[0] == LABELS, copy.key))
    features = sum(copy.key[0] != LABELS for copy in ordered)
    texts = {name for name, info in target.streams().items() if info.kind == "text"}
    path = target.path / FAILURES
    failures, done = list(damaged), Counter[Outcome]()
    # Failures with a stream were listed by an earlier copy into the target; this one lists them again if they persist.
    carried = [failure for failure in read_failures(target.path) if "stream" not in failure.details]
    carried += [failure for cache in sources for failure in read_failures(cache.path)]
    try:
        with tqdm(total=len(ordered), desc=stage, unit="item", disable=not show_progress, smoothing=0.1) as bar:
            for part in (ordered[:features], ordered[features:]):
                with (
                    ThreadPoolExecutor(THREADS, "vaflow-copy") as pool,  # an error cancels copies that have not started
                    closing(pool.map(lambda copy: _copy(target, copy, stage), part)) as results,  # type: ignore[type-var]
                ):
                    for result in results:
                        if isinstance(result, Failure):
                            failures.append(result)
                        else:
                            done[result] += 1
                        bar.update()
    finally:
        prompt_sets = [f.item for f in failures if f.details.get("stream") in texts]  # they have no split
        known: dict[str, str | None] = {**splits, **dict.fromkeys(prompt_sets)}
        failures = [
            replace(f, details={**f.details, "split": known[f.item]}) if f.item in known else f for f in failures
        ]
        try:
            write_failures(path, failures)
            _carry(target, carried)
            carry_costs(target, sources)
            target.refresh_index()
        except OSError as error:
            raise target.layout.cannot_write(error) from error
    written = done["new"] + done["replaced"]
    return TransferSummary(
        target.place, written, done["replaced"], done["current"], tuple(failures), target.layout.named(path)
    )


def _carry(target: Cache, failures: Iterable[Failure]) -> None:
    """Keep, in `failures-carried.jsonl`, failures of other caches' lists whose clips are not in the target.

    Evaluation counts the clips that are listed and not in the cache, so a list must survive the copy.
    """
    try:
        known = set(target.items())
    except CacheError:  # a damaged record in the target: keep every line
        known = set()
    unique = {json.dumps(failure.line(), sort_keys=True): failure for failure in failures if failure.item not in known}
    write_failures(target.path / CARRIED, unique.values())


def _copy(target: Cache, copy: ItemCopy, stage: str) -> Outcome | Failure:
    """Copy one item, unless its copy is up to date; a failure lists why each origin cannot provide it."""
    stream, item = copy.key
    known: Record | None = None
    if target.has(stream, item):
        with suppress(CorruptError, MissingError):  # a damaged copy is replaced
            known = target.record(stream, item)
    reasons: list[Exception] = []
    for origin in copy.origins:
        try:
            if known is not None:
                record = copy.change(origin.record(*copy.origin_key))
                same = COPY_OF if copy.change_arrays is None else [name for name in COPY_OF if name != "arrays"]
                if all(getattr(known, name) == getattr(record, name) for name in same):
                    return "current"
            record, arrays = origin.committed(*copy.origin_key)
            changed = copy.change_arrays(arrays) if copy.change_arrays else arrays
            target.adopt(copy.change(record), changed)  # write errors of the target are raised: the item is not damaged
        except (CorruptError, MissingError, DataError, OSError) as error:
            reasons.append(error)
        else:
            return "new" if known is None else "replaced"
    message = " ".join(dict.fromkeys(map(str, reasons)))
    return Failure(item, stage, type(reasons[0]).__name__, message, {"stream": stream})


def convert(source: Cache, out: PathLike, store: str, *, show_progress: bool = False) -> TransferSummary:
    """Copy a cache into another store; resumes a copy that was interrupted. Damaged items are listed and skipped.

    An item that was replaced in `source` replaces its copy; an item that was dropped there stays in the copy.

    Raises:
        UsageError: unknown store, or `out` cannot be written, has another store, or is inside `source`.
        SchemaError: `out` has other contents than a cache.
        FingerprintError: `out` has a stream of the same name with other settings.
        CacheError: writing fails; the same call resumes later.
    """
    refuse_inside(source, out)
    target = create_cache(out, store=store)
    declare_streams(target, source)
    result = survey(source, "convert")
    copies = [ItemCopy(key, (source,)) for key in result.briefs]
    return transfer(target, [source], copies, result.damaged, result.splits, "convert", show_progress=show_progress)


def refuse_inside(source: Cache, out: PathLike) -> None:
    """Refuse to write into a cache that is read.

    Raises:
        UsageError: `out` is `source`, or inside it.
    """
    target = layout_of(out)
    if target.remote is not None:
        inside = f"{target.place}/".startswith(f"{source.place}/")
    else:
        target_root = target.root.resolve()
        inside = source.path.resolve() in (target_root, *target_root.parents)
    if inside:
        problem = f"{out} is the cache to read, or inside it"
        raise UsageError(explain(problem, expected="another folder", remedy="Choose another folder to write"))


def declare_streams(target: Cache, source: Cache) -> None:
    """Declare every undamaged stream of `source` in `target`; raises as `Cache.declare`."""
    for info in load_streams(source.layout)[0].values():
        if info is not None:
            target.declare(info)


Claim = tuple[Cache, Brief]  # a cache that has an item, and facts of its record


def merge(
    out: PathLike,
    sources: Sequence[Cache],
    *,
    store: str | None = None,
    prefer: str | None = None,
    show_progress: bool = False,
) -> TransferSummary:
    """Merge caches into `out`; resumes an interrupted merge. Items already in `out` take part, as the first cache.

    Args:
        out: a folder that is empty, missing, or a cache.
        sources: the caches to merge; their stores may differ.
        store: of `out`; None: its own, or that of the first source (zarr if that is packed).
        prefer: version to keep where sources differ: "first" (of the first cache that has the item) or "newest"; the
            same cache for all such streams of an item. None: raise an error.

    Raises:
        UsageError: items have different sources and `prefer` is None (nothing is written), or a name or directory is
            wrong.
        FingerprintError: a stream has different settings; every field that differs is named.
        CacheError: writing fails; the same call resumes later.
    """
    if prefer is not None and prefer not in PREFERENCES:
        raise UsageError(explain("Unknown value for prefer", got=prefer, choices=PREFERENCES))
    for source in sources:
        refuse_inside(source, out)
    before = [open_cache(out)] if is_cache(out) else []
    caches = [*before, *sources]
    _check_streams(caches)
    surveys = [survey(cache, "merge") for cache in caches]
    chosen = _choose(caches, surveys, prefer)
    if before and before[0].store == PACKED:
        raise refuse_writing(before[0].layout)
    target = create_cache(out, store=store or (caches[0].store if caches[0].store in STORES else "zarr"))
    for source in sources:
        declare_streams(target, source)
    copies = [ItemCopy(key, tuple(cache for cache, _ in claims)) for key, claims in chosen.items()]
    damaged = [
        failure
        for part in surveys
        for failure in part.damaged
        if (failure.details["stream"], failure.item) not in chosen
    ]
    splits = {item: split for part in reversed(surveys) for item, split in part.splits.items()}
    return transfer(target, sources, copies, damaged, splits, "merge", show_progress=show_progress)


def _check_streams(caches: Sequence[Cache]) -> None:
    """Check that streams of one name have one fingerprint.

    Raises:
        FingerprintError: they differ; all differences of all streams are named.
    """
    known: dict[str, tuple[Cache, StreamInfo]] = {}
    problems = []
    for cache in caches:
        for info in load_streams(cache.layout)[0].values():
            if info is None:
                continue
            first, other = known.setdefault(info.name, (cache, info))
            names = (f"{first.place} has", cache.place)
            fields = "; ".join(differences(asdict(other), asdict(info), names=names))
            problems += [f"stream {info.name!r}: {fields}"] if fields else []
    if problems:
        remedy = "Extract the parts with the same settings, or keep the caches apart"
        raise FingerprintError(explain(f"The caches have different settings. {'. '.join(problems)}", remedy=remedy))


def _choose(caches: Sequence[Cache], surveys: Sequence[Survey], prefer: str | None) -> dict[Key, list[Claim]]:
    """Return item -> the caches to copy it from, best first, all with the same source.

    Raises:
        UsageError: sources differ, and `prefer` is None.
    """
    claims: dict[Key, list[Claim]] = {}
    for cache, part in zip(caches, surveys, strict=True):
        for key, brief in part.briefs.items():
            claims.setdefault(key, []).append((cache, brief))
    conflicts = {key: held for key, held in claims.items() if len(held) > 1 and len(_versions(key, held)) > 1}
    if conflicts and prefer is None:
        raise _conflict(conflicts)
    for _, group in groupby(sorted(conflicts, key=lambda key: (key[1], key[0])), key=lambda key: key[1]):
        keys = list(group)
        best = _winner([claim for key in keys for claim in conflicts[key]], caches, prefer)
        for key in keys:
            held = conflicts[key]
            # The claims of the same version as in the preferred cache; if that cache lacks the stream, the next best.
            preferred = best if any(cache is best for cache, _ in held) else _winner(held, caches, prefer)
            versions = _versions(key, held).values()
            claims[key] = next(version for version in versions if any(cache is preferred for cache, _ in version))
    return claims


def _versions(key: Key, claims: Sequence[Claim]) -> dict[bytes, list[Claim]]:
    """Group the claims to one item, in order, by the content of its source, or of its arrays if it has no source."""
    versions: dict[bytes, list[Claim]] = {}
    for cache, brief in claims:
        content = canonical(_without_places(brief.source))
        if not brief.source:
            digest = blake2b()
            with suppress(CorruptError):  # the copy reports it
                for name, array in sorted(cache.committed(*key)[1].items()):
                    digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
            content = digest.digest()
        versions.setdefault(content, []).append((cache, brief))
    return versions


def _without_places(source: Any) -> Any:
    """Replace each file of a source by its content digest, if it has one: paths and times differ between copies."""
    if isinstance(source, Mapping):
        if "blake2b" in source:
            return source["blake2b"]
        return {key: _without_places(value) for key, value in source.items()}
    return [_without_places(value) for value in source] if isinstance(source, list) else source


def _winner(claims: Sequence[Claim], caches: Sequence[Cache], prefer: str | None) -> Cache:
    """Return the preferred cache among those that have an item; of equally new ones the first."""
    if prefer == "newest":
        return max(claims, key=lambda claim: (claim[1].created, -caches.index(claim[0])))[0]
    return min((cache for cache, _ in claims), key=caches.index)


def _conflict(conflicts: Mapping[Key, Sequence[Claim]]) -> UsageError:
    """Return the error that names each item with the first difference between its sources."""
    lines = []
    for (stream, item), ((first, a), *others) in sorted(conflicts.items()):
        fields = (
            field
            for cache, b in others
            for field in differences(
                _without_places(a.source), _without_places(b.source), names=(f"{first.place} has", cache.place)
            )
        )
        difference = next(fields, "the arrays differ, and the records have no source")
        lines.append(f"{item!r} of stream {stream!r} ({difference})")
        log.debug("Different sources: %s", lines[-1])
    more = f"; and {len(lines) - SHOWN} more (--verbose lists all)" if len(lines) > SHOWN else ""
    problem = f"Some items have different sources in the caches ({len(lines)}): {'; '.join(lines[:SHOWN])}{more}"
    remedy = "Choose a version with --prefer first or --prefer newest, or extract them again"
    return UsageError(explain(problem, remedy=remedy))
