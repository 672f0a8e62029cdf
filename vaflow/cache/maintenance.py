"""Maintenance of a cache: verify it, remove damage, remove clips, assign clips to other splits."""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vaflow import files
from vaflow.cache import layout_of, open_cache, read_manifest
from vaflow.cache.cache import Cache
from vaflow.cache.commit import discard, load_record, load_stream
from vaflow.cache.layout import Layout, fingerprint, manifest_document, seal
from vaflow.cache.packed import PackedCache
from vaflow.cache.schema import LABELS, Record, StoreName, StreamInfo, array_problems, escape
from vaflow.cache.stores import STORES, decode, file_problem, size_problem
from vaflow.errors import CacheError, CorruptError, UsageError, examples, explain, similar_names, visible
from vaflow.files import TEMPORARY

GRACE = 3600.0  # seconds after which no writer is still working on an attempt
_ATTEMPT = re.compile(r"[0-9a-f]{16}(\.h5)?")


@dataclass(frozen=True)
class Problem:
    """A file that differs from what was committed.

    Attributes:
        path: the file, below the cache.
        message: the damage.
        stream, item: its stream and item; None where they are unknown.
    """

    path: str
    message: str
    stream: str | None = None
    item: str | None = None

    def __str__(self) -> str:
        owner = f" (item {self.item!r} of stream {self.stream!r})" if self.item is not None else ""
        return visible(f"{self.path}{owner}: {self.message}")


def verify(cache: Cache, on_item: Callable[[], object] | None = None) -> list[Problem]:
    """Return the files that differ from what was committed or violate the schema; empty for an undamaged cache.

    Reads every file. Unfinished files of killed writers are not problems: see `leftovers`.
    """
    layout, problems = cache.layout, []
    try:
        read_manifest(layout)
    except (OSError, CacheError) as error:
        problems.append(Problem(layout.shown(layout.manifest), str(error)))
    streams, stream_problems = load_streams(layout)
    problems += stream_problems
    if isinstance(cache, PackedCache):
        packed_problems = cache.problems([info.name for info in streams.values() if info is not None], on_item)
        return problems + [Problem(cache.layout.shown(path), text, *where) for path, text, *where in packed_problems]
    lost: set[str] = set()
    for path in cache.record_files():
        name = path.parent.name
        if f"{name}.json" not in streams and name not in lost:
            lost.add(name)
            problems.append(Problem(f"streams/{name}.json", "the file is missing, but the stream has committed items"))
        problems += _item_problems(cache, path, streams.get(f"{name}.json"))
        if on_item is not None:
            on_item()
    return problems


def load_streams(layout: Layout) -> tuple[dict[str, StreamInfo | None], list[Problem]]:
    """Return the stream of each file name (None if damaged), and the problems of the files."""
    streams: dict[str, StreamInfo | None] = {}
    problems = []
    for path in sorted(p for p in layout.all_streams.glob("*.json") if not p.name.startswith(".")):
        try:
            streams[path.name] = load_stream(layout, path.name)
        except (OSError, ValueError) as error:
            streams[path.name] = None
            problems.append(Problem(layout.shown(path), str(error)))
    return streams, problems


def _item_problems(cache: Cache, path: Path, info: StreamInfo | None) -> list[Problem]:
    layout = cache.layout
    try:
        record = load_record(layout, path)
    except FileNotFoundError:  # dropped since it was listed
        return []
    except (OSError, ValueError) as error:
        return [Problem(layout.shown(path), str(error))]
    problems = [
        Problem(shown, message, record.stream, record.item) for shown, message in _attempt_problems(cache, record, info)
    ]
    if problems:
        try:
            layout.look(path)
            replaced = load_record(layout, path).attempt != record.attempt
        except FileNotFoundError:
            replaced = True
        except ValueError:
            replaced = False
        if replaced:  # the item was extracted again, or dropped, meanwhile
            return _item_problems(cache, path, info)
    return problems


def _attempt_problems(cache: Cache, record: Record, info: StreamInfo | None) -> Iterator[tuple[str, str]]:
    layout, store = cache.layout, STORES[cache.store]
    folder = layout.item(record.stream, record.item)
    blobs = {}
    damaged = False
    for name, facts in record.files.items():
        try:
            layout.fill([folder / name], again=True)
            files.refuse_links(layout.root, folder / name)
            problem = size_problem(folder / name, facts)
            if problem is None:
                blobs[name] = np.fromfile(folder / name, np.uint8)
                problem = file_problem(blobs[name], facts)
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
        if problem:
            damaged = True
            yield layout.shown(folder / name), problem
    if damaged:
        return
    try:
        arrays = decode(layout, store, record, blobs, list(record.arrays))
    except CorruptError as error:
        yield layout.shown(store.path(folder, record.attempt)), str(error)
        return
    shown = layout.shown(layout.record(record.stream, record.item))
    if info is not None:
        yield from ((shown, message) for message in array_problems(info, arrays))
        if record.fingerprint != fingerprint(info):
            yield shown, "its settings differ from those of its stream"


def leftovers(cache: Cache, older_than: float = 0.0) -> list[Path]:
    """Return attempts without a record and temporary files: unfinished work of killed or running writers.

    Args:
        cache: files of other programs are never listed. Empty for a cache on an object store.
        older_than: minimum seconds since the last change.
    """
    layout = cache.layout
    if layout.remote is not None:
        return []
    names = {p.name for p in layout.all_records.glob("*")} | {p.stem for p in layout.all_streams.glob("*.json")}
    paths = [p for pattern in ("", "streams/", "records/*/") for p in layout.root.glob(f"{pattern}{TEMPORARY}*")]
    for name in sorted(names):
        for folder in sorted(p for p in (layout.root / name).glob("*") if p.is_dir()):
            paths += _unrecorded(layout, cache.store, folder)
    newest, old = time.time() - older_than, []
    for path in paths:
        with suppress(FileNotFoundError):  # its writer has finished
            if path.stat().st_mtime <= newest and not files.is_behind_link(layout.root, path):
                old.append(path)
    return sorted(old)


def _unrecorded(layout: Layout, store: StoreName, folder: Path) -> list[Path]:
    """Return the attempts in an item's directory that its record does not name.

    They are listed before the record is read, because other writers may commit meanwhile.
    """
    attempts = [p for p in folder.iterdir() if _ATTEMPT.fullmatch(p.name)]
    temporary = [p for p in folder.iterdir() if p.name.startswith(TEMPORARY)]
    try:
        record = load_record(layout, layout.all_records / folder.parent.name / f"{folder.name}.json")
    except (OSError, ValueError):
        return attempts + temporary
    kept = STORES[store].path(folder, record.attempt)
    return [p for p in attempts if p != kept] + temporary


def repair(cache: Cache, on_item: Callable[[], object] | None = None) -> list[Problem]:
    """Remove damaged items, so that the next extraction recreates them; returns the problems.

    Items are removed record first. A damaged stream file is removed; its items are readable again once the stream is
    declared with the same settings. Leftovers older than an hour are removed, and the index is rebuilt. Nothing
    outside the cache is touched: links are removed, not followed.

    Raises:
        UsageError: the cache was opened for reading.
        CacheError: writing fails.
    """
    if not cache.writable:
        raise UsageError(
            f"The cache {cache.place} was opened for reading. Open it with open_cache(path, writable=True)."
        )
    layout = cache.layout
    problems = verify(cache, on_item)
    try:
        for problem in problems:
            path = layout.root / problem.path
            if problem.item is not None and problem.stream is not None:
                path = layout.record(problem.stream, problem.item)
            if files.is_behind_link(layout.root, path):
                continue
            if path == layout.manifest:
                layout.replace(path, seal(manifest_document(cache.store)))
            elif path.parent == layout.all_streams:
                layout.remove(path)
            else:
                discard(layout, STORES[cache.store], path)
        for path in leftovers(cache, GRACE):
            layout.remove(path)
        layout.index.unlink(missing_ok=True)
    except OSError as error:
        raise layout.cannot_write(error) from error
    cache.refresh_index()
    return problems


def open_for_repair(path: Path) -> Cache:
    """Open a cache for writing; restores a damaged or lost manifest if the records reveal the store.

    Raises:
        CorruptError, UsageError, SchemaError: as `open_cache`, if no record can be read.
    """
    try:
        return open_cache(path, writable=True)
    except (CorruptError, UsageError) as error:
        layout = layout_of(path)
        if isinstance(error, UsageError) and layout.manifest.exists():  # packed, or no write access
            raise
        for record_path in sorted(layout.all_records.glob("*/*.json")):
            with suppress(OSError, ValueError):
                record = load_record(layout, record_path)
                break
        else:
            raise
        store = "hdf5" if f"{record.attempt}.h5" in record.files else "zarr"
        layout.replace(layout.manifest, seal(manifest_document(store)))
        return open_cache(path, writable=True)


THREADS = 4  # commits wait for disk flushes


@dataclass(frozen=True)
class SplitChanges:
    """Clips that a list of splits assigns to another split.

    Attributes:
        changed: clip -> (old split, new split); None: no split.
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
    labels = cache.layout.attempts(LABELS)
    begun = {item for item in items if item and (labels / escape(item)).is_dir()}  # by a call that was killed
    unknown = [item for item in dict.fromkeys(items) if item not in known and item not in begun]
    if unknown:
        remedy = similar_names(unknown[0], known, f"Its clips are {examples(sorted(known)) or 'none'}")
        got = examples(unknown) or "an empty name"
        raise UsageError(explain(f"{cache.place} has no such clip", got=got, remedy=remedy))
    dropped = {item: known[item] for item in dict.fromkeys(items) if item in known}
    if dry_run or not items:
        return dropped
    for item, streams in dropped.items():
        for stream in streams:
            cache.drop(stream, item)
    # Last: if this call is killed, these directories show the next one which clips were removed.
    for folder in (cache.layout.item(stream, item) for item in items for stream in cache.streams()):
        with suppress(OSError):  # the directory is not empty: another writer's attempt
            files.refuse_links(cache.layout.root, folder)
            folder.rmdir()
    cache.refresh_index()
    return dropped


def other_versions(cache: Cache, streams: Iterable[str], items: Iterable[str]) -> dict[str, list[str]]:
    """Stream -> items that it has of another version of the video, or folder of frames, than the labels have.

    Streams without such items are left out, and items whose records state neither.
    """
    names, behind = list(streams), dict[str, list[str]]()
    for item in items:
        video = _video(cache.record(LABELS, item)) if cache.has(LABELS, item) else None
        for name in names if video is not None else ():
            if cache.has(name, item) and _video(cache.record(name, item)) not in (None, video):
                behind.setdefault(name, []).append(item)
    return behind


def _video(record: Record) -> dict[str, Any] | None:
    """The identity of the video or frames that a record was made from, without its place; None if it states none."""
    identity = record.source.get("video", record.source.get("frames"))
    if not isinstance(identity, dict):
        return None
    return {name: value for name, value in identity.items() if name not in ("name", "mtime_ns")}


def change_splits(
    cache: Cache, listed: Mapping[str, str], *, dry_run: bool = False, on_clip: Callable[[], object] | None = None
) -> SplitChanges:
    """Assign clips to splits. Labels, embeddings and sources stay as they are.

    The labels of a clip are committed again with another `meta.split`, by the usual protocol: a reader sees the old
    record or the new one. `source` keeps the split of the data set, so extraction does not change it back; a later
    edit of the data set's own list does.

    Args:
        listed: clip -> split.
        dry_run: return the changes without making them.
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
        expected = f"names such as {examples(clips)}" if clips else "a cache with clips"
        raise UsageError(explain(problem, expected=expected, got=examples(unknown) or "an empty list"))
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
