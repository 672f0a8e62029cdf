"""Annotation files -> `Annotation`, and annotations -> the frame clock.

Readers find every problem of a file before one error names them all. A value of -5 marks an unannotated row; it
becomes NaN here and is never a number again.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Annotation, Clip
from vaflow.datasets.problems import Problems
from vaflow.errors import DataError, explain
from vaflow.timeline import extend, median_interval, nearest

TARGETS = ("valence", "arousal")
UNANNOTATED = -5.0
MAX_FRAME = 10_000_000  # 92 hours at 30 frames/s: a larger frame number is a mistake, and would cost memory

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _read_lines(path: Path, problems: Problems) -> list[str]:
    """The lines of a text file without byte-order mark, line ends and trailing empty lines.

    Raises:
        DataError: the file cannot be read at all.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(explain(f"Cannot read the labels {path}", got=error.strerror or str(error))) from error
    lines = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            problems.add("not UTF-8 text", number)
            texts.append(line.decode("utf-8", "replace"))
    return texts


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


def _value(cell: str, line: int, problems: Problems, empty_is_missing: bool) -> float:
    """One valence or arousal: a number in [-1, 1]; NaN where the cell says unannotated or has a problem."""
    if not cell and empty_is_missing:
        return np.nan
    if not _NUMBER.fullmatch(cell):
        problems.add("not a number", line, cell or "empty")
        return np.nan
    value = float(cell)
    if value == UNANNOTATED:
        return np.nan
    if not -1 <= value <= 1:
        problems.add("beyond [-1, 1] (only -5 may be: not annotated)", line, cell)
        return np.nan
    return value


def _rows(lines: Sequence[str], columns: int, problems: Problems) -> Iterable[tuple[int, list[str]]]:
    """(line number, cells) of every row below the header that has the right number of columns."""
    for number, line in enumerate(lines[1:], 2):
        cells = _split(line)
        if not line.strip():
            problems.add("empty line between rows", number)
        elif len(cells) != columns:
            problems.add(f"not {columns} columns", number, line)
        else:
            yield number, cells


def _refuse(path: Path, expected: str, problems: object) -> DataError:
    remedy = "Correct the file, or take it away to use the clip without labels"
    return DataError(explain(f"The labels {path} cannot be used", expected=expected, got=problems, remedy=remedy))


def read_affwild2(path: Path) -> Annotation:
    """A challenge annotation file: header `valence,arousal`, then row k for frame k.

    Raises:
        DataError: with every problem and its lines.
    """
    expected = "the first line 'valence,arousal', then two numbers a line, each in [-1, 1] or -5"
    problems = Problems()
    lines = _read_lines(path, problems)
    if not lines:
        raise _refuse(path, expected, "an empty file")
    header = [cell.lower() for cell in _split(lines[0])]
    if sorted(header) != sorted(TARGETS):
        if all(_NUMBER.fullmatch(cell) for cell in header):
            raise _refuse(path, expected, f"no header: line 1 is {lines[0][:60]!r}")
        raise _refuse(path, expected, f"line 1 ({lines[0][:60]!r})")
    value = [
        [_value(cell, number, problems, empty_is_missing=False) for cell in cells]
        for number, cells in _rows(lines, 2, problems)
    ]
    if problems:
        raise _refuse(path, expected, problems)
    if not value:
        raise _refuse(path, expected, "a header without rows")
    columns = np.array(value, np.float32)[:, [header.index(target) for target in TARGETS]]
    return Annotation(value=columns, frame=np.arange(len(value), dtype=np.int64))


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
    lines = _read_lines(path, problems)
    if not lines:
        raise _refuse(path, expected, "an empty file")
    header = [cell.lower() for cell in _split(lines[0])]
    clocks = [name for name in ("frame", "time") if name in header]
    targets = tuple(name for name in TARGETS if name in header)
    if not clocks or not targets or len(set(header)) != len(header):
        raise _refuse(path, expected, f"line 1 ({lines[0][:60]!r})")
    clock, where = clocks[0], [header.index(name) for name in targets]
    stands, value = [], []
    for number, cells in _rows(lines, len(header), problems):
        stands.append((number, cells[header.index(clock)]))
        value.append([_value(cells[i], number, problems, empty_is_missing=True) for i in where])
    position = _frames(stands, problems) if clock == "frame" else _times(stands, problems)
    if problems:
        raise _refuse(path, expected, problems)
    if not value:
        raise _refuse(path, expected, "a header without rows")
    both = np.full((len(value), 2), np.nan, np.float32)
    both[:, [TARGETS.index(name) for name in targets]] = value
    return Annotation(value=both, **{clock: position}, targets=targets)


def _frames(cells: Iterable[tuple[int, str]], problems: Problems) -> NDArray[Any]:
    frames, last = [], -1
    for line, cell in cells:
        if not re.fullmatch(r"\d{1,9}", cell, re.ASCII) or int(cell) > MAX_FRAME:
            problems.add(f"not a frame number (whole, from 0 to {MAX_FRAME})", line, cell or "empty")
            continue
        if int(cell) <= last:
            problems.add("frame does not come after the one before", line, cell)
        last = int(cell)
        frames.append(last)
    return np.array(frames, np.int64)


def _times(cells: Iterable[tuple[int, str]], problems: Problems) -> NDArray[Any]:
    times, last = [], -np.inf
    for line, cell in cells:
        if not _NUMBER.fullmatch(cell) or not 0 <= float(cell) < np.inf:
            problems.add("not a time (seconds, from 0)", line, cell or "empty")
            continue
        if float(cell) <= last:
            problems.add("time does not come after the one before", line, cell)
        last = float(cell)
        times.append(last)
    return np.array(times, np.float64)


READERS: dict[str, Callable[[Path], Annotation]] = {
    "affwild2": read_affwild2,
    "csv": read_csv,
}


def read_annotation(clip: Clip) -> Annotation | None:
    """The labels of `clip`; None where it has none.

    A -5 in one dimension only leaves the other one annotated.

    Raises:
        DataError: the file cannot be used; the message names every problem with its lines.
    """
    if clip.labels is None:
        return None
    return READERS[clip.label_format](clip.labels)


def on_clock(annotation: Annotation | None, frame_times: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """Labels on the clock of the video's frames.

    Row k of a frame-numbered annotation belongs to frame `frame[k]`, whatever its time; rows beyond the last frame go
    on at the frames' median interval. With time-stamped rows, a frame takes the row nearest to it, of two equally
    near ones the earlier, if it is at most half a label interval away; between two rows at most a whole one, so that
    unsteady stamps leave no holes. Nothing is interpolated, and nothing is made up beyond the first and last row.
    Without any frame (no video), time-stamped rows keep their own times.

    Args:
        annotation: the labels, or None.
        frame_times: [N] seconds, ascending: presentation times of all frames.

    Returns:
        time [R] float64 seconds; value [R, 2] float32, NaN where not annotated; valid [R, 2] bool.
        R is N, or for frame-numbered rows the last row's frame + 1 where that is more.
    """
    times = np.asarray(frame_times, np.float64)
    if annotation is None:
        value = np.full((times.size, 2), np.nan, np.float32)
    elif annotation.time is not None:
        times = times if times.size else annotation.time
        value = _at_times(annotation.time, annotation.value, times)
    else:
        frame = np.arange(len(annotation.value)) if annotation.frame is None else annotation.frame
        times = extend(times, int(frame[-1]) + 1 if frame.size else 0)
        value = np.full((times.size, 2), np.nan, np.float32)
        value[frame] = annotation.value
    return {"time": times, "value": value, "valid": np.isfinite(value)}


def _at_times(rows: NDArray[np.float64], value: NDArray[np.float32], times: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest row's value at every time, NaN where no row is near enough."""
    interval = median_interval(rows, default=median_interval(times))
    index = nearest(rows, times)
    within = (times >= rows[0]) & (times <= rows[-1])
    # A stamp such as 0.1 is not exact in binary: a millionth of an interval decides nothing.
    reach = np.where(within, interval, interval / 2) * (1 + 1e-6)
    near = np.abs(rows[index] - times) <= reach
    return np.where(near[:, None], value[index], np.float32(np.nan)).astype(np.float32)
