"""Import further annotation as a stream of targets: expression classes, action units (`vaflow cache targets`).

    DIR/<item>.csv or .txt, with a column `time` (seconds) or `frame` (0-based); without, row k is the clip's frame k

classes: one column with each row's class, by name or number; or, as ABAW writes it, a first line with the names of the
classes and then a number a row; or a column of shares per class. binary: a column of 0 and 1 per unit. -1 and empty
cells are not annotated.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Array, StreamInfo
from vaflow.datasets.files import head, open_text, size_problem
from vaflow.datasets.text import MAX_FRAME, MAX_SECONDS, decimal_point, separator_of
from vaflow.errors import DataError, UsageError, count, explain
from vaflow.extract.importing.labels import label_path
from vaflow.extract.sources import file_identity, same_file
from vaflow.timeline import Bools, Floats, extend

TASKS = ("classes", "binary")
CLOCKS = ("time", "frame")
SHOWN = 5  # problems in a message


@dataclass(frozen=True)
class TargetTable:
    """One file of targets.

    Attributes:
        names: of the columns of `value`.
        clock: "time", "frame", or "" where rows are the clip's frames.
        at: [R] seconds or frame numbers.
        value: [R, K] within [0, 1], NaN where not annotated; valid: [R, K].
    """

    names: tuple[str, ...]
    clock: str
    at: Floats
    value: Floats
    valid: Bools


@dataclass(frozen=True)
class TargetSummary:
    """The result of an import: clips written, clips up to date, annotated rows, and the names of the targets."""

    written: int
    done: int
    rows: int
    names: tuple[str, ...]


def import_targets(cache: Cache, stream: str, task: str, folder: Path, names: Sequence[str] = ()) -> TargetSummary:
    """Write the targets of every clip of the cache that has a file; nothing is written while a file has a problem.

    Args:
        cache: writable; its clips' frames are the clock of files that count frames.
        stream: name of the targets.
        task: "classes" or "binary".
        folder: of `<item>.csv` or `<item>.txt`.
        names: of the classes; empty: those in the files.

    Raises:
        UsageError: an unknown task, no file for any clip, or a name that belongs to another stream.
        DataError: files cannot be used; the message names them and their problems.
        FingerprintError: the stream exists with another task or other names.
    """
    if task not in TASKS:
        raise UsageError(explain("Unknown task", got=task, choices=TASKS))
    known = cache.streams().get(stream)
    if known is not None and known.kind != "targets":
        raise UsageError(explain(f"The name {stream!r} belongs to a stream of kind {known.kind}"))
    files = {item: path for item in cache.items() if (path := label_path(folder, item)) is not None}
    if not files:
        expected = f"files such as {folder / (cache.items() or ['CLIP'])[0]}.csv"
        raise UsageError(explain("No clip of the cache has a file of targets", expected=expected, got=folder))
    tables = _read_all(files, task, tuple(names))
    first = next(iter(tables.values()))
    cache.declare(StreamInfo(stream, "targets", 0, "float32", {"task": task, "names": list(first.names)}))
    written = 0
    for item, table in tables.items():
        if cache.has(stream, item) and same_file(files[item], cache.record(stream, item).source["targets"]):
            continue
        time = table.at
        if table.clock != "time":  # rows beyond the clip's frames continue at their median interval
            number = time.astype(np.int64)
            time = extend(cache.read(LABELS, item, ["time"]).time, int(number.max()) + 1)[number]
        order = np.argsort(time, kind="stable")
        value, valid = table.value[order].astype(np.float32), table.valid[order]
        arrays: dict[str, Array] = {"time": time[order], "value": value, "valid": valid}
        cache.write(stream, item, arrays, source={"targets": file_identity(files[item])})
        written += 1
    rows = sum(int(table.valid.any(axis=1).sum()) for table in tables.values())
    return TargetSummary(written, len(tables) - written, rows, first.names)


def _read_all(files: dict[str, Path], task: str, names: tuple[str, ...]) -> dict[str, TargetTable]:
    tables, problems = {}, []
    for item, path in files.items():
        try:
            tables[item] = read_targets(path, task, names)
        except DataError as error:
            problems.append(str(error))
    first = next(iter(tables.values()), None)
    problems += [
        f"{files[item]} has other names than the first file: {', '.join(table.names)}"
        for item, table in tables.items()
        if first is not None and table.names != first.names
    ]
    if problems:
        got = " ".join(problems[:SHOWN]) + (f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        raise DataError(explain(f"{count(len(problems), 'file')} of targets cannot be used", got=got))
    return tables


def read_targets(path: Path, task: str, names: tuple[str, ...] = ()) -> TargetTable:
    """One file in any of the forms above; commas, semicolons or tabs separate cells.

    Raises:
        DataError: it cannot be read, or a line has none of these forms.
    """
    if (problem := size_problem(path)) is not None:
        raise DataError(explain(f"{path} cannot be read", expected="a table of targets", got=problem))
    separator = separator_of(head(path).partition("\n")[0])
    try:
        with open_text(path) as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file, delimiter=separator) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(explain(f"{path} cannot be read", expected="a table in UTF-8 text", got=error)) from error
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    clocks = [k for k, name in enumerate(header) if name.lower() in CLOCKS]
    columns = tuple(name for k, name in enumerate(header) if k not in clocks)
    if not rows or not columns or len(clocks) > 1:
        raise DataError(explain(f"{path} holds no targets", expected="a header, then a row per frame or time"))
    named = names or columns
    single = task == "classes" and {len(row) - len(clocks) for row in rows} == {1}
    if task == "classes" and not single and names and names != columns:
        raise DataError(explain(f"{path} has other columns than the classes", expected=names, got=columns))
    if single and len(named) == 1:
        problem = f"{path} does not name the classes"
        raise DataError(explain(problem, expected="their names in the first line, or --names", got=columns[0]))
    value = np.full((len(rows), len(named)), np.nan)
    at = np.arange(len(rows), dtype=np.float64)
    for k, row in enumerate(rows):
        row = row if separator == "," else [decimal_point(cell) for cell in row]
        cells = [cell for j, cell in enumerate(row) if j not in clocks]
        try:
            at[k] = float(row[clocks[0]]) if clocks else k
            value[k] = _one_class(cells[0], named) if single else _shares(cells, named, task)
        except (ValueError, OverflowError, IndexError) as error:
            raise DataError(explain(f"{path}, line {k + 2} cannot be used", got=error)) from error
    clock = header[clocks[0]].lower() if clocks else ""
    most = MAX_SECONDS if clock == "time" else MAX_FRAME
    if not ((at >= 0) & (at <= most)).all():  # NaN fails this comparison too
        raise DataError(explain(f"{path} has impossible times or frames", expected=f"numbers from 0 to {most:.0f}"))
    return TargetTable(named, clock, at, value, np.isfinite(value))


def _one_class(cell: str, names: tuple[str, ...]) -> Floats:
    """[K] 1 for the class, by name or number, and 0 for the others; NaN if not annotated."""
    if cell in names:
        return np.eye(len(names))[names.index(cell)]
    if not cell or float(cell) == -1:
        return np.full(len(names), np.nan)
    number = float(cell)
    if number != int(number) or not 0 <= number < len(names):
        raise ValueError(f"class {cell!r}, not one of 0 to {len(names) - 1}: {', '.join(names)}")
    return np.eye(len(names))[int(number)]


def _shares(cells: Sequence[str], names: tuple[str, ...], task: str) -> Floats:
    """[K] the cells as numbers in [0, 1]; NaN if not annotated."""
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells for {len(names)} targets")
    value = np.array([float(cell or "nan") for cell in cells])
    value[value == -1] = np.nan
    if task == "classes" and not np.isfinite(value).all():
        return np.full(len(names), np.nan)
    wrong = (value < 0) | (value > 1)
    if wrong.any() or (task == "classes" and abs(value.sum() - 1) > 1e-3):
        raise ValueError("values that are not within [0, 1]" if wrong.any() else "shares that do not sum to 1")
    return value
