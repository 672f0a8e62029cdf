"""Changes to a cache without extraction: remove clips, assign them to other splits."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches

from vaflow.cache.cache import Cache
from vaflow.cache.schema import LABELS
from vaflow.errors import UsageError, explain
from vaflow.item_names import clip_and_person

THREADS = 4  # commits wait for disk flushes
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class SplitChanges:
    """Clips whose split changed: item -> (old split, new split); None means "no split".

    Attributes:
        changed: as above.
        unchanged: number of listed clips that have the listed split already.
        unlisted: clips of the cache that the list does not name; they keep their split.
        unknown: listed names that are not clips of the cache.
    """

    changed: dict[str, tuple[str | None, str]]
    unchanged: int
    unlisted: tuple[str, ...]
    unknown: tuple[str, ...]


def clip_streams(cache: Cache) -> dict[str, tuple[str, ...]]:
    """Clip -> the streams that hold it, labels first. Prompt sets, the items of text streams, are not clips."""
    names = [name for name, info in cache.streams().items() if info.kind != "text"]
    clips: dict[str, tuple[str, ...]] = {}
    for name in sorted(names, key=lambda name: (name != LABELS, name)):
        for item in cache.source_stamps(name):
            clips[item] = (*clips.get(item, ()), name)
    return dict(sorted(clips.items()))


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
        expected = f"the data set of this cache, with clips such as {_some(list(known))}"
        got = f"{len(present)} other clips" if present else "no clips"
        raise UsageError(explain(f"No clip of {cache.place} is in {origin}", expected=expected, got=got))
    return absent


def drop_clips(cache: Cache, items: Collection[str], *, dry_run: bool = False) -> dict[str, tuple[str, ...]]:
    """Remove clips: their records, then their arrays, from every stream. Labels go first, as they make a clip exist.

    A killed call leaves embeddings of clips without labels; the same call removes them.

    Args:
        items: clip ids; nothing is removed if one of them is unknown.

    Returns:
        Clip -> the streams that contained it.

    Raises:
        UsageError: a clip is not in the cache.
        CacheError: writing fails.
    """
    known = clip_streams(cache)
    unknown = [item for item in dict.fromkeys(items) if item not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, n=3)
        remedy = f"Similar names: {', '.join(close)}" if close else f"Its clips are {_some(sorted(known)) or 'none'}"
        raise UsageError(explain(f"{cache.place} has no such clip", got=_some(unknown), remedy=remedy))
    dropped = {item: known[item] for item in dict.fromkeys(items)}
    if dry_run or not dropped:
        return dropped
    for item, streams in dropped.items():
        for stream in streams:
            cache.drop(stream, item)
            with suppress(OSError):  # the directory is not empty: another writer's attempt
                cache.layout.item(stream, item).rmdir()
    cache.refresh_index()
    return dropped


def change_splits(
    cache: Cache, listed: Mapping[str, str], *, dry_run: bool = False, on_clip: Callable[[], object] | None = None
) -> SplitChanges:
    """Assign clips to splits. Labels, embeddings and sources stay as they are.

    The labels of a clip are committed again with another `meta.split`, by the usual protocol: a reader sees the old
    record or the new one. `source` keeps the split of the data set, so extraction does not change it back; a later
    edit of the data set's own list does.

    Args:
        listed: clip -> split.
        on_clip: called after each clip that is changed.

    Raises:
        UsageError: no name in the list is a clip of the cache.
        CorruptError: the labels of a clip are damaged.
        CacheError: writing fails.
    """
    clips = cache.items()
    unknown = tuple(sorted(listed.keys() - set(clips)))
    if len(unknown) == len(listed):
        problem = f"The list names no clip of {cache.place}"
        expected = f"names such as {_some(clips)}" if clips else "a cache with clips"
        raise UsageError(explain(problem, expected=expected, got=_some(list(unknown)) if unknown else "an empty list"))
    old = {item: cache.meta(item).get("split") for item in clips if item in listed}
    changed = {item: (split, listed[item]) for item, split in old.items() if split != listed[item]}

    def commit(item: str) -> None:
        record, arrays = cache.committed(LABELS, item)
        cache.adopt(replace(record, meta={**record.meta, "split": listed[item]}), arrays)
        if on_clip is not None:
            on_clip()

    if changed and not dry_run:
        with ThreadPoolExecutor(THREADS, "vaflow-splits") as pool:
            for _ in pool.map(commit, changed):  # raises the first error of a thread
                pass
        cache.refresh_index()
    unlisted = tuple(item for item in clips if item not in listed)
    return SplitChanges(changed, len(old) - len(changed), unlisted, unknown)


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + rest
