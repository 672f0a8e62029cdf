"""Files of the same content under other names, found without reading a whole data set."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

from vaflow.extract.identity import content_digest

SAMPLE = 1 << 16  # bytes read at the head, the middle and the tail of files that have the same size


def same_content(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Groups of two or more different paths with equal bytes, each sorted; empty and unreadable files are in none.

    Most files are told apart by their size alone, nearly all others by three samples; only what is still alike is read
    whole.
    """
    groups: list[tuple[Path, ...]] = [tuple(sorted(set(paths)))]
    for tell in (_size, _sample, content_digest):
        groups = [part for group in groups for part in _parts(group, tell)]
    return sorted(groups)


def _parts(group: Sequence[Path], tell: Callable[[Path], Hashable]) -> list[tuple[Path, ...]]:
    found: dict[Hashable, list[Path]] = defaultdict(list)
    for path in group:
        try:
            mark = tell(path)
        except OSError:  # the clip that it belongs to has a finding of its own
            continue
        if mark:
            found[mark].append(path)
    return [tuple(part) for part in found.values() if len(part) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _sample(path: Path) -> str:
    size = path.stat().st_size
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
