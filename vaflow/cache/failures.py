"""Items that could not be copied, listed as extraction lists failures; and such lists of the caches that were read.

Evaluation counts the clips that are listed and not in the cache, so a list must not be lost with the cache's copy.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vaflow.cache import files
from vaflow.cache.cache import Cache
from vaflow.cache.schema import Json
from vaflow.errors import CacheError

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
