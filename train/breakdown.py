"""Where predictions are good and where not: metrics by the intensity of the label, and by groups that a file names.

arXiv 2503.10523 names both, intensity levels and demographic groups, among its limits; neither paper measures them.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats
from vaflow.train import metrics
from vaflow.train.metrics import DIMENSIONS

BINS = 3
UNKNOWN = "unknown"  # the group of clips that the file does not name
Groups = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Scored:
    """One clip, the source video it comes from, and its prediction, label and mask, [N, 2] each."""

    item: str
    video: str
    prediction: Floats
    label: Floats
    valid: Bools


def by_intensity(prediction: Floats, label: Floats, valid: Bools, bins: int = BINS) -> dict[str, list[dict[str, Any]]]:
    """Concordance and error per dimension in bins of |label| with about as many frames each.

    Within a bin labels vary less than overall, so its CCC is lower than the whole one: compare bins of one kind with
    each other, and look at the error first. Equal intensities are never divided, so there may be fewer bins.

    Args:
        prediction: [N, 2].
        label: [N, 2].
        valid: [N, 2] labelled.
        bins: how many, where labels allow.

    Returns:
        dimension -> bins from weak to strong: {"from", "to" (|label|, both included), "n_frames", "ccc", "rmse",
        "bias" (mean of the prediction's intensity towards the label's side, less the label's)}.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for k, name in enumerate(DIMENSIONS):
        x, y = prediction[valid[:, k], k], label[valid[:, k], k]
        found[name] = [_one_bin(x[own], y[own]) for own in intensity_bins(y, bins)]
    return found


def intensity_bins(label: Floats, bins: int = BINS) -> list[Bools]:
    """Masks [N] that divide labels [N] by |label| at its quantiles; empty bins are left out."""
    strength = np.abs(label)
    if not strength.size:
        return []
    edges = np.unique(np.quantile(strength, np.arange(1, bins) / bins))
    level = np.searchsorted(edges, strength)  # an edge belongs to the bin below it
    return [level == number for number in range(len(edges) + 1) if (level == number).any()]


def _one_bin(x: Floats, y: Floats) -> dict[str, Any]:
    pair = np.stack([x, x], axis=-1), np.stack([y, y], axis=-1)
    return {
        "from": float(np.abs(y).min()),
        "to": float(np.abs(y).max()),
        "n_frames": len(y),
        "ccc": plain(metrics.concordance(*pair)[0]),
        "rmse": plain(metrics.rmse(*pair)[0]),
        "bias": float(np.mean(np.sign(y) * (x - y))),
    }


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """`groups.csv`: a column `item` (a clip, or a source video) and one column per kind of group.

    Returns:
        kind -> item -> group; empty cells are left out.

    Raises:
        UsageError: it cannot be read, lacks `item` or any other column, or names an item twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(explain(f"Cannot read the groups {path}", expected="a CSV file", got=error)) from error
    columns = [name for name in (rows[0] if rows else ()) if name]
    kinds = [name for name in columns if name != "item"]
    if "item" not in columns or not kinds:
        expected = "a header such as item,gender,age, and a row per clip"
        raise UsageError(explain(f"{path} does not name groups", expected=expected, got=",".join(columns) or "no rows"))
    items = [row["item"].strip() for row in rows]
    twice = sorted({item for item in items if items.count(item) > 1})
    if twice:
        raise UsageError(explain(f"{path} names items twice", got=", ".join(twice[:5])))
    cells = {kind: [(row[kind] or "").strip() for row in rows] for kind in kinds}
    return {kind: {i: c for i, c in zip(items, cells[kind], strict=True) if c} for kind in kinds}


def by_group(clips: Sequence[Scored], groups: Groups) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of every group of every kind; clips that the file does not name are the group "unknown".

    Raises:
        UsageError: the file names none of the clips, nor their source videos.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, members in groups.items():
        parts: dict[str, list[Scored]] = {}
        for clip in clips:
            group = members.get(clip.item) or members.get(clip.video) or UNKNOWN
            parts.setdefault(group, []).append(clip)
        if set(parts) == {UNKNOWN}:
            raise UsageError(
                explain(
                    f"No clip of this split is in the column {kind!r} of the groups",
                    expected="items such as " + ", ".join(clip.item for clip in clips[:3]),
                    got=", ".join(list(members)[:3]) or "empty cells",
                )
            )
        found[kind] = {group: _of(parts[group]) for group in sorted(parts)}
    return found


def _of(clips: Sequence[Scored]) -> dict[str, Any]:
    prediction = np.concatenate([clip.prediction for clip in clips])
    label = np.concatenate([clip.label for clip in clips])
    valid = np.concatenate([clip.valid for clip in clips])
    return {
        "n_clips": len(clips),
        "n_frames": int(valid.any(axis=1).sum()),
        "ccc": by_dimension(metrics.concordance(prediction, label, valid), mean=True),
        "rmse": by_dimension(metrics.rmse(prediction, label, valid), mean=True),
    }


def by_dimension(values: Floats, *, mean: bool = False) -> dict[str, Any]:
    """[2] -> {"valence", "arousal"}, and their mean where wanted; None where a number is not finite."""
    named = {name: plain(value) for name, value in zip(DIMENSIONS, values, strict=True)}
    return named | ({"mean": plain(metrics.mean_over_dimensions(values))} if mean else {})


def plain(value: Any) -> float | None:
    """A number as JSON has it."""
    number = float(value)
    return number if np.isfinite(number) else None
