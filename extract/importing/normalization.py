"""Statistics of features before they are stored: their range, and z-scores within groups such as speakers.

Means and deviations are fitted on the features of all items of a group, whatever their split, and never on labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from hashlib import blake2b

import numpy as np

from vaflow.datasets.affwild2 import strip_side
from vaflow.datasets.files import examples
from vaflow.datasets.splits import SPLITS_FILE, Assignment
from vaflow.errors import UsageError, explain
from vaflow.extract.importing.feature_files import Features
from vaflow.timeline import Floats

_CONSTANT = 1e-8  # standard deviation below which a dimension is only centred


@dataclass(frozen=True)
class Moments:
    """Statistics of N valid rows, each [D]: mean, sum of squared deviations, minimum and maximum."""

    count: int
    mean: Floats
    squares: Floats
    low: Floats
    high: Floats

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """The statistics of one item's valid rows."""
        rows = features.embedding[features.valid]
        width = features.embedding.shape[1]
        if not len(rows):
            return cls(0, np.zeros(width), np.zeros(width), np.zeros(width), np.zeros(width))
        mean = rows.mean(axis=0)
        return cls(len(rows), mean, ((rows - mean) ** 2).sum(axis=0), rows.min(axis=0), rows.max(axis=0))

    def __add__(self, other: "Moments") -> "Moments":
        """Return the merged statistics (Chan et al. 1979, numerically stable for large means)."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart**2 * (self.count * other.count / count),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


@dataclass(frozen=True)
class Scale:
    """Subtract `mean` [D] and divide by `std` [D]; `digest` identifies these numbers."""

    mean: Floats
    std: Floats

    @property
    def digest(self) -> str:
        """BLAKE2b of both, in hexadecimal."""
        return blake2b(self.mean.tobytes() + self.std.tobytes(), digest_size=16).hexdigest()

    def apply(self, features: Features) -> Features:
        """The features as z-scores; rows that are not valid stay 0."""
        scaled = np.where(features.valid[:, None], (features.embedding - self.mean) / self.std, 0.0)
        return Features(scaled, features.time, features.valid)


def item_groups(items: Sequence[str], assigned: Assignment | None, column: str) -> dict[str, str]:
    """Return item -> group of the normalization, from a column of `splits.csv`.

    Raises:
        UsageError: the column is missing or has empty cells.
    """
    if column == "item":
        return {item: item for item in items}
    columns = assigned.columns if assigned is not None else {}
    if column == "group":
        given = columns.get("group", {})
        return {item: given.get(item, strip_side(item)) for item in items}
    if column.lower() not in columns:
        choices = {"item", "group", *columns} - {"name", "split"}
        raise UsageError(explain(f"{SPLITS_FILE} has no such column for --normalize-by", got=column, choices=choices))
    groups = columns[column.lower()]
    if missing := [item for item in items if item not in groups]:
        got = f"none for {examples(missing)}"
        raise UsageError(explain(f"{SPLITS_FILE} lacks cells of {column!r}", expected="one per item", got=got))
    return dict(groups)


def fit(moments: Mapping[str, Moments], groups: Mapping[str, str]) -> dict[str, Scale]:
    """Group -> scale, from the statistics of its items.

    Args:
        moments: item -> statistics.
        groups: item -> group.
    """
    members: dict[str, list[Moments]] = {}
    for item in sorted(moments):
        members.setdefault(groups[item], []).append(moments[item])
    scales = {}
    for group, parts in members.items():
        total = reduce(Moments.__add__, parts)
        std = np.sqrt(total.squares / max(total.count, 1))
        scales[group] = Scale(total.mean, np.where(std > _CONSTANT, std, 1.0))
    return scales
