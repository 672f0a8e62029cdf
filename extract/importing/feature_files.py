"""Find and read feature files: one item's rows with their times, and z-scores of them within groups such as speakers.

    DIR/<item>.npy, [T, D], with DIR/<item>.time.npy, [T] seconds, or a rate for all
    DIR/<item>.csv, a column `time` (seconds; not needed with a rate) and one column per dimension

A table may have columns `start` and `end` in place of `time`: a row's time is then the middle of its span. A row that
holds NaN, infinity or a missing cell (empty, NaN, NA, N/A, null or ?) is marked invalid and set to 0. The roles of
columns follow from their names, or from a mapping of the user. Means and deviations are fitted on the features of all
items of a group, whatever their split, and never on labels.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.affwild2 import strip_side
from vaflow.datasets.files import SPLITS_FILE, Assignment, head, open_text, separator_of, size_problem, usable
from vaflow.datasets.labels import MAX_SECONDS, NOT_A_NUMBER, decimal_point
from vaflow.errors import DataError, UsageError, examples, explain
from vaflow.extract.source_files import file_identity, same_file
from vaflow.timeline import Floats

MISSING = NOT_A_NUMBER | {"n/a", "null"}  # cells of spreadsheets and databases as well
ROLES = ("time", "frame", "start", "end", "valence", "arousal", "ignore")

_CLOCK_TIME = re.compile(r"(?:(\d+) days? )?(\d+):(\d\d):(\d\d(?:[.,]\d+)?)", re.ASCII)  # pandas writes "0 days ..."
ARRAY, TIMES, TABLE = ".npy", ".time.npy", ".csv"
LARGEST = 4 * 2**30  # bytes of one item's numbers in memory: 24 hours of 30 rows per second of 200 dimensions
_CONSTANT = 1e-8  # standard deviation below which a dimension is only centred
# Exceptions of NumPy for invalid headers, which are Python literals.
_BROKEN_ARRAY = (OSError, ValueError, TypeError, SyntaxError, TokenError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Columns:
    """Column name in lower case -> role; a column that is not in the mapping has the role of its name."""

    roles: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> "Columns":
        """Parse `--columns ROLE=NAME` options into a mapping; names may be several, separated by commas.

        Raises:
            UsageError: not such a pair, an unknown role, or a column with two roles.
        """
        roles: dict[str, str] = {}
        for pair in pairs:
            role, equals, names = pair.partition("=")
            if not equals or role not in ROLES or not names:
                expected = "ROLE=NAME, as time=frameTime"
                raise UsageError(explain("--columns is not a pair", expected=expected, got=pair, choices=ROLES))
            for name in names.lower().split(","):
                if roles.setdefault(name.strip(), role) != role:
                    raise UsageError(explain(f"--columns gives {name!r} two roles", got=pair))
        return cls(roles)

    def of(self, header: Sequence[str]) -> list[str]:
        """Column names in lower case, with mapped names replaced by their role.

        A column that has a role's name, while the mapping gives that role to another one, is ignored.
        """
        names = [name.lower() for name in header]
        mapped = {self.roles[name] for name in names if name in self.roles}
        return [self.roles.get(name, "ignore" if name in mapped else name) for name in names]


def seconds_of(cell: str) -> float:
    """Parse a time cell: seconds, "HH:MM:SS.sss", or "D days HH:MM:SS.sss".

    Raises:
        ValueError: it is none of these.
    """
    if (match := _CLOCK_TIME.fullmatch(cell)) is None:
        return float(cell)
    days, hours, minutes, rest = match.groups()
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(rest.replace(",", "."))


_PLAIN = Columns()


@dataclass(frozen=True)
class FeatureFile:
    """The files of one item. `path` raises if there is more than one."""

    item: str
    paths: tuple[Path, ...]
    times: Path | None

    def identity(self) -> dict[str, Any]:
        """Part -> identity of its file, for the record of a stream."""
        return {name: file_identity(path) for name, path in self._parts().items()}

    def has_identity(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the files are those that a record states."""
        parts = self._parts()
        return recorded.keys() == parts.keys() and all(same_file(parts[name], recorded[name]) for name in parts)

    def _parts(self) -> dict[str, Path]:
        return {"features": self.path} | ({"time": self.times} if self.times else {})

    @property
    def path(self) -> Path:
        """The one file of features.

        Raises:
            DataError: no file or several files match.
        """
        if len(self.paths) == 1:
            return self.paths[0]
        got = ", ".join(path.name for path in self.paths) or f"only {self.times.name if self.times else 'nothing'}"
        raise DataError(explain(f"{self.item!r} needs one file of features", expected="one .npy or one .csv", got=got))


@dataclass(frozen=True)
class Signature:
    """The shape that all items of a stream share: dimensions, and a digest of a table's column names in order."""

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
        folder: searched with its subfolders; hidden ones are skipped.
        tables: whether .csv files are features.
        leave_out: folders that do not hold features.
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
    """Files in a folder and its subfolders; hidden ones and names that cannot be item ids are skipped."""
    closed = {other for other in leave_out if folder in other.parents}
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not hidden and usable(str(inside)) and path.is_file() and not closed & set(path.parents):
            yield path


def signature(file: FeatureFile, columns: Columns = _PLAIN) -> Signature:
    """The shape of an item, from its header alone.

    Raises:
        DataError: the file is not such an array or table.
    """
    path = file.path
    if path.suffix == ARRAY:
        return Signature(_open_array(path, axes=2).shape[1], None)
    header = _header(path)
    names = [header[k] for k in _sort_columns(columns.of(header))[1]]
    if not names:
        problem = f"{path} has no columns of features"
        raise DataError(explain(problem, expected="a column 'time' and one column per dimension"))
    return Signature(len(names), blake2b("\n".join(names).encode(), digest_size=8).hexdigest())


def read_features(file: FeatureFile, rate: float | None, columns: Columns = _PLAIN) -> Features:
    """One item's rows and times; times in its files win over `rate` (rows per second, the first at 0).

    Raises:
        DataError: a file cannot be read, has no rows, or has no times, or their number or order is wrong.
    """
    path = file.path
    if path.suffix == ARRAY:
        rows = np.array(_open_array(path, axes=2), np.float64)
        time = None if file.times is None else np.array(_open_array(file.times, axes=1), np.float64)
    else:
        rows, time = _read_table(path, columns)
    if not len(rows):
        raise DataError(explain(f"{path} has no rows", expected="features for at least one instant"))
    if time is None and rate is not None:
        time = np.arange(len(rows)) / rate
    if time is None:
        expected = f"{Path(file.item).name}{TIMES} beside the array, or a column 'time' in the table"
        remedy = "Add them, or give --rate HZ if rows follow at a steady rate from the clip's start"
        raise DataError(explain(f"The features of {file.item!r} have no times", expected=expected, remedy=remedy))
    _check_times(file.times or path, time, len(rows))
    valid = np.asarray(np.isfinite(rows).all(axis=1), bool)
    rows[~valid] = 0
    return Features(rows, time, valid)


def _check_times(path: Path, time: NDArray[np.float64], rows: int) -> None:
    if len(time) != rows:
        problem = f"{path} does not fit its features"
        raise DataError(explain(problem, expected=f"{rows} times, one per row", got=len(time)))
    wrong = ~(np.isfinite(time) & (time >= 0) & (time <= MAX_SECONDS) & (np.diff(time, prepend=-1.0) > 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        got = f"{time[row]} at row {row}" + (f" after {time[row - 1]}" if row else "")
        expected = f"seconds from 0 to {MAX_SECONDS:.0f}, ascending"
        raise DataError(explain(f"{path} holds times that cannot be used", expected=expected, got=got))


def _open_array(path: Path, axes: int) -> NDArray[Any]:
    """The array in a .npy file, mapped, so that its shape is checked before anything is read."""
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
            raise DataError(explain(f"{path} has empty or repeated column names", got=",".join(cells)[:60]))
        return cells
    raise DataError(explain(f"{path} is empty", expected="a header, then one row a line"))


def _sort_columns(roles: list[str]) -> tuple[list[int], list[int]]:
    """Positions of the columns whose mean is the time, and of the feature columns."""
    clocks = [("time",), ("start", "end"), ()]
    clock = next(names for names in clocks if set(names) <= set(roles))
    kept = [k for k, role in enumerate(roles) if role not in (*clock, "ignore")]
    return [roles.index(name) for name in clock], kept


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not empty; commas, semicolons or tabs separate cells.

    Raises:
        DataError: the file is not such a table.
    """
    if (problem := size_problem(path, LARGEST // 8)) is not None:
        raise DataError(explain(f"{path} cannot be read", expected="a table of one item's features", got=problem))
    separator = separator_of(head(path).partition("\n")[0])
    try:
        with open_text(path) as file:
            reader = csv.reader(file, delimiter=separator)
            for cells in reader:
                if cells:
                    cells = [cell.strip() for cell in cells]
                    yield reader.line_num, cells if separator == "," else [decimal_point(cell) for cell in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(explain(f"{path} cannot be read", expected="a table in UTF-8 text", got=error)) from error


def _read_table(path: Path, columns: Columns) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Rows of the feature columns, NaN for missing cells; and the times, or None if the table has none."""
    header = _header(path)
    clock, kept = _sort_columns(columns.of(header))
    rows, times = [], []
    lines = _lines(path)
    next(lines)
    for number, cells in lines:
        if len(cells) != len(header):
            problem = f"{path} has a line of another length"
            raise DataError(explain(problem, expected=f"{len(header)} cells", got=f"{len(cells)} in line {number}"))
        try:
            rows.append(np.array(["nan" if cells[k].lower() in MISSING else cells[k] for k in kept], np.float64))
            times.append(sum(seconds_of(cells[k]) for k in clock) / max(len(clock), 1))
        except ValueError as error:
            problem = f"{path} has a cell that is not a number, in line {number}"
            remedy = "Leave a column of text out: --columns ignore=NAME"
            raise DataError(explain(problem, expected="numbers", got=error, remedy=remedy)) from error
    table = np.array(rows, np.float64).reshape(-1, len(kept))
    return table, np.array(times, np.float64) if clock else None


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
    """Group -> scale, from the statistics of its items."""
    members: dict[str, list[Moments]] = {}
    for item in sorted(moments):
        members.setdefault(groups[item], []).append(moments[item])
    scales = {}
    for group, parts in members.items():
        total = reduce(Moments.__add__, parts)
        std = np.sqrt(total.squares / max(total.count, 1))
        scales[group] = Scale(total.mean, np.where(std > _CONSTANT, std, 1.0))
    return scales
