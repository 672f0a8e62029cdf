"""Merge caches: parts of a data set that were extracted on different machines.

A stream must have the same settings in all caches. An item in several caches is kept once; where the versions were
made from different sources, the caller chooses.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import groupby
from typing import Any

from vaflow.cache.cache import Cache
from vaflow.cache.copy import (
    Brief,
    ItemCopy,
    Key,
    Survey,
    TransferSummary,
    declare_streams,
    refuse_inside,
    survey,
    transfer,
)
from vaflow.cache.documents import canonical
from vaflow.cache.opening import PathLike, create_cache, is_cache, open_cache
from vaflow.cache.schema import StreamInfo
from vaflow.cache.streams import differences
from vaflow.cache.verify import load_streams
from vaflow.errors import CorruptError, FingerprintError, UsageError, explain

log = logging.getLogger(__name__)

STAGE = "merge"
PREFERENCES = ("first", "newest")
SHOWN = 10  # conflicts that a message names; the log has all

Claim = tuple[Cache, Brief]  # a cache that has an item, and what its record says


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
        store: of `out`; None: its own, or that of the first source.
        prefer: version to keep where sources differ: "first" (of the first cache that has the item) or "newest"; the
            same cache for all such streams of an item. None: raise an error.

    Raises:
        UsageError: items were made from different sources and `prefer` is None (nothing is written then), or a name or
            folder is wrong.
        FingerprintError: a stream was made with different settings; every field that differs is named.
        CacheError: the disk refuses; the same call resumes later.
    """
    if prefer is not None and prefer not in PREFERENCES:
        raise UsageError(explain("Unknown value for prefer", got=prefer, choices=PREFERENCES))
    for source in sources:
        refuse_inside(source, out)
    before = [open_cache(out)] if is_cache(out) else []
    caches = [*before, *sources]
    _check_streams(caches)
    found = [survey(cache, STAGE) for cache in caches]
    chosen = _choose(caches, found, prefer)
    target = create_cache(out, store=store or caches[0].store)
    for source in sources:
        declare_streams(target, source)
    copies = [ItemCopy(key, tuple(cache for cache, _ in claims)) for key, claims in chosen.items()]
    damaged = [
        failure for part in found for failure in part.damaged if (failure.details["stream"], failure.item) not in chosen
    ]
    splits = {item: split for part in reversed(found) for item, split in part.splits.items()}
    return transfer(target, sources, copies, damaged, splits, STAGE, show_progress=show_progress)


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
        raise FingerprintError(
            explain(
                f"The caches were made with different settings. {'. '.join(problems)}",
                remedy="Extract the parts with the same settings, or keep the caches apart",
            )
        )


def _choose(caches: Sequence[Cache], found: Sequence[Survey], prefer: str | None) -> dict[Key, list[Claim]]:
    """Item -> the caches to take it from, best first; all of them were made from the same source.

    Raises:
        UsageError: sources differ, and `prefer` is None.
    """
    claims: dict[Key, list[Claim]] = {}
    for cache, part in zip(caches, found, strict=True):
        for key, brief in part.briefs.items():
            claims.setdefault(key, []).append((cache, brief))
    conflicts = {key: own for key, own in claims.items() if len(own) > 1 and len(_versions(key, own)) > 1}
    if conflicts and prefer is None:
        raise _conflict(conflicts)
    for _, group in groupby(sorted(conflicts, key=lambda key: (key[1], key[0])), key=lambda key: key[1]):
        keys = list(group)
        best = _winner([claim for key in keys for claim in conflicts[key]], caches, prefer)
        for key in keys:
            claims[key] = _of_winner(key, conflicts[key], best, caches, prefer)
    return claims


def _versions(key: Key, own: Sequence[Claim]) -> dict[bytes, list[Claim]]:
    """The claims to one item by what it was made from, in order."""
    versions: dict[bytes, list[Claim]] = {}
    for claim in own:
        versions.setdefault(_content(key, claim), []).append(claim)
    return versions


def _content(key: Key, claim: Claim) -> bytes:
    """Digest of the item's source; of an item without a source, of its arrays."""
    cache, brief = claim
    if brief.source:
        return canonical(_without_places(brief.source))
    try:
        _, arrays = cache.committed(*key)
    except CorruptError:  # the copy lists it
        return b""
    digest = blake2b()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.digest()


def _without_places(source: Any) -> Any:
    """A source with each file replaced by its content digest, if it has one: path and time differ between copies."""
    if isinstance(source, Mapping):
        if "blake2b" in source:
            return source["blake2b"]
        return {key: _without_places(value) for key, value in source.items()}
    return [_without_places(value) for value in source] if isinstance(source, list) else source


def _winner(claims: Sequence[Claim], caches: Sequence[Cache], prefer: str | None) -> Cache:
    """The preferred cache among those that have an item; of equally new ones the first."""
    if prefer == "newest":
        return max(claims, key=lambda claim: (claim[1].created, -caches.index(claim[0])))[0]
    return min((cache for cache, _ in claims), key=caches.index)


def _of_winner(key: Key, own: Sequence[Claim], best: Cache, caches: Sequence[Cache], prefer: str | None) -> list[Claim]:
    """The claims of the same version as the preferred cache's; if that cache lacks the stream, the next best."""
    preferred = best if any(cache is best for cache, _ in own) else _winner(own, caches, prefer)
    return next(v for v in _versions(key, own).values() if any(cache is preferred for cache, _ in v))


def _conflict(conflicts: Mapping[Key, Sequence[Claim]]) -> UsageError:
    lines = list(_conflict_lines(conflicts))
    for line in lines:
        log.debug("made from different sources: %s", line)
    more = f"; and {len(lines) - SHOWN} more (--verbose lists all)" if len(lines) > SHOWN else ""
    return UsageError(
        explain(
            f"Some items were made from different sources ({len(lines)}): {'; '.join(lines[:SHOWN])}{more}",
            remedy="Choose a version with --prefer first or --prefer newest, or extract them again",
        )
    )


def _conflict_lines(conflicts: Mapping[Key, Sequence[Claim]]) -> Iterator[str]:
    """Each item with the first difference between its sources."""
    for (stream, item), ((first, a), *others) in sorted(conflicts.items(), key=lambda pair: pair[0]):
        fields = (
            field
            for cache, b in others
            for field in differences(
                _without_places(a.source), _without_places(b.source), names=(f"{first.place} has", cache.place)
            )
        )
        yield f"{item!r} of stream {stream!r} ({next(fields, 'the arrays differ, and the records have no source')})"
