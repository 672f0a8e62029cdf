"""Layout `muse`: the MuSe challenges' label files and raw videos.

    [*/]arousal/<id>.csv  [*/]valence/<id>.csv     timestamp (milliseconds), value, segment_id
    [*/]partition.csv                              Id,Proposal: train, devel, test
    */<id>.mp4 ...                                 */<id>.wav

`detect` looks, down to four folders below the root, for a folder named `arousal` or `valence` whose first .csv has
that header. Video and audio may be in any folder. ROOT/splits.csv (`name,split`) wins over partition.csv. Other
dimensions (trustworthiness, physio-arousal) are not read.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Clip, Note
from vaflow.datasets.files import examples, head
from vaflow.datasets.labels import NOT_A_NUMBER, DimensionLabels, LabelFile, read_table, split_cells, with_gaps
from vaflow.datasets.recordings import DIMENSIONS, Files, detect_labels, scan_recordings
from vaflow.errors import UsageError, explain

LOOKS_FOR = "folders arousal/ and valence/ of .csv files with the header timestamp,value,segment_id"
PARTITION_FILE = "partition.csv"

_COLUMNS = ("timestamp", "value", "segment_id")
_EXPECTED = "the header 'timestamp,value,segment_id' (milliseconds, a number in [-1, 1], whole numbers)"
_SPLITS = {"train": "train", "devel": "val", "dev": "val", "val": "val", "test": "test"}


def detect(root: Path) -> str | None:
    """Return why `root` matches this layout, or None."""
    return detect_labels(root, _label_files, "a table of labels")


def scan(root: Path) -> tuple[list[Clip], list[Note]]:
    """Clips and notes; `open_dataset` sorts the clips.

    Raises:
        UsageError: partition.csv or ROOT/splits.csv has mistakes.
    """
    return scan_recordings(root, _label_files, "muse", _partition)


def _label_files(files: Files) -> list[tuple[str, Path]]:
    labels = []
    for folder, tables in files.tables:
        tables = [name for name in tables if name.lower().endswith(".csv")]
        if not tables or folder.name.lower() not in DIMENSIONS:
            continue
        header = {cell.lower() for cell in split_cells(head(folder / tables[0]).partition("\n")[0])}
        if header >= set(_COLUMNS):
            labels += [(folder.name.lower(), folder / name) for name in tables]
    return labels


def _partition(files: Files, names: list[str]) -> tuple[dict[str, str], list[Note]]:
    """Splits of the recordings in partition.csv; of several such files the first one is used."""
    lists = [folder / name for folder, tables in files.tables for name in tables if name.lower() == PARTITION_FILE]
    if not lists:
        return {}, []
    notes = []
    if len(lists) > 1:
        shown = ", ".join(str(path.relative_to(files.root)) for path in lists)
        message = f"Several files are named {PARTITION_FILE}: {shown}; the first is used"
        notes.append(Note("warning", "several-partitions", "", message, "Keep one, or write splits.csv"))
    splits = _read_partition(lists[0])
    if unknown := sorted(splits.keys() - set(names)):
        message = f"{PARTITION_FILE} names unknown recordings: {examples(unknown)}"
        notes.append(Note("note", "split-unknown-name", "", message, "Add their labels or videos to use them"))
    return {name: split for name, split in splits.items() if name in names}, notes


def _read_partition(path: Path) -> dict[str, str]:
    """Id -> split.

    Raises:
        UsageError: it is not such a table, or names an unknown partition; every problem is listed with its line.
    """
    _, rows = read_table(path, "a list of partitions", UsageError)
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if "id" not in header or "proposal" not in header:
        got = repr(",".join(header)) if rows else "an empty file"
        raise UsageError(explain(f"{path} is not a list of partitions", expected="the header 'Id,Proposal'", got=got))
    name_at, split_at = header.index("id"), header.index("proposal")
    splits: dict[str, str] = {}
    problems = []
    for number, row in rows[1:]:
        if not any(row):
            continue
        if len(row) != len(header):
            problems.append(f"line {number} has {len(row)} columns")
        elif row[split_at].lower() not in _SPLITS:
            problems.append(f"line {number} has the partition {row[split_at]!r}")
        elif splits.setdefault(row[name_at], _SPLITS[row[split_at].lower()]) != _SPLITS[row[split_at].lower()]:
            problems.append(f"line {number} puts {row[name_at]!r} into another partition than an earlier line")
    if problems:
        got = examples(problems, shown=10)
        raise UsageError(explain(f"{path} has mistakes", expected=f"{len(header)} columns", got=got, choices=_SPLITS))
    return splits


def read_muse(path: Path) -> DimensionLabels:
    """One dimension of one clip. The time between two segments, and rows without a segment, are not annotated.

    Raises:
        DataError: with every problem and its lines.
    """
    text = LabelFile(path, _EXPECTED)
    header = [cell.lower() for cell in split_cells(text.lines[0])]
    if len(set(header)) != len(header) or not set(_COLUMNS) <= set(header):
        raise text.header_error()
    at = [header.index(name) for name in _COLUMNS]
    stamps, values, segments = [], [], []
    for number, cells in text.rows(len(header)):
        stamp, value, segment = (cells[i] for i in at)
        stamps.append((number, stamp))
        segments.append(segment)
        known = text.value(value, number, NOT_A_NUMBER)
        values.append(known if segment else np.nan)
    milliseconds = text.times(stamps, "milliseconds")
    text.check(len(values))
    breaks = np.array([one != other for one, other in pairwise(segments)], bool)
    return with_gaps(DimensionLabels(milliseconds / 1000, np.array(values, np.float32)), breaks)
