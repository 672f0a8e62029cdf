"""Groups of clips: columns of a groups file, and metrics of each group."""

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.errors import UsageError, examples, explain
from vaflow.timeline import Bools, Floats
from vaflow.train.metrics import by_dimension, concordance, rmse

UNKNOWN = "unknown"  # the group of clips without an entry in the file
ITEM_COLUMNS = ("item", "clip", "name")  # one of them names the clip or the source video
Groups = Mapping[str, Mapping[str, str]]  # kind -> item -> group


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
class Scored:
    """One clip, the source video it comes from, and its prediction, label and mask, [N, 2] each."""

    item: str
    video: str
    prediction: Floats
    label: Floats
    valid: Bools


def by_group(clips: Sequence[Scored], groups: Groups) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of every group of every kind; clips without an entry form the group "unknown".

    Raises:
        UsageError: the file names none of the clips or their source videos.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, members in groups.items():
        by_name: dict[str, list[Scored]] = {}
        for clip in clips:
            by_name.setdefault(members.get(clip.item) or members.get(clip.video) or UNKNOWN, []).append(clip)
        if set(by_name) == {UNKNOWN}:
            problem = f"Column {kind!r} of the groups names no clip of this split"
            expected = "items such as " + ", ".join(clip.item for clip in clips[:3])
            raise UsageError(explain(problem, expected=expected, got=", ".join(list(members)[:3]) or "empty cells"))
        result[kind] = {}
        for group in sorted(by_name):
            arrays = zip(*((c.prediction, c.label, c.valid) for c in by_name[group]), strict=True)
            prediction, label, valid = (np.concatenate(each) for each in arrays)
            result[kind][group] = {
                "n_clips": len(by_name[group]),
                "n_frames": int(valid.any(axis=1).sum()),
                "ccc": by_dimension(concordance(prediction, label, valid), mean=True),
                "rmse": by_dimension(rmse(prediction, label, valid), mean=True),
            }
    return result
