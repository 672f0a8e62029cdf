"""Several caches become one: parts of a data set that were extracted on different machines.

A stream must have been made with the same settings everywhere. Of an item that several caches have, one copy is kept;
where they were made from different sources, the caller says which.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import groupby
from typing import Any

from vaflow.cache.cache import Cache
from vaflow.cache.copy import Brief, Job, Key, Survey, TransferSummary, declare_streams, refuse_inside, survey, transfer
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
    """Join caches into `out`, or go on with that. What `out` has already takes part, as the first of them.

    Args:
        out: a folder that is empty, missing, or a cache.
        sources: the caches to join; their stores may differ.
        store: of `out`; None: its own, or that of the first source.
        prefer: which version of an item counts where the sources differ: of the first cache that has it, or the
            newest; the same cache for all such streams of an item. None: that is an error.

    Raises:
        UsageError: items were made from different sources and `prefer` does not choose (nothing was written then), or
            a name or folder is wrong.
        FingerprintError: a stream was made with different settings; every field that differs is named.
        CacheError: the disk refuses; the same call goes on later.
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
    jobs = [Job(key, tuple(cache for cache, _ in claims)) for key, claims in chosen.items()]
    damaged = [
        failure for part in found for failure in part.damaged if (failure.details["stream"], failure.item) not in chosen
    ]
    splits = {item: split for part in reversed(found) for item, split in part.splits.items()}
    return transfer(target, sources, jobs, damaged, splits, STAGE, show_progress=show_progress)


def _check_streams(caches: Sequence[Cache]) -> None:
    """Streams of one name have one fingerprint.

    Raises:
        FingerprintError: they do not; all differences of all streams are named.
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
        UsageError: sources differ, and nothing says which is to be preferred.
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
    """What the item was made from; of items that do not say, what they hold."""
    cache, brief = claim
    if brief.source:
        return canonical(_without_places(brief.source))
    try:
        _, arrays = cache.committed(*key)
    except CorruptError:  # listed when it is to be copied
        return b""
    digest = blake2b()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.digest()


def _without_places(source: Any) -> Any:
    """A source without what differs between copies of one file: a file with a digest of its content is that digest."""
    if isinstance(source, Mapping):
        if "blake2b" in source:
            return source["blake2b"]
        return {key: _without_places(value) for key, value in source.items()}
    return [_without_places(value) for value in source] if isinstance(source, list) else source


def _winner(claims: Sequence[Claim], caches: Sequence[Cache], prefer: str | None) -> Cache:
    """The cache that is preferred for an item, of those that have it; of equally new ones the first."""
    if prefer == "newest":
        return max(claims, key=lambda claim: (claim[1].created, -caches.index(claim[0])))[0]
    return min((cache for cache, _ in claims), key=caches.index)


def _of_winner(key: Key, own: Sequence[Claim], best: Cache, caches: Sequence[Cache], prefer: str | None) -> list[Claim]:
    """The claims of the same version as the preferred cache's; where that one lacks the stream, the next best."""
    preferred = best if any(cache is best for cache, _ in own) else _winner(own, caches, prefer)
    return next(v for v in _versions(key, own).values() if any(cache is preferred for cache, _ in v))


def _conflict(conflicts: Mapping[Key, Sequence[Claim]]) -> UsageError:
    lines = list(_conflict_lines(conflicts))
    for line in lines:
        log.debug("made from different sources: %s", line)
    more = f"; and {len(lines) - SHOWN} more (--verbose names all)" if len(lines) > SHOWN else ""
    return UsageError(
        explain(
            f"Some items were made from different sources ({len(lines)}): {'; '.join(lines[:SHOWN])}{more}",
            remedy="Say which counts with --prefer first or --prefer newest, or extract them again",
        )
    )


def _conflict_lines(conflicts: Mapping[Key, Sequence[Claim]]) -> Iterator[str]:
    """Each item with the first thing in which two of its sources differ."""
    for (stream, item), ((first, a), *others) in sorted(conflicts.items(), key=lambda pair: pair[0]):
        fields = (
            field
            for cache, b in others
            for field in differences(
                _without_places(a.source), _without_places(b.source), names=(f"{first.place} has", cache.place)
            )
        )
        yield f"{item!r} of stream {stream!r} ({next(fields, 'the arrays differ, and no source is told')})"
