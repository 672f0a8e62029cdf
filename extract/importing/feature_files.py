"""Features made elsewhere, as files: finding them, and reading one item's rows with their times.

    DIR/<item>.npy, [T, D], with DIR/<item>.time.npy, [T] seconds, or a rate for all
    DIR/<item>.csv, a column `time` (seconds; not needed with a rate) and one column per dimension

A row that holds NaN, infinity or an empty cell is marked invalid and zeroed: a mask, not a guess.
"""

import csv
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.files import printable, size_problem
from vaflow.datasets.splits import SPLITS_FILE
from vaflow.datasets.text import MAX_SECONDS
from vaflow.errors import DataError, explain

ARRAY, TIMES, TABLE = ".npy", ".time.npy", ".csv"
TIME_COLUMN = "time"
LARGEST = 4 * 2**30  # bytes of one item's numbers in memory: 24 hours of 30 rows a second of 200 dimensions

# What NumPy raises for the many ways in which a header, which is a Python literal, can be broken.
_BROKEN_ARRAY = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    TokenError,
    OverflowError,
    MemoryError,
    RecursionError,
)


@dataclass(frozen=True)
class FeatureFile:
    """The files of one item. `paths` holds more than one where it is not clear which counts."""

    item: str
    paths: tuple[Path, ...]
    times: Path | None

    @property
    def path(self) -> Path:
        """The one file of features.

        Raises:
            DataError: there is none, or there are several.
        """
        if len(self.paths) == 1:
            return self.paths[0]
        got = ", ".join(path.name for path in self.paths) or f"only {self.times.name if self.times else 'nothing'}"
        raise DataError(explain(f"{self.item!r} needs one file of features", expected="one .npy or one .csv", got=got))


@dataclass(frozen=True)
class Signature:
    """What all items of a stream share: dimensions, and for tables a digest of the columns' names in order."""

    dim: int
    columns: str | None

    def __str__(self) -> str:
        return f"{self.dim} dimensions" + (f" (columns {self.columns[:8]})" if self.columns else "")


@dataclass(frozen=True)
class Features:
    """One item's rows.

    Attributes:
        embedding: [T, D] float64, 0 where not valid.
        time: [T] seconds, ascending, T >= 1.
        valid: [T] the row holds finite numbers only.
    """

    embedding: NDArray[np.float64]
    time: NDArray[np.float64]
    valid: NDArray[np.bool_]


def find_features(folder: Path, *, tables: bool = True, leave_out: Collection[Path] = ()) -> list[FeatureFile]:
    """Every item below `folder`, sorted; its id is the path without extension, with forward slashes.

    Args:
        folder: hidden files and folders in it are left out.
        tables: whether .csv files are features.
        leave_out: folders that hold something else.
    """
    paths: dict[str, list[Path]] = defaultdict(list)
    times: dict[str, Path] = {}
    for path in files_below(folder, leave_out):
        name = path.relative_to(folder).as_posix()
        if name.endswith(TIMES):
            times[name.removesuffix(TIMES)] = path
        elif name.endswith(ARRAY):
            paths[name.removesuffix(ARRAY)].append(path)
        elif tables and name.endswith(TABLE) and name != SPLITS_FILE:
            paths[name.removesuffix(TABLE)].append(path)
    return [FeatureFile(item, tuple(sorted(paths.get(item, ()))), times.get(item)) for item in sorted({*paths, *times})]


def files_below(folder: Path, leave_out: Collection[Path] = ()) -> Iterator[Path]:
    """Files in a folder and the folders in it; hidden ones and names that are not text are left out."""
    closed = {other for other in leave_out if folder in other.parents}
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not hidden and printable(str(inside)) and path.is_file() and not closed & set(path.parents):
            yield path


def signature(file: FeatureFile) -> Signature:
    """The shape of an item, from its header alone.

    Raises:
        DataError: the file is no such array or table.
    """
    path = file.path
    if path.suffix == ARRAY:
        return Signature(_open_array(path, axes=2).shape[1], None)
    columns = [name for name in _header(path) if name.lower() != TIME_COLUMN]
    if not columns:
        problem = f"{path} has no columns of features"
        raise DataError(explain(problem, expected="a column 'time' and one column per dimension"))
    return Signature(len(columns), blake2b("\n".join(columns).encode(), digest_size=8).hexdigest())


def read_features(file: FeatureFile, rate: float | None) -> Features:
    """One item's rows and times. Its own times win over `rate` (rows per second, the first at 0).

    Raises:
        DataError: a file cannot be read, has no rows, or has no times, or their number or order is wrong.
    """
    path = file.path
    if path.suffix == ARRAY:
        rows = np.array(_open_array(path, axes=2), np.float64)
        time = None if file.times is None else np.array(_open_array(file.times, axes=1), np.float64)
    else:
        rows, time = _read_table(path)
    if not len(rows):
        raise DataError(explain(f"{path} has no rows", expected="features for at least one instant"))
    if time is None:
        time = _regular(file, len(rows), rate)
    _check_times(file.times or path, time, len(rows))
    valid = np.asarray(np.isfinite(rows).all(axis=1), bool)
    rows[~valid] = 0
    return Features(rows, time, valid)


def _regular(file: FeatureFile, count: int, rate: float | None) -> NDArray[np.float64]:
    if rate is not None:
        return np.arange(count) / rate
    raise DataError(
        explain(
            f"The features of {file.item!r} have no times",
            expected=f"{Path(file.item).name}{TIMES} beside the array, or a column 'time' in the table",
            remedy="Add them, or give --rate HZ if rows follow at a steady rate from the clip's start",
        )
    )


def _check_times(path: Path, time: NDArray[np.float64], rows: int) -> None:
    if len(time) != rows:
        problem = f"{path} does not fit its features"
        raise DataError(explain(problem, expected=f"{rows} times, one per row", got=len(time)))
    wrong = ~(np.isfinite(time) & (time >= 0) & (time <= MAX_SECONDS) & (np.diff(time, prepend=-1.0) > 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        got = f"{time[row]} at row {row}" + (f" after {time[row - 1]}" if row else "")
        raise DataError(
            explain(
                f"{path} holds times that cannot be used",
                expected=f"seconds from 0 to {MAX_SECONDS:.0f}, ascending",
                got=got,
            )
        )


def _open_array(path: Path, axes: int) -> NDArray[Any]:
    """The array in a .npy file, mapped: its header says the shape before anything is read."""
    shape = "[T, D]" if axes == 2 else "[T]"
    expected = f"a NumPy array {shape} of real numbers"
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except _BROKEN_ARRAY as error:
        got = " ".join(str(error).split()) or type(error).__name__
        raise DataError(explain(f"{path} cannot be read", expected=expected, got=got[:200])) from error
    if array.ndim != axes or array.dtype.kind not in "fiu":
        got = f"{array.dtype} {list(array.shape)}"
        raise DataError(explain(f"{path} is not an array that can be used", expected=expected, got=got))
    if array.size * np.dtype(np.float64).itemsize > LARGEST:
        problem = f"{path} is too large for one item"
        raise DataError(explain(problem, expected=f"at most {LARGEST // 8} numbers", got=list(array.shape)))
    if axes == 2 and array.shape[1] == 0:
        raise DataError(explain(f"{path} has no dimensions", expected=expected, got=list(array.shape)))
    return array


def _header(path: Path) -> list[str]:
    for _, cells in _lines(path):
        if len(set(cells)) != len(cells) or "" in cells:
            raise DataError(explain(f"{path} has columns without a name of their own", got=",".join(cells)[:60]))
        return cells
    raise DataError(explain(f"{path} is empty", expected="a header, then one row a line"))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not empty.

    Raises:
        DataError: the file is no text of that kind.
    """
    if (problem := size_problem(path, LARGEST // 8)) is not None:
        raise DataError(explain(f"{path} cannot be read", expected="a table of one item's features", got=problem))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if cells:
                    yield reader.line_num, [cell.strip() for cell in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(explain(f"{path} cannot be read", expected="a table in UTF-8 text", got=error)) from error


def _read_table(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Rows without the time column, NaN for empty cells; and the times, None where there is no such column."""
    header = _header(path)
    rows = []
    lines = _lines(path)
    next(lines)
    for number, cells in lines:
        if len(cells) != len(header):
            problem = f"{path} has a line of another length"
            raise DataError(explain(problem, expected=f"{len(header)} cells", got=f"{len(cells)} in line {number}"))
        try:
            rows.append(np.array([cell or "nan" for cell in cells], np.float64))
        except ValueError as error:
            problem = f"{path} holds what is not a number, in line {number}"
            raise DataError(explain(problem, expected="numbers", got=error)) from error
    table = np.array(rows, np.float64).reshape(-1, len(header))
    clock = [column for column, name in enumerate(header) if name.lower() == TIME_COLUMN]
    time = table[:, clock[0]] if clock else None
    return np.delete(table, clock, axis=1), time
