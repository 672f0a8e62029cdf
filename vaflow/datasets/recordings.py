"""Layouts `recola`, `sewa` and `muse`: the challenges' corpora, with labels, videos and audio in folders of their own.

Only names decide what belongs together: `Train_01.csv`, `Train_01.mp4` and `Train_01.wav` are one recording, whichever
folders they are in. Case is ignored. Without an audio file, the video's own audio stream is used. Labels are searched
down to four folders below the root. Names that begin with train_, dev_, devel_ or test_ give the split; ROOT/splits.csv
(`name,split`) wins over them.

RECOLA as released for the AVEC 2015 and 2016 challenges:

    [*/]arousal/<name>.arff  [*/]valence/<name>.arff     gold standard every 0.04 s, or .csv separated by semicolons
    recordings_video/<name>.mp4   recordings_audio/<name>.wav

`detect` looks for a folder named `arousal` or `valence` whose first table has the field GoldStandard: features and the
ratings of single raters are in folders of the same names and are not labels.

SEWA as released for the AVEC 2017 to 2019 challenges:

    [*/]labels/<name>.csv        timestamp; arousal; valence (; liking) every 0.1 s, with or without a header
    */<name>.mp4 | .avi ...      */<name>.wav

`detect` looks for a folder whose name begins with `label` and whose first .csv is separated by semicolons.

MuSe, label files and raw videos of the challenges:

    [*/]arousal/<id>.csv  [*/]valence/<id>.csv     timestamp (milliseconds), value, segment_id
    [*/]partition.csv                              Id,Proposal: train, devel, test
    */<id>.mp4 ...                                 */<id>.wav

`detect` looks for a folder named `arousal` or `valence` whose first .csv has that header. partition.csv gives the
splits, not the names. Other dimensions (trustworthiness, physio-arousal) are not read.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from vaflow.datasets.clip import Annotation, Clip, Layout, Note
from vaflow.datasets.files import LeftOut, assign, head, is_audio, is_regular, is_video, read_table, walk
from vaflow.datasets.labels import NOT_A_NUMBER, TARGETS, DimensionLabels, LabelFile, is_number, split_cells, with_gaps
from vaflow.errors import UsageError, examples, explain

TABLES = (".csv", ".arff")
DIMENSIONS = ("arousal", "valence")

_PREFIX = re.compile(r"(train|devel|dev|test)(?=[ _-])", re.IGNORECASE)
_SPLITS = {"train": "train", "devel": "val", "dev": "val", "val": "val", "test": "test"}
_EXPECTED_RECOLA = (
    "the fields instance name, frameTime (seconds) and GoldStandard (in [-1, 1]), declared by '@attribute' lines "
    "with '@data' after them (.arff), or by a header separated by semicolons (.csv)"
)
_TIME, _GOLD = "frametime", "goldstandard"
_EXPECTED_SEWA = (
    "columns separated by semicolons: instance name (optional), timestamp (seconds), arousal, valence, and optionally "
    "liking; a header may name them"
)
_IN_ORDER = ("timestamp", "arousal", "valence", "liking")
_FEWEST_COLUMNS = 3  # time, arousal, valence
PARTITION_FILE = "partition.csv"
_MUSE_COLUMNS = ("timestamp", "value", "segment_id")
_EXPECTED_MUSE = "the header 'timestamp,value,segment_id' (milliseconds, a number in [-1, 1], whole numbers)"


@dataclass
class Files:
    """The files below a root, in the order of the walk.

    Attributes:
        tables: (folder, names of its .csv and .arff files), for every folder that has some.
        videos, audio: media files.
    """

    root: Path
    tables: list[tuple[Path, list[str]]] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)


@dataclass
class Recording:
    """One name and its files, in the order of the walk. `labels`: target ("" for both) -> files."""

    name: str
    videos: list[Path] = field(default_factory=list)
    audio: list[Path] = field(default_factory=list)
    labels: dict[str, list[Path]] = field(default_factory=dict)


LabelFiles = Callable[[Files], list[tuple[str, Path]]]  # -> (target, or "" for both; label file)
OfficialSplits = Callable[[Files, list[str]], tuple[Mapping[str, str], list[Note]]]  # files, names -> splits, notes


def recordings_layout(
    looks_for: str,
    label_files: LabelFiles,
    kind: str,
    label_format: str,
    official_splits: OfficialSplits | None = None,
) -> Layout:
    """A layout whose recordings are matched by name.

    Args:
        looks_for: as in `Layout`.
        label_files: picks the label files out of all tables.
        kind: what they are, for messages; label_format: key of their reader.
        official_splits: by default a name's prefix gives the split.
    """
    scan = partial(_scan, label_files, label_format, official_splits)
    return Layout(looks_for, partial(_detect, label_files, kind), scan)


def _detect(label_files: LabelFiles, kind: str, root: Path) -> str | None:
    """Return why `root` matches a layout (its first label file); None if it has no label file."""
    files = Files(root, [(folder, names) for folder, entries in walk(root) if (names := _tables(entries))])
    labels = label_files(files)
    return f"{labels[0][1].relative_to(root)} is {kind}" if labels else None


def _scan(
    label_files: LabelFiles, label_format: str, official_splits: OfficialSplits | None, root: Path
) -> tuple[list[Clip], list[Note]]:
    """Clips and notes.

    Raises:
        UsageError: a list of splits has mistakes.
    """
    files, left_out = Files(root), LeftOut(root)
    for folder, entries in walk(root, left_out):
        media = [entry for entry in entries if is_video(entry.name) or is_audio(entry.name)]
        left_out.unusable += [left_out.name(entry.path) for entry in media if not is_regular(entry)]
        usable = [folder / entry.name for entry in media if is_regular(entry)]
        files.videos += [path for path in usable if is_video(path.name)]
        files.audio += [path for path in usable if is_audio(path.name)]
        if tables := _tables(entries):
            files.tables.append((folder, tables))
    recordings = _match(files, label_files(files), left_out)
    names = [recording.name for recording in recordings]
    if official_splits is None:
        official: Mapping[str, str] = {
            name: _SPLITS[match[1].lower()] for name in names if (match := _PREFIX.match(name)) is not None
        }
        notes: list[Note] = []
    else:
        official, notes = official_splits(files, names)
    assigned = assign(root, [(name, name) for name in names], official)
    notes += [*assigned.notes, *left_out.notes()]
    clips = []
    for recording in recordings:
        notes += _file_notes(root, recording)
        name = recording.name
        video = recording.videos[0] if recording.videos else None
        audio = recording.audio[0] if recording.audio else video
        labels = {target: paths[0] for target, paths in sorted(recording.labels.items())}
        clips.append(
            Clip(
                id=name,
                split=assigned.splits.get(name),
                group=assigned.groups.get(name, name),
                video=video,
                audio=audio,
                labels=next(iter(labels.values()), None),
                label_format=label_format if labels else "none",
                dimensions=() if "" in labels else tuple(labels.items()),
            )
        )
    return clips, notes


def _tables(entries: list[os.DirEntry[str]]) -> list[str]:
    return [entry.name for entry in entries if entry.name.lower().endswith(TABLES)]


def _match(files: Files, labels: list[tuple[str, Path]], left_out: LeftOut) -> list[Recording]:
    """Recordings of all label files and videos; audio files without either are recorded as ignored."""
    known: dict[str, Recording] = {}
    for target, path in labels:
        known.setdefault(path.stem.casefold(), Recording(path.stem)).labels.setdefault(target, []).append(path)
    for path in files.videos:
        known.setdefault(path.stem.casefold(), Recording(path.stem)).videos.append(path)
    for path in files.audio:
        if path.stem.casefold() in known:
            known[path.stem.casefold()].audio.append(path)
        else:
            left_out.ignored.append(left_out.name(path))
    return list(known.values())


def _file_notes(root: Path, recording: Recording) -> list[Note]:
    """Notes on several files of one kind, and on a dimension without labels."""
    name, notes = recording.name, []
    for kind, paths in (("video", recording.videos), ("audio", recording.audio), *recording.labels.items()):
        if len(paths) > 1:
            shown = ", ".join(str(path.relative_to(root)) for path in paths)
            message = f"Several {kind or 'label'} files are named {name}: {shown}; the first is used"
            notes.append(Note("warning", "several-files", name, message, "Keep the one that belongs to the recording"))
    if len(recording.labels) == 1 and "" not in recording.labels:
        message = f"Only {next(iter(recording.labels))} is labelled"
        remedy = "The other dimension is neither trained nor scored"
        notes.append(Note("note", "one-dimension", name, message, remedy))
    return notes


def _recola_files(files: Files) -> list[tuple[str, Path]]:
    return [
        (folder.name.lower(), folder / name)
        for folder, tables in files.tables
        if folder.name.lower() in DIMENSIONS and _GOLD in _plain(head(folder / tables[0]))
        for name in tables
    ]


def read_recola(path: Path) -> DimensionLabels:
    """One dimension of one recording. Fields other than time and gold standard are ignored.

    Raises:
        DataError: with every problem and its lines.
    """
    text = LabelFile(path, _EXPECTED_RECOLA)
    if text.lines[0].lstrip().startswith(("@", "%")):
        lines = list(enumerate(text.lines, 1))
        data = next((number for number, line in lines if line.strip().lower().startswith("@data")), len(lines))
        first = next((number for number, line in lines[data:] if line.strip()), len(lines) + 1)
        separator = ","
        words = [line.split() for line in text.lines[: first - 1]]
        fields = [row[1].strip("'\"") for row in words if len(row) > 1 and row[0].lower() == "@attribute"]
    else:
        fields, first, separator = split_cells(text.lines[0], ";"), 2, ";"
    names = [_plain(field) for field in fields]
    if names.count(_TIME) != 1 or names.count(_GOLD) != 1:
        raise text.error(f"the fields {', '.join(fields)[:80]!r}")
    time, value, _ = text.timed_values(names, _TIME, [_GOLD], first=first, separator=separator, missing=NOT_A_NUMBER)
    return DimensionLabels(time, value[:, 0])


def _plain(name: str) -> str:
    """A field's name in lower case, without blanks and underscores."""
    return "".join(name.lower().replace("_", " ").split())


def _sewa_files(files: Files) -> list[tuple[str, Path]]:
    labels = []
    for folder, tables in files.tables:
        tables = [name for name in tables if name.lower().endswith(".csv")]
        if not tables or folder == files.root or not folder.name.lower().startswith("label"):
            continue
        if head(folder / tables[0]).partition("\n")[0].count(";") >= _FEWEST_COLUMNS - 1:
            labels += [("", folder / name) for name in tables]
    return labels


def read_sewa(path: Path) -> Annotation:
    """Arousal and valence. Without a header the columns are in the order of the challenges' files.

    Raises:
        DataError: with every problem and its lines.
    """
    text = LabelFile(path, _EXPECTED_SEWA)
    cells = split_cells(text.lines[0], ";")
    names = [cell.lower().replace("_", "") for cell in cells]
    first = 2
    if any(target in names for target in TARGETS):
        names = ["timestamp" if name in ("time", "frametime") else name for name in names]
    else:
        first, columns = 1, [] if is_number(cells[0]) else ["name"]
        count = len(cells) - len(columns)
        names = [*columns, *_IN_ORDER[:count]] if _FEWEST_COLUMNS <= count <= len(_IN_ORDER) else []
    targets = tuple(target for target in TARGETS if target in names)
    if "timestamp" not in names or not targets or len(set(names)) != len(names):
        raise text.header_error()
    time, value, _ = text.timed_values(names, "timestamp", targets, first=first, separator=";", missing=NOT_A_NUMBER)
    both = np.full((len(value), 2), np.nan, np.float32)
    both[:, [TARGETS.index(target) for target in targets]] = value
    return Annotation(value=both, time=time, targets=targets)


def _muse_files(files: Files) -> list[tuple[str, Path]]:
    labels = []
    for folder, tables in files.tables:
        tables = [name for name in tables if name.lower().endswith(".csv")]
        if not tables or folder.name.lower() not in DIMENSIONS:
            continue
        header = {cell.lower() for cell in split_cells(head(folder / tables[0]).partition("\n")[0])}
        if header >= set(_MUSE_COLUMNS):
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
        elif (split := _SPLITS.get(row[split_at].lower())) is None:
            problems.append(f"line {number} has the partition {row[split_at]!r}")
        elif splits.setdefault(row[name_at], split) != split:
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
    text = LabelFile(path, _EXPECTED_MUSE)
    header = [cell.lower() for cell in split_cells(text.lines[0])]
    if len(set(header)) != len(header) or not set(_MUSE_COLUMNS) <= set(header):
        raise text.header_error()
    at = [header.index(name) for name in _MUSE_COLUMNS]
    stamps, values, segments = [], [], []
    for number, cells in text.rows(len(header)):
        stamp, value, segment = (cells[i] for i in at)
        stamps.append((number, stamp))
        segments.append(segment)
        known = text.value(value, number, NOT_A_NUMBER)
        values.append(known if segment else np.nan)
    milliseconds = text.stamps(stamps, "milliseconds")
    text.check(len(values))
    breaks = np.array([one != other for one, other in pairwise(segments)], bool)
    return with_gaps(DimensionLabels(milliseconds / 1000, np.array(values, np.float32)), breaks)


RECOLA = recordings_layout(
    "folders arousal/ and valence/ of gold standard files (.arff, or .csv with the field GoldStandard)",
    _recola_files,
    "a gold standard",
    "recola",
)
SEWA = recordings_layout(
    "a folder labels/ of .csv files separated by semicolons", _sewa_files, "a table of labels", "sewa"
)
MUSE = recordings_layout(
    "folders arousal/ and valence/ of .csv files with the header timestamp,value,segment_id",
    _muse_files,
    "a table of labels",
    "muse",
    _partition,
)
