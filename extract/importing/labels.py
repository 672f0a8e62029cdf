"""The labels stream of imported features: a clip's clock, split, group and annotation.

DIR/<item>.csv     time (seconds) or frame (row of the features), or start and end (seconds); valence, arousal
DIR/<item>.txt     as the ABAW challenges write it: `valence,arousal`, then a row per frame
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Record, StreamInfo
from vaflow.datasets.affwild2 import read_affwild2, strip_side
from vaflow.datasets.clip import Annotation
from vaflow.datasets.files import below
from vaflow.datasets.labels import clock_problem, on_clock
from vaflow.datasets.splits import Assignment
from vaflow.datasets.text import TARGETS, LabelFile, separator_of, split_cells
from vaflow.datasets.videos import read_csv
from vaflow.errors import DataError, UsageError, command, explain
from vaflow.extract.importing.feature_files import Columns, FeatureFile, Features
from vaflow.extract.sources import file_identity, same_file
from vaflow.extract.streams import provenance
from vaflow.timeline import Floats, median_interval

CLOCK = "imported"
SUFFIXES = (".csv", ".txt")

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
        return ({"columns": self.columns.roles} if self.columns.roles else {}) | (
            {"rate": self.rate} if self.rate else {}
        )


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
        cache: writable.
        stream: the features' name. Labels on the features' clock belong to this stream, and change with it.
        rate: rows of the features per second, or None.
        options: where labels come from.

    Raises:
        UsageError: label files are given, and the cache's labels come from videos.
    """

    def __init__(self, cache: Cache, stream: str, rate: float | None, options: LabelOptions) -> None:
        self._cache, self._stream, self._rate, self._options = cache, stream, rate, options
        known = cache.streams().get(LABELS)
        self._extracted = known is not None and known.identity.get("clock") != CLOCK
        if self._extracted and options.folder is not None:
            raise UsageError(
                explain(
                    f"The labels of {cache.place} come from its videos and cannot be mixed with others",
                    got=f"--labels {options.folder}",
                    remedy="Omit --labels, or import into another cache. "
                    f"To change splits only: {command('cache', 'splits', cache.place, 'splits.csv')}",
                )
            )
        self._declared = self._extracted

    def needed(self, file: FeatureFile) -> bool:
        """Whether the item's labels are missing, or its files or options have changed.

        Raises:
            DataError: the cache was extracted from videos, and lacks this item.
        """
        if not self._cache.has(LABELS, file.item):
            if self._extracted:
                problem = f"{self._cache.place} was extracted from videos, and has no item {file.item!r}"
                raise DataError(explain(problem, remedy="Name the files as the cache's items, or extract it first"))
            return True
        return not self._extracted and not self._same(file, self._cache.record(LABELS, file.item))

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
        parts = {"features": file.path} | ({"time": file.times} if file.times else {})
        recorded = {name for name in ("features", "time") if name in source}
        return recorded == parts.keys() and all(same_file(parts[name], source[name]) for name in parts)

    def _table(self, item: str) -> Path | None:
        return None if self._options.folder is None else label_path(self._options.folder, item)

    def prepare(self, file: FeatureFile, features: Features) -> Prepared:
        """Labels at their own times; at the features' times if the table counts frames or gives spans, or is missing.

        Raises:
            DataError: the table cannot be used; every problem is named with its lines.
        """
        table, item = self._table(file.item), file.item
        annotation = None if table is None else read_labels(table, self._options, features.time)
        has_times = annotation is not None and annotation.time is not None
        arrays = on_clock(annotation, _NO_FRAMES if has_times else features.time)
        source: dict[str, Any] = {"stream": self._stream, "features": file_identity(file.path)}
        if file.times is not None:
            source["time"] = file_identity(file.times)
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
        path: a table, or a challenge's text file.
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
        starts += text.times([(number, cells[names.index("start")])]).tolist()
        ends += text.times([(number, cells[names.index("end")])]).tolist()
        rows.append([text.value(cells[names.index(target)], number, {""}) for target in targets])
        if len(starts) == len(ends) and starts and not starts[-1] < ends[-1]:
            text.problems.add("end is not after start", number)
    text.check(len(rows))
    value = np.full((len(times), 2), np.nan, np.float32)
    for k in np.argsort(starts, kind="stable"):
        inside = (times >= starts[k]) & (times < ends[k])
        value[np.ix_(inside, [TARGETS.index(target) for target in targets])] = rows[k]
    return Annotation(value=value, frame=np.arange(len(times)), targets=targets)
