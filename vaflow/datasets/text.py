"""Collecting what is wrong with a text file, so that one message can name it all.

Parts of every reader of annotation files: lines, cells, values, times, and one error that names all problems.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.files import size_problem
from vaflow.errors import DataError, explain

RANGES_SHOWN = 40
SHOWN = 40  # characters of what stands in a line

Run = tuple[int, int, str]  # first and last line, and what stands in the first


class Problems:
    """What is wrong with a file: kinds of problem, each with its lines."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Run]] = {}

    def add(self, kind: str, line: int, got: str = "") -> None:
        """Note that `line` (1-based) has a problem of this kind; `got` is what stands there."""
        runs = self._lines.setdefault(kind, [])
        if runs and line == runs[-1][1] + 1:  # as runs: every line of a large file may have the same problem
            runs[-1] = (runs[-1][0], line, runs[-1][2])
        else:
            runs.append((line, line, got[:SHOWN]))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {_ranges(lines)}" for kind, lines in self._lines.items())


def _ranges(runs: Sequence[Run]) -> str:
    """[(3, 3, "a"), (7, 8, "b")] -> "line 3 ('a'), lines 7-8 ('b' first)"."""
    texts = []
    for first, last, got in runs[:RANGES_SHOWN]:
        where = f"line {first}" if first == last else f"lines {first}-{last}"
        shown = repr(got) + ("" if first == last else " first")
        texts.append(f"{where} ({shown})" if got else where)
    rest = sum(last - first + 1 for first, last, _ in runs[RANGES_SHOWN:])
    return ", ".join(texts) + (f" and {rest} more lines" if rest else "")


TARGETS = ("valence", "arousal")
UNANNOTATED = -5.0
MAX_FRAME = 10_000_000  # 92 hours at 30 frames/s: a larger frame number is a mistake, and would cost memory
MAX_SECONDS = 1_000_000.0  # 11 days: the same of a time
EMPTY = frozenset({""})  # cells that mean "not annotated"
NOT_A_NUMBER = frozenset({"", "?", "nan"})  # ... in files that MATLAB, Weka or pandas wrote

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: the file cannot be read at all, or is far larger than labels are.
    """
    if (problem := size_problem(path)) is not None:
        raise DataError(explain(f"The labels {path} cannot be used", expected="a file of labels", got=problem))
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(explain(f"Cannot read the labels {path}", got=error.strerror or str(error))) from error


def read_lines(path: Path, problems: Problems) -> list[str]:
    """The lines of a text file without byte-order mark, line ends and trailing empty lines.

    Raises:
        DataError: the file cannot be read at all.
    """
    raw = read_bytes(path)
    rows = raw.count(b"\n") + raw.count(b"\r")
    if rows > 2 * MAX_FRAME:
        raise refuse(path, f"at most {MAX_FRAME} rows", f"about {rows}")
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


def split(line: str, separator: str = ",") -> list[str]:
    """The cells of a line, without blanks and quotes around them."""
    return [cell.strip().strip("'\"").strip() for cell in line.split(separator)]


def is_number(cell: str) -> bool:
    """Whether a cell is a plain decimal number: no "nan", no "inf", no underscores."""
    return _NUMBER.fullmatch(cell) is not None


def rows(
    lines: Sequence[str], columns: int, problems: Problems, *, first: int = 2, separator: str = ","
) -> Iterable[tuple[int, list[str]]]:
    """(line number, cells) of every line from `first` (1-based) on that has the right number of columns."""
    for number, line in enumerate(lines[first - 1 :], first):
        cells = split(line, separator)
        if not line.strip():
            problems.add("empty line between rows", number)
        elif len(cells) != columns:
            problems.add(f"not {columns} columns", number, line)
        else:
            yield number, cells


def value(cell: str, line: int, problems: Problems, missing: Collection[str] = ()) -> float:
    """One valence or arousal: a number in [-1, 1]; NaN where the cell says unannotated or has a problem."""
    if cell.lower() in missing:
        return np.nan
    if not is_number(cell):
        problems.add("not a number", line, cell or "empty")
        return np.nan
    number = float(cell)
    if number == UNANNOTATED:
        return np.nan
    if not -1 <= number <= 1:
        problems.add("beyond [-1, 1] (only -5 may be: not annotated)", line, cell)
        return np.nan
    return number


def frames(cells: Iterable[tuple[int, str]], problems: Problems) -> NDArray[np.int64]:
    """Frame numbers, which must ascend, of (line, cell)."""
    found, last = [], -1
    for line, cell in cells:
        if not re.fullmatch(r"\d{1,9}", cell, re.ASCII) or int(cell) > MAX_FRAME:
            problems.add(f"not a frame number (whole, from 0 to {MAX_FRAME})", line, cell or "empty")
            continue
        if int(cell) <= last:
            problems.add("frame does not come after the one before", line, cell)
        last = int(cell)
        found.append(last)
    return np.array(found, np.int64)


def times(cells: Iterable[tuple[int, str]], problems: Problems, unit: str = "seconds") -> NDArray[np.float64]:
    """Times, which must ascend, of (line, cell); in the file's own `unit`."""
    found, last = [], -np.inf
    most = MAX_SECONDS * (1000 if unit == "milliseconds" else 1)
    for line, cell in cells:
        if not is_number(cell) or not 0 <= float(cell) <= most:
            problems.add(f"not a time ({unit}, from 0 to {most:.0f})", line, cell or "empty")
            continue
        if float(cell) <= last:
            problems.add("time does not come after the one before", line, cell)
        last = float(cell)
        found.append(last)
    return np.array(found, np.float64)


def refuse(path: Path, expected: str, problems: object) -> DataError:
    """The error that says what a file should be and everything that is wrong with it."""
    remedy = "Correct the file, or take it away to use the clip without labels"
    return DataError(explain(f"The labels {path} cannot be used", expected=expected, got=problems, remedy=remedy))
