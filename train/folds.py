"""Cross-validation: clips in parts of about as many labelled frames, a source video always whole in one part.

The two persons of one video (`_left`, `_right`) share picture and sound, so a part boundary between them would leak.
A part is a split with a name of its own, "fold2of5"; all other parts together are "rest2of5". Whatever takes the name
of a split takes these, too. The parts follow from the cache alone: no seed, no file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS
from vaflow.errors import UsageError, explain
from vaflow.train.config import TrainConfig

_NAME = re.compile(r"(?P<which>fold|rest)(?P<fold>\d+)of(?P<folds>\d+)")


@dataclass(frozen=True)
class Fold:
    """One part: clips, the source videos they come from, and how many of their frames are labelled."""

    items: tuple[str, ...]
    groups: tuple[str, ...]
    labelled: int


def make_folds(cache: Cache, splits: Sequence[str], folds: int) -> tuple[Fold, ...]:
    """Divide the clips of some splits into parts.

    The video with the most labelled frames goes first, each into the part that has the fewest so far.

    Args:
        cache: what the clips are in.
        splits: whose clips.
        folds: how many parts, at least 2.

    Raises:
        UsageError: there is no such split, fewer than two parts are wanted, or fewer videos are labelled than that.
    """
    items = [item for split in splits for item in cache.items(split=split)]
    members: dict[str, list[str]] = {}
    labelled: dict[str, int] = {}
    for item in sorted(set(items)):
        group = str(cache.meta(item).get("group") or item)
        frames = int(cache.read(LABELS, item, ["valid"]).valid.any(axis=1).sum())
        members.setdefault(group, []).append(item)
        labelled[group] = labelled.get(group, 0) + frames
    useful = sum(count > 0 for count in labelled.values())
    if not 2 <= folds <= useful:
        raise UsageError(
            explain(
                f"The videos of {', '.join(splits)} cannot be divided so",
                expected=f"at least 2 parts, and no more than the {useful} source videos that are labelled",
                got=f"{folds} parts",
            )
        )
    parts: list[list[str]] = [[] for _ in range(folds)]
    frames_of = [0] * folds
    for group in sorted(members, key=lambda name: (-labelled[name], name)):
        k = min(range(folds), key=lambda i: (frames_of[i], len(parts[i]), i))
        parts[k].append(group)
        frames_of[k] += labelled[group]
    return tuple(
        Fold(tuple(sorted(item for group in part for item in members[group])), tuple(sorted(part)), frames)
        for part, frames in zip(parts, frames_of, strict=True)
    )


def with_folds(config: TrainConfig) -> TrainConfig:
    """The settings with the names of its parts as its splits, where it asks for cross-validation."""
    if not config.folds:
        return config
    name = f"{config.fold}of{config.folds}"
    return replace(config, train_split=f"rest{name}", val_split=f"fold{name}")


def split_items(cache: Cache, split: str, fold_splits: Sequence[str]) -> list[str]:
    """Clips of a split; where it is the name of a part, those of the parts of `fold_splits`.

    Raises:
        UsageError: there is no such split or part.
    """
    found = _NAME.fullmatch(split)
    if found is None:
        return cache.items(split=split)
    parts = make_folds(cache, fold_splits, int(found["folds"]))
    number = int(found["fold"])
    if not 1 <= number <= len(parts):
        raise UsageError(explain("There is no such part", expected=f"1 to {len(parts)}", got=number))
    if found["which"] == "fold":
        return list(parts[number - 1].items)
    return sorted(item for k, part in enumerate(parts, 1) if k != number for item in part.items)


def source_splits(split: str, fold_splits: Sequence[str]) -> tuple[str, ...]:
    """The splits of the data set that a split's clips come from: itself, or those that are divided into parts."""
    return tuple(fold_splits) if _NAME.fullmatch(split) else (split,)
