"""Metrics by intensity of the label, and by groups from a file.

arXiv 2503.10523 lists both among its limitations; neither paper measures them.
"""

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats
from vaflow.train import metrics
from vaflow.train.metrics import DIMENSIONS

BINS = 3
UNKNOWN = "unknown"  # the group of clips without an entry in the file
ITEM_COLUMNS = ("item", "clip", "name")  # one of them names the clip or the source video
Groups = Mapping[str, Mapping[str, str]]  # kind -> item -> group

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """One clip, the source video it comes from, and its prediction, label and mask, [N, 2] each."""

    item: str
    video: str
    prediction: Floats
    label: Floats
    valid: Bools


def by_intensity(prediction: Floats, label: Floats, valid: Bools, bins: int = BINS) -> dict[str, list[dict[str, Any]]]:
    """CCC and error per dimension in bins of |label| with about equal numbers of frames.

    Labels vary less within a bin than overall, so its CCC is lower than the overall one: compare bins with each other,
    by their error first. Equal intensities share a bin, so there may be fewer bins.

    Args:
        prediction, label: [N, 2]; valid: [N, 2] labelled.
        bins: largest number of bins.

    Returns:
        dimension -> bins from weak to strong: {"from", "to" (|label|, both included), "n_frames", "ccc", "rmse",
        "bias" (mean of sign(label) * (prediction - label): below 0 where intensity is underestimated)}.
    """
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in DIMENSIONS}
    for k, name in enumerate(DIMENSIONS):
        x, y = prediction[valid[:, k], k], label[valid[:, k], k]
        for mask in intensity_bins(y, bins):
            p, t = (np.stack([z[mask], z[mask]], axis=-1) for z in (x, y))
            result[name].append(
                {
                    "from": float(np.abs(y[mask]).min()),
                    "to": float(np.abs(y[mask]).max()),
                    "n_frames": int(mask.sum()),
                    "ccc": plain(metrics.concordance(p, t)[0]),
                    "rmse": plain(metrics.rmse(p, t)[0]),
                    "bias": float(np.mean(np.sign(y[mask]) * (x[mask] - y[mask]))),
                }
            )
    return result


def intensity_bins(label: Floats, bins: int = BINS) -> list[Bools]:
    """Masks [N] that divide labels [N] by |label| at its quantiles; empty bins are left out."""
    strength = np.abs(label)
    if not strength.size:
        return []
    edges = np.unique(np.quantile(strength, np.arange(1, bins) / bins))
    level = np.searchsorted(edges, strength)  # an edge belongs to the lower bin
    return [level == number for number in range(len(edges) + 1) if (level == number).any()]


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
        raise UsageError(explain(f"{path} has items with several rows", got=", ".join(repeated[:5])))
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
        shown = ", ".join(sorted(unknown)[:5]) + (", ..." if len(unknown) > 5 else "")
        log.warning("The groups name %d items that %s does not have: %s", len(unknown), cache.place, shown)


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
                "ccc": by_dimension(metrics.concordance(prediction, label, valid), mean=True),
                "rmse": by_dimension(metrics.rmse(prediction, label, valid), mean=True),
            }
    return result


def by_dimension(values: Floats, *, mean: bool = False) -> dict[str, Any]:
    """[2] -> {"valence", "arousal"} and their mean where wanted; None where a number is not finite."""
    named = {name: plain(value) for name, value in zip(DIMENSIONS, values, strict=True)}
    return named | ({"mean": plain(metrics.mean_over_dimensions(values))} if mean else {})


def plain(value: Any) -> float | None:
    """A number for JSON: None where it is not finite."""
    number = float(value)
    return number if np.isfinite(number) else None
