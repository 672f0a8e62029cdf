"""Layout `muse`: the MuSe challenges' label files and raw videos.

    [*/]arousal/<id>.csv  [*/]valence/<id>.csv     timestamp (milliseconds), value, segment_id
    [*/]partition.csv                              Id,Proposal: train, devel, test
    */<id>.mp4 ...                                 */<id>.wav

`detect` looks, down to four folders below the root, for a folder named `arousal` or `valence` whose first .csv has
that header. Video and sound may stand in any folder. ROOT/splits.csv (`name,split`) wins over partition.csv. Other
dimensions (trustworthiness, physio-arousal) are not read.

MuSe's label files: one table per dimension and clip, in stretches ("segments") with unannotated pauses between.
"""

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np

from vaflow.datasets import text
from vaflow.datasets.clip import Clip, Note
from vaflow.datasets.files import examples, head, size_problem
from vaflow.datasets.labels import Trace, with_gaps
from vaflow.datasets.recordings import DIMENSIONS, Found, make_clips, recordings, survey
from vaflow.datasets.text import Problems
from vaflow.errors import UsageError, explain

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


LOOKS_FOR = "folders arousal/ and valence/ of .csv files with the header timestamp,value,segment_id"
PARTITION_FILE = "partition.csv"

_LABEL_COLUMNS = {"timestamp", "value", "segment_id"}
_SPLITS = {"train": "train", "devel": "val", "dev": "val", "val": "val", "test": "test"}


def detect(root: Path) -> str | None:
    """Why `root` may be of this layout, or None."""
    labels = _labels(survey(root, media=False))
    return f"{labels[0][1].relative_to(root)} is a table of labels" if labels else None


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: partition.csv or ROOT/splits.csv has mistakes.
    """
    found = survey(root)
    all_recordings = recordings(found, _labels(found))
    splits, notes = _partition(found, {one.name for one in all_recordings})
    clips, more = make_clips(root, all_recordings, "muse", splits)
    return clips, [*notes, *more]


def _labels(found: Found) -> list[tuple[str, Path]]:
    labels = []
    for folder, tables in found.tables:
        tables = [name for name in tables if name.lower().endswith(".csv")]
        if folder.name.lower() in DIMENSIONS and tables and _is_table(folder / tables[0]):
            labels += [(folder.name.lower(), folder / name) for name in tables]
    return labels


def _is_table(path: Path) -> bool:
    return {cell.strip().lower() for cell in head(path).partition("\n")[0].split(",")} >= _LABEL_COLUMNS


def _partition(found: Found, names: set[str]) -> tuple[dict[str, str | None], list[Note]]:
    """Splits of those recordings that partition.csv names; of several such files the first counts."""
    files = [folder / name for folder, tables in found.tables for name in tables if name.lower() == PARTITION_FILE]
    if not files:
        return {}, []
    notes = []
    if len(files) > 1:
        shown = ", ".join(str(path.relative_to(found.root)) for path in files)
        message = f"There are several lists of partitions: {shown}; the first is used"
        notes.append(Note("warning", "several-partitions", "", message, "Keep one, or write splits.csv"))
    splits = _read_partition(files[0])
    unknown = sorted(splits.keys() - names)
    if unknown:
        message = f"{PARTITION_FILE} names what is not there: {examples(unknown)}"
        notes.append(Note("note", "split-unknown-name", "", message, "Add the labels or videos if they are wanted"))
    return {name: split for name, split in splits.items() if name in names}, notes


def _read_partition(path: Path) -> dict[str, str]:
    """Id -> split.

    Raises:
        UsageError: it is not such a table, or names an unknown partition; every problem is listed with its line.
    """
    if (problem := size_problem(path)) is not None:
        raise UsageError(explain(f"Cannot read {path}", expected="a list of partitions", got=problem))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(explain(f"Cannot read {path}", expected="UTF-8 text", got=error)) from error
    header = [cell.lower() for cell in rows[0]] if rows else []
    if "id" not in header or "proposal" not in header:
        got = repr(",".join(header)) if rows else "an empty file"
        raise UsageError(explain(f"{path} is not a list of partitions", expected="the header 'Id,Proposal'", got=got))
    name_at, split_at = header.index("id"), header.index("proposal")
    splits: dict[str, str] = {}
    problems = []
    for number, row in enumerate(rows[1:], 2):
        if not any(row):
            continue
        if len(row) != len(header):
            problems.append(f"line {number} has {len(row)} columns")
        elif row[split_at].lower() not in _SPLITS:
            problems.append(f"line {number} has the partition {row[split_at]!r}")
        elif splits.setdefault(row[name_at], _SPLITS[row[split_at].lower()]) != _SPLITS[row[split_at].lower()]:
            problems.append(f"line {number} puts {row[name_at]!r} into another partition than an earlier line")
    if problems:
        got = examples(problems, shown=20)
        raise UsageError(explain(f"{path} has mistakes", expected=f"{len(header)} columns", got=got, choices=_SPLITS))
    return splits
