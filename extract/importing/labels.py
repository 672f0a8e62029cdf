"""Labels and targets of items. Labels of imported features: a clip's clock, split, group and annotation.

    DIR/<item>.csv     time (seconds) or frame (row of the features), or start and end (seconds); valence, arousal
    DIR/<item>.txt     as the ABAW challenges write it: `valence,arousal`, then a row per frame

Targets are further annotation of clips, expression classes or action units (`vaflow cache targets`).

    DIR/<item>.csv or .txt, with a column `time` (seconds) or `frame` (0-based); without, row k is the clip's frame k

classes: one column with each row's class, by name or number; or, as ABAW writes it, a first line with the names of the
classes and then a number a row; or a column of shares per class. binary: a column of 0 and 1 per unit. -1 and empty
cells are not annotated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Array, Record, StreamInfo
from vaflow.datasets.affwild2 import read_affwild2, strip_side
from vaflow.datasets.clip import Annotation
from vaflow.datasets.files import Assignment, below, read_table, separator_of
from vaflow.datasets.labels import (
    EMPTY,
    MAX_FRAME,
    MAX_SECONDS,
    TARGETS,
    LabelFile,
    clock_problem,
    decimal_point,
    on_clock,
    split_cells,
)
from vaflow.datasets.videos import read_csv
from vaflow.errors import DataError, UsageError, command, count, explain
from vaflow.extract.importing.feature_files import Columns, FeatureFile, Features, files_below
from vaflow.extract.source_files import file_identity, same_file, same_part
from vaflow.extract.streams import provenance
from vaflow.timeline import Bools, Floats, extend, median_interval

CLOCK = "imported"
SUFFIXES = (".csv", ".txt")
TASKS = ("classes", "binary")  # of targets
CLOCKS = ("time", "frame")
SHOWN = 5  # problems in a message

_NO_FRAMES = np.empty(0, np.float64)


@dataclass(frozen=True)
class LabelOptions:
    """Source and format of labels.

    Attributes:
        folder: of label files, or None.
        columns: roles of a table's columns.
        rate: rows per second of labels that count frames; None: they count the rows of the features.
        assigned: splits and groups of the items; None without a list.
    """

    folder: Path | None = None
    columns: Columns = field(default_factory=Columns)
    rate: float | None = None
    assigned: Assignment | None = None

    def identity(self) -> dict[str, Any]:
        """Options that change the labels read from an unchanged file; empty for the defaults."""
        options = {"columns": self.columns.roles, "rate": self.rate}
        return {name: value for name, value in options.items() if value}


@dataclass(frozen=True)
class Prepared:
    """Arrays, source and facts of one item of the labels stream.

    Attributes:
        problem: why the labels may not belong to the features, of `vaflow.datasets.labels.clock_problem`.
    """

    arrays: dict[str, Any]
    source: dict[str, Any]
    meta: dict[str, Any]
    problem: str = ""


class ImportedLabels:
    """Writes the labels of imported items; labels extracted from videos are not changed.

    Args:
        stream: the features' name. Labels on the features' clock belong to this stream, and change with it.
        rate: rows of the features per second, or None.

    Attributes:
        extracted: the labels of the cache come from videos.

    Raises:
        UsageError: label files are given, and the cache's labels come from videos.
    """

    def __init__(self, cache: Cache, stream: str, rate: float | None, options: LabelOptions) -> None:
        self._cache, self._stream, self._rate, self._options = cache, stream, rate, options
        known = cache.streams().get(LABELS)
        self.extracted = known is not None and known.identity.get("clock") != CLOCK
        if self.extracted and options.folder is not None:
            problem = f"The labels of {cache.place} come from its videos and cannot be mixed with others"
            change = command("cache", "splits", cache.place, "splits.csv")
            remedy = f"Omit --labels, or import into another cache. To change splits only: {change}"
            raise UsageError(explain(problem, got=f"--labels {options.folder}", remedy=remedy))
        self._declared = self.extracted

    def needed(self, file: FeatureFile) -> bool:
        """Whether the item's labels are missing, or its files or options have changed.

        Raises:
            DataError: the cache was extracted from videos, and lacks this item.
        """
        if not self._cache.has(LABELS, file.item):
            if self.extracted:
                problem = f"{self._cache.place} was extracted from videos, and has no item {file.item!r}"
                raise DataError(explain(problem, remedy="Name the files as the cache's items, or extract it first"))
            return True
        return not self.extracted and not self._same(file, self._cache.record(LABELS, file.item))

    def _same(self, file: FeatureFile, record: Record) -> bool:
        source, table = record.source, self._table(file.item)
        if source.get("split") != self.split(file.item) or source.get("group") != self.group(file.item):
            return False
        if table is not None:
            if not ("labels" in source and same_file(table, source["labels"])):
                return False
            if source.get("options", {}) != self._options.identity():
                return False
        if source.get("stream") != self._stream:
            return True  # its clock is that of another stream's rows
        if self._options.folder is not None and table is None and "labels" in source:
            return False  # its table was removed
        return file.has_identity({name: source[name] for name in ("features", "time") if name in source})

    def _table(self, item: str) -> Path | None:
        return None if self._options.folder is None else label_path(self._options.folder, item)

    def prepare(self, file: FeatureFile, features: Features) -> Prepared:
        """Labels at their own times; at the features' times if the table counts frames or gives spans, or is missing.

        Without a folder of labels, an item keeps those that it has.

        Raises:
            DataError: the table cannot be used; every problem is named with its lines. Or labels that follow the rows
                of the features cannot be kept.
        """
        table, item = self._table(file.item), file.item
        if self._options.folder is None and self._cache.has(LABELS, item):
            record, kept = self._cache.committed(LABELS, item)
            if "labels" in record.source:
                return self._keep(file, features, record, kept)
        annotation = None if table is None else read_labels(table, self._options, features.time)
        has_times = annotation is not None and annotation.time is not None
        arrays = on_clock(annotation, _NO_FRAMES if has_times else features.time)
        source: dict[str, Any] = {"stream": self._stream, **file.identity()}
        if table is not None:
            source["labels"] = file_identity(table)
            if self._options.identity():
                source["options"] = self._options.identity()
        split, group = self.split(item), self.group(item)
        source |= {"split": split, "group": group}
        meta = {
            "split": split,
            "group": group,
            "duration": max(self._end(features.time), self._end(arrays["time"])),
            "frames": len(arrays["time"]),
            "rows": 0 if annotation is None else len(annotation.value),
            "targets": [] if annotation is None else list(annotation.targets),
        }
        return Prepared(arrays, source, meta, clock_problem(annotation, features.time))

    def _keep(self, file: FeatureFile, features: Features, record: Record, kept: dict[str, Array]) -> Prepared:
        """The labels of an earlier import, with the item's split and group of now."""
        place = {"split": self.split(file.item), "group": self.group(file.item)}
        source, meta = dict(record.source) | place, dict(record.meta) | place
        if source.get("stream") == self._stream:
            if self._follows_rows(file.item, features, kept["time"]):
                problem = f"The labels of {file.item!r} follow the rows of its features, whose times have changed"
                raise DataError(explain(problem, remedy="Name the folder of its labels again: --labels DIR"))
            source = {name: value for name, value in source.items() if name not in ("features", "time")}
            source |= file.identity()
            meta["duration"] = max(self._end(features.time), self._end(kept["time"]))
        return Prepared(kept, source, meta)

    def _follows_rows(self, item: str, features: Features, times: Floats) -> bool:
        """Whether label times are those of the rows in the cache, and not of the new ones."""
        if not self._cache.has(self._stream, item):
            return False
        rows = self._cache.read(self._stream, item, ["time"]).time.ravel()
        return np.array_equal(times[: len(rows)], rows) and not np.array_equal(rows, features.time)

    def split(self, item: str) -> str | None:
        """The split of the list; without a list, that of the cache."""
        if self._options.assigned is not None:
            return self._options.assigned.splits.get(item)
        return self._cache.meta(item).get("split") if self._cache.has(LABELS, item) else None

    def group(self, item: str) -> str:
        """The group of the list, or else of the cache; by default the item's name without `_left` or `_right`."""
        if self._options.assigned is not None:
            return self._options.assigned.groups.get(item, strip_side(item))
        cached = self._cache.meta(item).get("group") if self._cache.has(LABELS, item) else None
        return cached if cached not in (None, item) else strip_side(item)

    def _end(self, time: Floats) -> float:
        interval = 1 / self._rate if self._rate else 1 / 30
        return float(time[-1] + median_interval(time, default=interval))

    def commit(self, item: str, prepared: Prepared) -> None:
        """Write the prepared labels; the first ones create the stream, so that an import that fails leaves none."""
        if not self._declared:
            self._cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS, "clock": CLOCK}))
            self._declared = True
        meta = prepared.meta | provenance()
        self._cache.write(LABELS, item, prepared.arrays, source=prepared.source, meta=meta)


def label_path(folder: Path, item: str) -> Path | None:
    """The label file of an item: a table, or else a challenge's text file; None without one."""
    paths = (below(folder, f"{item}{suffix}") for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def read_labels(path: Path, options: LabelOptions, times: Floats) -> Annotation:
    """One item's labels.

    Args:
        options: roles of columns, and the rate of rows that count frames.
        times: [T] seconds of the features' rows: the clock of rows that give a span.

    Raises:
        DataError: with every problem and its lines.
    """
    if path.suffix == ".txt":
        annotation = read_affwild2(path)
    elif (spans := _read_spans(path, options.columns, times)) is not None:
        return spans
    else:
        annotation = read_csv(path, options.columns.of)
    if options.rate is None or annotation.frame is None:
        return annotation
    return Annotation(value=annotation.value, time=annotation.frame / options.rate, targets=annotation.targets)


def _read_spans(path: Path, columns: Columns, times: Floats) -> Annotation | None:
    """Labels of a table with `start` and `end`, at the features' times; None if it has a column of times or frames.

    A time in several spans takes the last one that begins before it.
    """
    text = LabelFile(path, "columns 'start' and 'end' (seconds), and 'valence' and/or 'arousal'; then one row a span")
    separator = separator_of(text.lines[0])
    names = columns.of(split_cells(text.lines[0], separator))
    if {"time", "frame"} & set(names) or not {"start", "end"} <= set(names):
        return None
    targets = tuple(target for target in TARGETS if target in names)
    if not targets:
        raise text.header_error()
    starts, ends, rows = [], [], []
    for number, cells in text.rows(len(names), separator=separator):
        starts += text.stamps([(number, cells[names.index("start")])], "seconds").tolist()
        ends += text.stamps([(number, cells[names.index("end")])], "seconds").tolist()
        rows.append([text.value(cells[names.index(target)], number, EMPTY) for target in targets])
        if len(starts) == len(ends) and starts and not starts[-1] < ends[-1]:
            text.problems.add("end is not after start", number)
    text.check(len(rows))
    value = np.full((len(times), 2), np.nan, np.float32)
    for k in np.argsort(starts, kind="stable"):
        inside = (times >= starts[k]) & (times < ends[k])
        value[np.ix_(inside, [TARGETS.index(target) for target in targets])] = rows[k]
    return Annotation(value=value, frame=np.arange(len(times)), targets=targets)


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
    """The result of an import: clips written, clips up to date, annotated rows, and the names of the targets.

    `unused`: files that belong to no clip of the cache.
    """

    written: int
    done: int
    rows: int
    names: tuple[str, ...]
    unused: tuple[str, ...] = ()


def import_targets(cache: Cache, stream: str, task: str, folder: Path, names: Sequence[str] = ()) -> TargetSummary:
    """Write the targets of every clip of the cache that has a file; nothing is written while a file has a problem.

    Args:
        cache: writable; its clips' frames are the clock of files that count frames.
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
        time = table.at
        if table.clock != "time":  # rows beyond the clip's frames continue at their median interval
            number = time.astype(np.int64)
            time = extend(cache.read(LABELS, item, ["time"]).time, int(number.max()) + 1)[number]
        order = np.argsort(time, kind="stable")
        source = cache.record(LABELS, item).source
        video = {part: source[part] for part in ("video", "frames") if part in source}
        stored = cache.record(stream, item).source if cache.has(stream, item) else {"targets": {}}
        same = same_file(files[item], stored["targets"]) and same_part(
            {part: stored.get(part) for part in video}, video
        )
        if same and np.array_equal(cache.read(stream, item, ["time"]).time, time[order]):  # the clip's frames as well
            continue
        value, valid = table.value[order].astype(np.float32), table.valid[order]
        arrays: dict[str, Array] = {"time": time[order], "value": value, "valid": valid}
        cache.write(stream, item, arrays, source={"targets": file_identity(files[item])} | video)
        written += 1
    rows = sum(int(table.valid.any(axis=1).sum()) for table in tables.values())
    found = (path.relative_to(folder) for path in sorted(files_below(folder)) if path.suffix in SUFFIXES)
    unused = tuple(str(path) for path in found if path.with_suffix("").as_posix() not in files)
    return TargetSummary(written, len(tables) - written, rows, first.names, unused)


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
    separator, lines = read_table(path, "a table of targets", DataError)
    header, *rows = [cells for _, cells in lines] or [[]]
    clocks = [k for k, name in enumerate(header) if name.lower() in CLOCKS]
    columns = tuple(name for k, name in enumerate(header) if k not in clocks)
    if not rows or not columns or len(clocks) > 1:
        raise DataError(explain(f"{path} holds no targets", expected="a header, then a row per frame or time"))
    if len(set(columns)) < len(columns):
        raise DataError(explain(f"{path} has two columns of one name", got=", ".join(columns)))
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
    if len(np.unique(at)) < len(at) or (clock == "frame" and (at != np.floor(at)).any()):
        expected = "each time once" if clock == "time" else "whole numbers, each once"
        raise DataError(explain(f"{path} has {clock}s that cannot be used", expected=expected))
    return TargetTable(named, clock, at, value, np.isfinite(value))


def _one_class(cell: str, names: tuple[str, ...]) -> Floats:
    """[K] 1 for the class, by name or number, and 0 for the others; NaN if not annotated."""
    number = names.index(cell) if cell in names else float(cell or -1)
    if number == -1:
        return np.full(len(names), np.nan)
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
