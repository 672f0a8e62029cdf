"""Flip every bit of a small cache, one at a time, and check that `verify` detects it."""

import shutil
from pathlib import Path

from cache_toys import arrays, stream

from vaflow.cache import create_cache, open_cache
from vaflow.cache.maintenance import verify
from vaflow.errors import CacheError, UsageError


def tiny_cache(path: Path, store: str) -> Path:
    """One item of a visual stream and its labels; all committed files are small."""
    cache = create_cache(path, store=store)
    for kind in ("visual", "labels"):
        cache.declare(stream(kind))
        meta = {"split": "train", "duration": 2.0} if kind == "labels" else {}
        cache.write(kind, "clip", arrays(stream(kind), 2), meta=meta, source={"size": 1})
    return cache.path


def committed_files(path: Path) -> list[Path]:
    """All files except the index, which can be deleted at any time."""
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "index.json")


def is_detected(path: Path) -> bool:
    """Whether the cache is rejected or `verify` reports a problem."""
    try:
        return bool(verify(open_cache(path)))
    except (CacheError, UsageError):
        return True


def every_flip(path: Path, store: str, *, step: int = 1) -> tuple[int, list[str]]:
    """Flip every `step`-th bit; return the number of flips and the undetected ones.

    Each file is damaged in a cache of only what it belongs to, so that a look at it takes a millisecond or two.
    """
    tiny_cache(path, store)
    tried, lost = 0, []
    for file in committed_files(path):
        data = file.read_bytes()
        name = file.relative_to(path)
        alone = path.with_name(f"{path.name}-alone")
        _only(path, alone, name)
        place = alone / name
        for bit in range(tried % step, 8 * len(data), step):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            place.write_bytes(flipped)
            tried += 1
            if not is_detected(alone):
                lost.append(f"{name}, bit {bit}")
        shutil.rmtree(alone)
    return tried, lost


def _only(path: Path, alone: Path, name: Path) -> None:
    """A copy without the records of the other stream, if the file belongs to one stream."""
    shutil.copytree(path, alone)
    stream_folder = next((part for part in name.parts if part in ("visual", "labels")), None)
    for other in {"visual", "labels"} - {stream_folder}:
        if stream_folder is not None:
            shutil.rmtree(alone / "records" / other)
