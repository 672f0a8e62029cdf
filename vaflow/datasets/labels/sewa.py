"""SEWA's label files: both dimensions in one table separated by semicolons, with or without a header."""

from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation
from vaflow.datasets.labels import text
from vaflow.datasets.labels.text import TARGETS
from vaflow.datasets.problems import Problems

_EXPECTED = (
    "columns separated by semicolons: instance name (may be left out), timestamp (seconds), arousal, valence, and "
    "liking or nothing; a header may name them"
)
_IN_ORDER = ("timestamp", "arousal", "valence", "liking")


def read_sewa(path: Path) -> Annotation:
    """Arousal and valence every 0.1 s. Without a header the columns are in the order of the challenges' files.

    Raises:
        DataError: with every problem and its lines.
    """
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, _EXPECTED, "an empty file")
    top = text.split(lines[0], ";")
    lower = [cell.lower().replace("_", "") for cell in top]
    if any(target in lower for target in TARGETS):
        names, first = ["timestamp" if cell in ("time", "frametime") else cell for cell in lower], 2
    else:
        names, first = _names(top), 1
    targets = tuple(target for target in TARGETS if target in names)
    if "timestamp" not in names or not targets or len(set(names)) != len(names):
        raise text.refuse(path, _EXPECTED, f"line 1 ({lines[0][:60]!r})")
    stands, values = [], []
    for number, cells in text.rows(lines, len(names), problems, first=first, separator=";"):
        stands.append((number, cells[names.index("timestamp")]))
        found = {t: text.value(cells[names.index(t)], number, problems, text.NOT_A_NUMBER) for t in targets}
        values.append([found.get(target, np.nan) for target in TARGETS])
    time = text.times(stands, problems)
    if problems:
        raise text.refuse(path, _EXPECTED, problems)
    if not values:
        raise text.refuse(path, _EXPECTED, "a header without rows")
    return Annotation(value=np.array(values, np.float32), time=time, targets=targets)


def _names(first_row: list[str]) -> list[str]:
    """What the columns of a file without a header are: a first cell that is no number is the instance's name."""
    name = [] if text.is_number(first_row[0]) else ["name"]
    count = len(first_row) - len(name)
    return [*name, *_IN_ORDER[:count]] if 3 <= count <= len(_IN_ORDER) else []
