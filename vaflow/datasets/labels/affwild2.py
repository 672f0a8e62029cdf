"""The challenge's annotation files: one row per frame."""

from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation
from vaflow.datasets.labels import text
from vaflow.datasets.labels.text import TARGETS
from vaflow.datasets.problems import Problems


def read_affwild2(path: Path) -> Annotation:
    """A challenge annotation file: header `valence,arousal`, then row k for frame k.

    Raises:
        DataError: with every problem and its lines.
    """
    expected = "the first line 'valence,arousal', then two numbers a line, each in [-1, 1] or -5"
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, expected, "an empty file")
    header = [cell.lower() for cell in text.split(lines[0])]
    if sorted(header) != sorted(TARGETS):
        if all(text.is_number(cell) for cell in header):
            raise text.refuse(path, expected, f"no header: line 1 is {lines[0][:60]!r}")
        raise text.refuse(path, expected, f"line 1 ({lines[0][:60]!r})")
    value = [[text.value(cell, number, problems) for cell in cells] for number, cells in text.rows(lines, 2, problems)]
    if problems:
        raise text.refuse(path, expected, problems)
    if not value:
        raise text.refuse(path, expected, "a header without rows")
    columns = np.array(value, np.float32)[:, [header.index(target) for target in TARGETS]]
    return Annotation(value=columns, frame=np.arange(len(value), dtype=np.int64))
