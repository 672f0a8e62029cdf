"""Tables of one's own: a column of frames or times, and one or two of labels."""

from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation
from vaflow.datasets.labels import text
from vaflow.datasets.labels.text import TARGETS
from vaflow.datasets.problems import Problems


def read_csv(path: Path) -> Annotation:
    """A table with a column `frame` (0-based) or `time` (seconds), and `valence`, `arousal` or one of them.

    Other columns are ignored. Values are in [-1, 1]; -5 or an empty cell is not annotated. Frames and times ascend.

    Raises:
        DataError: with every problem and its lines.
    """
    expected = (
        "a header with 'frame' or 'time', and 'valence' and/or 'arousal', separated by commas; then one row a line"
    )
    problems = Problems()
    lines = text.read_lines(path, problems)
    if not lines:
        raise text.refuse(path, expected, "an empty file")
    header = [cell.lower() for cell in text.split(lines[0])]
    clocks = [name for name in ("frame", "time") if name in header]
    targets = tuple(name for name in TARGETS if name in header)
    if not clocks or not targets or len(set(header)) != len(header):
        raise text.refuse(path, expected, f"line 1 ({lines[0][:60]!r})")
    clock, where = clocks[0], [header.index(name) for name in targets]
    stands, value = [], []
    for number, cells in text.rows(lines, len(header), problems):
        stands.append((number, cells[header.index(clock)]))
        value.append([text.value(cells[i], number, problems, text.EMPTY) for i in where])
    frame = text.frames(stands, problems) if clock == "frame" else None
    time = text.times(stands, problems) if clock == "time" else None
    if problems:
        raise text.refuse(path, expected, problems)
    if not value:
        raise text.refuse(path, expected, "a header without rows")
    both = np.full((len(value), 2), np.nan, np.float32)
    both[:, [TARGETS.index(name) for name in targets]] = value
    return Annotation(value=both, time=time, frame=frame, targets=targets)
