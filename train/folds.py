"""Groups of clips, read from a file, and folds of a cross-validation with about equal numbers of labelled frames.

The clips of a source video (`_left` and `_right`) share image and audio, so they stay in one fold; a column of a groups
file (speaker, site) can take the video's place. A fold is a split named "fold2of5"; all other folds together are
"rest2of5". Every option that takes a split takes these names. A fold of the default splits can be divided again, for
nested cross-validation. Folds need no seed and no file.
"""

import csv
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS
from vaflow.errors import UsageError, examples, explain
from vaflow.train.config import TrainConfig

ITEM_COLUMNS = ("item", "clip", "name")  # one of them names the clip or the source video
Groups = Mapping[str, Mapping[str, str]]  # kind -> item -> group
_NAME = re.compile(r"(?P<which>fold|rest)(?P<fold>\d+)of(?P<folds>\d+)")


log = logging.getLogger(__name__)


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """Read `groups.csv`: a column `item`, `clip` or `name` (a clip or a source video), and a column per kind of group.

    Returns:
        kind -> item -> group; empty cells are left out.

    Raises:
        UsageError: it cannot be read, lacks the column of items or any other, or names an item twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(explain(f"Cannot read the groups {path}", expected="a CSV file", got=error)) from error
    columns = [name for name in (rows[0] if rows else ()) if name]
    key = next((name for name in ITEM_COLUMNS if name in columns), "")
    kinds = [name for name in columns if name != key]
    if not key or not kinds:
        expected = "a header such as item,gender,age, and a row per clip"
        raise UsageError(explain(f"{path} has no groups", expected=expected, got=",".join(columns) or "no rows"))
    items = [(row[key] or "").strip() for row in rows]
    repeated = sorted(item for item, count in Counter(items).items() if count > 1)
    if repeated:
        raise UsageError(explain(f"{path} has items with several rows", got=examples(repeated)))
    cells = {kind: [(row[kind] or "").strip() for row in rows] for kind in kinds}
    return {kind: {i: c for i, c in zip(items, cells[kind], strict=True) if c} for kind in kinds}


def absolute_groups(text: str) -> str:
    """`FILE:COLUMN` with the absolute path of the file, for other working directories; other texts as they are."""
    path, _, kind = text.rpartition(":")
    located = f"{Path(path).resolve()}:{kind}" if path else text
    try:
        located.encode("utf-8")
    except UnicodeEncodeError:  # a folder that TOML cannot name
        return text
    return located


def read_column(text: str) -> dict[str, str]:
    """Read `FILE.csv:COLUMN`, one kind of group: item -> group.

    Raises:
        UsageError: not of that form, or the file cannot be read or lacks the column.
    """
    path, colon, kind = text.rpartition(":")
    if not (colon and path and kind):
        raise UsageError(explain("--fold-groups must be FILE:COLUMN, as groups.csv:speaker", got=text))
    groups = read_groups(Path(path))
    if kind not in groups:
        raise UsageError(explain(f"{path} has no column {kind!r}", choices=groups))
    return groups[kind]


def warn_unknown(groups: Groups, cache: Cache) -> None:
    """Warn of items in a groups file that are neither clips nor source videos of the cache."""
    unknown = {item for members in groups.values() for item in members} - set(cache.items())
    if unknown:  # computed only if needed, because reading the clips' videos is slow
        unknown -= {str(cache.meta(item).get("group")) for item in cache.items()}
    if unknown:
        shown = examples(sorted(unknown))
        log.warning("The groups name %d items that %s does not have: %s", len(unknown), cache.place, shown)


@dataclass(frozen=True)
class Fold:
    """One fold: its clips, their groups (source videos, by default), and the number of labelled frames."""

    items: tuple[str, ...]
    groups: tuple[str, ...]
    labelled: int


def fold_items(cache: Cache, splits: Sequence[str]) -> list[str]:
    """Clips of the splits that folds divide, sorted; a split may itself be a fold of the default splits.

    Raises:
        UsageError: the cache lacks one of the splits, or both of the default ones.
    """
    if tuple(splits) == TrainConfig.fold_splits:  # of the default splits, one may be absent
        present = {str(row.get("split") or "none") for row in map(cache.meta, cache.items())}
        splits = [split for split in splits if split in present] or splits
    return sorted({item for split in splits for item in split_items(cache, split, TrainConfig.fold_splits)})


def make_folds(
    cache: Cache, splits: Sequence[str], folds: int, groups: Mapping[str, str] | None = None
) -> tuple[Fold, ...]:
    """Divide the clips of some splits into folds.

    The group with the most labelled frames goes first, each into the fold with the fewest labelled frames so far.

    Args:
        folds: number of folds, at least 2.
        groups: clip or source video -> group that stays in one fold; None: the source video. A clip without an entry
            keeps its source video.

    Raises:
        UsageError: none of the splits exists, or `folds` is below 2 or above the number of labelled groups.
    """
    members: dict[str, list[str]] = {}
    labelled: dict[str, int] = {}
    for item in fold_items(cache, splits):
        video = str(cache.meta(item).get("group") or item)
        group = video if groups is None else groups.get(item) or groups.get(video) or video
        frames = int(cache.read(LABELS, item, ["valid"]).valid.any(axis=1).sum())
        members.setdefault(group, []).append(item)
        labelled[group] = labelled.get(group, 0) + frames
    useful = sum(count > 0 for count in labelled.values())
    if not 2 <= folds <= useful:
        noun = "source videos" if groups is None else "groups"
        problem = f"Cannot divide {', '.join(splits)} into {folds} folds"
        raise UsageError(explain(problem, expected=f"2 to {useful} folds: {useful} {noun} are labelled"))
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
    """Return the settings with fold names as splits, if they ask for cross-validation.

    Raises:
        UsageError: a fold without a number of folds, or a split that the fold would replace.
    """
    if not config.folds:
        if config.fold != TrainConfig.fold:
            raise UsageError(explain(f"--fold {config.fold} requires --folds K"))
        return config
    for key in ("train_split", "val_split"):
        given = getattr(config, key)
        if given != getattr(TrainConfig, key) and _NAME.fullmatch(given) is None:
            remedy = "Name the splits that the folds divide: --set fold_splits=SPLITS"
            raise UsageError(explain(f"--folds excludes {key}", got=given, remedy=remedy))
    name = f"{config.fold}of{config.folds}"
    return replace(config, train_split=f"rest{name}", val_split=f"fold{name}")


def split_items(cache: Cache, split: str, fold_splits: Sequence[str], fold_groups: str = "") -> list[str]:
    """Clips of a split or a fold; folds divide the clips of `fold_splits` by video, or by `fold_groups`.

    Raises:
        UsageError: there is no such split or fold.
    """
    name = _NAME.fullmatch(split)
    if name is None:
        return cache.items(split=split)
    groups = read_column(fold_groups) if fold_groups else None
    parts = make_folds(cache, fold_splits, int(name["folds"]), groups)
    number = int(name["fold"])
    if not 1 <= number <= len(parts):
        raise UsageError(explain(f"Fold {number} does not exist", expected=f"1 to {len(parts)}"))
    if name["which"] == "fold":
        return list(parts[number - 1].items)
    return sorted(item for k, part in enumerate(parts, 1) if k != number for item in part.items)


def source_splits(split: str, fold_splits: Sequence[str]) -> tuple[str, ...]:
    """Splits of the data set that a split's clips come from: itself, or those that the folds divide."""
    if _NAME.fullmatch(split) is None:
        return (split,)
    return tuple(dict.fromkeys(name for part in fold_splits for name in source_splits(part, TrainConfig.fold_splits)))
