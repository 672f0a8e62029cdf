"""Merge caches: parts of a data set that were extracted on different machines.

A stream must have the same settings in all caches. An item in several caches is kept once; if its versions have
different sources, the caller chooses one.
"""

import logging
from collections.abc import Mapping, Sequence
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
SHOWN = 10  # conflicts in an error message; the log lists all

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
        store: of `out`; None: its own, or that of the first source.
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
    surveys = [survey(cache, STAGE) for cache in caches]
    chosen = _choose(caches, surveys, prefer)
    target = create_cache(out, store=store or caches[0].store)
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
                f"The caches have different settings. {'. '.join(problems)}",
                remedy="Extract the parts with the same settings, or keep the caches apart",
            )
        )


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
    """Group the claims to one item by the content of its source, in order."""
    versions: dict[bytes, list[Claim]] = {}
    for claim in claims:
        versions.setdefault(_content(key, claim), []).append(claim)
    return versions


def _content(key: Key, claim: Claim) -> bytes:
    """Return a digest of the item's source, or of its arrays if it has no source."""
    cache, brief = claim
    if brief.source:
        return canonical(_without_places(brief.source))
    try:
        _, arrays = cache.committed(*key)
    except CorruptError:  # the copy reports it
        return b""
    digest = blake2b()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.digest()


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
    for (stream, item), ((first, a), *others) in sorted(conflicts.items(), key=lambda pair: pair[0]):
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
    return UsageError(
        explain(
            f"Some items have different sources in the caches ({len(lines)}): {'; '.join(lines[:SHOWN])}{more}",
            remedy="Choose a version with --prefer first or --prefer newest, or extract them again",
        )
    )
