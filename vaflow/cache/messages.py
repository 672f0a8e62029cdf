"""Errors that several modules of the cache raise, worded once."""

from pathlib import Path

from vaflow.cache.names import Layout
from vaflow.errors import CacheError, CorruptError, explain


def corrupt(
    layout: Layout, path: Path, problem: str, stream: str | None = None, item: str | None = None
) -> CorruptError:
    """The error for a file whose bytes are not what was committed."""
    where = f", item {item!r} of stream {stream!r}" if item is not None else ""
    return CorruptError(
        explain(
            f"{layout.shown(path)} of the cache {layout.place} is damaged{where}: {problem}",
            remedy=f"Run `vaflow cache repair {layout.place}`, then extract again: only what was damaged is made anew",
        )
    )


def cannot_write(layout: Layout, error: OSError) -> CacheError:
    """The error for a disk that refuses."""
    return CacheError(
        explain(
            f"Cannot write into the cache {layout.place}: {error}",
            remedy="Make room or give write access, then run the same command again: it goes on where it stopped",
        )
    )
