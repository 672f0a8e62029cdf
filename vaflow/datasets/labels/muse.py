"""MuSe's label files: one table per dimension and clip, in stretches ("segments") with unannotated pauses between."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from vaflow.datasets.labels import text
from vaflow.datasets.labels.traces import Trace, with_gaps
from vaflow.datasets.problems import Problems

_EXPECTED = "the header 'timestamp,value,segment_id' (milliseconds, a number in [-1, 1], whole numbers)"
_COLUMNS = ("timestamp", "value", "segment_id")


def read_muse(path: Path) -> Trace:
    """One dimension of one clip. What lies between two segments is not annotated, nor is a row without a segment.

    Raises:
        DataError: with every problem and its lines.
    """
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, _EXPECTED, "an empty file")
    header = [cell.lower() for cell in text.split(lines[0])]
    if len(set(header)) != len(header) or not set(_COLUMNS) <= set(header):
        raise text.refuse(path, _EXPECTED, f"line 1 ({lines[0][:60]!r})")
    at = [header.index(name) for name in _COLUMNS]
    stands, values, segments = [], [], []
    for number, cells in text.rows(lines, len(header), problems):
        stamp, value, segment = (cells[i] for i in at)
        stands.append((number, stamp))
        segments.append(segment)
        known = text.value(value, number, problems, text.NOT_A_NUMBER)
        values.append(known if segment else np.nan)
    milliseconds = text.times(stands, problems, "milliseconds")
    if problems:
        raise text.refuse(path, _EXPECTED, problems)
    if not values:
        raise text.refuse(path, _EXPECTED, "a header without rows")
    breaks = np.array([one != other for one, other in pairwise(segments)], bool)
    return with_gaps(Trace(milliseconds / 1000, np.array(values, np.float32)), breaks)
