"""The files of a data set: folders, kinds by extension, safe names, text tables, and the list of splits.

A name that cannot be used does not end a scan: it is recorded in `LeftOut`, which becomes notes. `splits.csv` gives the
split of each item, and optionally its group (source video, speaker) and further columns.
"""

import codecs
import csv
import os
import stat
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vaflow.datasets.clip import SPLITS, Note
from vaflow.errors import DataError, UsageError, VaflowError, examples, explain

# Common containers that FFmpeg opens. Other files are ignored, counted and listed.
# fmt: off
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2v", ".mpv", ".vob", ".ts", ".mts", ".m2ts",
    ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".divx", ".dv", ".rm", ".rmvb", ".mjpeg", ".mjpg",
    ".y4m", ".nut",
)
AUDIO_SUFFIXES = (
    ".wav", ".mp3", ".flac", ".m4a", ".ogg", ".oga", ".opus", ".aac", ".wma", ".aif", ".aiff", ".amr", ".ac3", ".caf",
    ".mka",
)
# fmt: on

LARGEST_TEXT = 64 * 2**20  # bytes of a file of labels, splits or names: a day of frames has a tenth of that
DEPTH = 4  # `<archive>/<task>/label_segments/arousal/`: releases nest their folders one or two deeper than others

SPLITS_FILE = "splits.csv"

_COLUMNS = ("name", "split", "group")  # of this file
_LONGEST_NAME = 255  # bytes
_SHOWN_NAME = 100
_HEAD = 4096  # bytes


@dataclass
class LeftOut:
    """Unused names below a root, by reason; paths as text with forward slashes.

    Attributes:
        linked: folders that are links, where a layout does not enter them.
        unreadable: folders that cannot be listed.
        unusable: dangling or looping links, pipes and devices, names that are not UTF-8 or contain a backslash.
        ignored: files of a kind that the layout does not use.
        outputs: caches, runs and pages of `vaflow view`, which are not entered.
    """

    root: Path
    linked: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def name(self, path: str | Path) -> str:
        """Return a path for a listing: relative to the root, in printable characters."""
        text = os.path.relpath(path, self.root)
        return text if printable(text) else ascii(text)

    def notes(self) -> list[Note]:
        """One note for each reason that occurs."""
        notes = []
        if self.linked:
            message = f"Linked folders are not entered: {examples(self.linked)}"
            remedy = "Link or copy the files themselves, or name the real folder"
            notes.append(Note("warning", "linked-folder", "", message, remedy))
        if self.unreadable:
            message = f"Folders that cannot be listed are left out: {examples(self.unreadable)}"
            notes.append(Note("warning", "unreadable-folder", "", message, "Change their permissions, or remove them"))
        if self.unusable:
            message = f"Broken links, special files, names not in UTF-8 or with a backslash: {examples(self.unusable)}"
            notes.append(Note("warning", "unusable-name", "", message, "Rename the files, or correct the links"))
        if self.outputs:
            message = f"Caches, runs and pages in the data set are not searched: {examples(sorted(self.outputs))}"
            notes.append(Note("note", "outputs", "", message))
        if self.ignored:
            kinds = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in self.ignored)  # noqa: PTH122
            counts = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common(10))
            message = f"Files that are not used ({counts}): {examples(sorted(self.ignored))}"
            notes.append(Note("note", "ignored-files", "", message, "Convert them if they are recordings"))
        return notes


def entries(folder: Path, left_out: LeftOut | None = None) -> list[os.DirEntry[str]]:
    """Usable entries of a folder, sorted by name; hidden ones are skipped, others that cannot be used are recorded."""
    try:
        with os.scandir(folder) as listing:
            visible = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError:
        if left_out is not None:
            left_out.unreadable.append(left_out.name(folder))
        return []
    if left_out is not None:
        left_out.unusable += [left_out.name(entry.path) for entry in visible if not usable(entry.name)]
    return [entry for entry in visible if usable(entry.name)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a looping link is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; a dangling or looping link is not."""
    try:
        return entry.is_file()
    except OSError:
        return False


def other_directory(folder: Path) -> str:
    """The name of what a folder is that another command of this package wrote; else ""."""
    if (folder / "manifest.json").is_file() and (folder / "streams").is_dir():
        return "a cache"
    if (folder / "config.toml").is_file() and (folder / "clips.json").is_file():
        return "a run directory"
    return "a page of `vaflow view`" if (folder / "clips/0001.js").is_file() and (folder / "media").is_dir() else ""


def walk(root: Path, left_out: LeftOut | None = None) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """(folder, its files sorted by name), nearest folders first. Links are followed, each folder is visited once."""
    queue = deque([(root, 0)])
    visited = set()
    while queue:
        folder, level = queue.popleft()
        try:
            status = folder.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        inside = entries(folder, left_out)
        folders = [Path(entry.path) for entry in inside if is_folder(entry)]
        outputs = [path for path in folders if other_directory(path)]
        if left_out is not None:
            left_out.outputs += [left_out.name(path) for path in outputs]
        if level < DEPTH:
            queue.extend((path, level + 1) for path in folders if path not in outputs)
        yield folder, [entry for entry in inside if not is_folder(entry)]


def is_video(name: str) -> bool:
    """Whether a file name has a video's extension, in any case."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def is_audio(name: str) -> bool:
    """Whether a file name has an audio file's extension, in any case."""
    return name.lower().endswith(AUDIO_SUFFIXES)


def printable(name: str) -> bool:
    """Whether a name is UTF-8 text, which an item id must be; file names may be any bytes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def usable(name: str) -> bool:
    """Whether a file name can be an item id: UTF-8 without a backslash, which divides paths on other systems."""
    return printable(name) and "\\" not in name


def below(folder: Path, name: str) -> Path:
    """Path of a name from a data set or a cache, inside a folder. Checks the text only, not the disk.

    Raises:
        DataError: the name leads out of the folder, or no file can have it.
    """
    parts = name.split("/")
    odd = not name or {"", ".", ".."} & set(parts) or "\0" in name or not usable(name)
    if odd or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        problem = "A name cannot be that of a file in a folder"
        expected = "names separated by '/', none of them '..', empty, with a backslash, or longer than 255 bytes"
        raise DataError(explain(problem, expected=expected, got=ascii(name[:_SHOWN_NAME])))
    return folder / name


def size_problem(path: Path, most: int = LARGEST_TEXT) -> str | None:
    """Return why a text file must not be read (too large, a pipe, a device); None if it may, or does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_size > most:
        return f"{status.st_size} bytes, more than the {most} that such a file can have"
    return None if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else "no regular file"


def head(path: Path) -> str:
    """The first 4,096 bytes of a text file as text; empty if it cannot be read, or is a pipe."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            start = file.read(_HEAD)
            return start.decode(text_encoding(start), "replace")
    except OSError:
        return ""


def text_encoding(start: bytes) -> str:
    """The encoding of a text file, from its first bytes: UTF-16 with a byte-order mark (Excel), or else UTF-8."""
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def open_text(path: Path) -> TextIO:
    """Open a text file in the encoding that its byte-order mark states; line ends are kept.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        encoding = text_encoding(file.read(2))
    return path.open(encoding=encoding, newline="")


def listing(root: Path) -> str:
    """The first few names directly below `root`, for messages."""
    return examples([entry.name + ("/" if is_folder(entry) else "") for entry in entries(root)], 6) or "nothing"


def read_table(path: Path, kind: str, failure: type[VaflowError]) -> tuple[str, list[tuple[int, list[str]]]]:
    """The separator of a table, and (number, cells) of every row that is not empty; `kind`: what it is, for messages.

    Raises:
        failure: the file cannot be read, or is not a table in text.
    """
    if (problem := size_problem(path)) is not None:
        raise failure(explain(f"Cannot read {path}", expected=kind, got=problem))
    try:
        with open_text(path) as file:
            separator = separator_of(file.readline())
            file.seek(0)  # csv reads the file itself, because a quoted cell may hold a line break
            rows = enumerate(csv.reader(file, delimiter=separator), 1)
            return separator, [(number, [cell.strip() for cell in row]) for number, row in rows if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise failure(explain(f"Cannot read {path}", expected=f"{kind} in UTF-8 text", got=error)) from error


def separator_of(header: str) -> str:
    """Return the separator of a table, from its first line: a semicolon, a tab, or else a comma."""
    return next((mark for mark in (";", "\t") if mark in header and "," not in header), ",")


@dataclass(frozen=True)
class Assignment:
    """Splits and groups by item id; items without one are left out. `columns`: further columns, by item id."""

    splits: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()


def read_splits(path: Path) -> dict[str, dict[str, str]]:
    """The columns of a `splits.csv`, in lower case, each as name -> cell; empty cells are left out.

    It has the column `name`, and `split` or `group` or both.

    Raises:
        UsageError: the file is not such a table, names an unknown split, or gives one name two splits or groups;
            every problem is listed with its line.
    """
    _, rows = read_table(path, "a list of splits", UsageError)
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    if "name" not in header or not {"split", "group"} & set(header) or len(set(header)) != len(header):
        got = f"{','.join(header)!r}" if rows else "an empty file"
        raise UsageError(explain(f"{path} is not a list of splits", expected="the header 'name,split'", got=got))
    columns: dict[str, dict[str, str]] = {column: {} for column in header}
    problems = []
    for number, row in rows[1:]:
        if len(row) != len(header):
            problems.append(f"line {number} has {len(row)} columns")
            continue
        cells = dict(zip(header, row, strict=True))
        if "split" in cells:
            cells["split"] = cells["split"].lower()
            if cells["split"] not in SPLITS:
                problems.append(f"line {number} has the split {row[header.index('split')]!r}")
                continue
        for column, cell in cells.items():
            if cell and columns[column].setdefault(cells["name"], cell) != cell and column in _COLUMNS:
                before = columns[column][cells["name"]]
                problems.append(f"line {number} puts {cells['name']!r} into {cell}, an earlier line into {before}")
    if problems:
        got = examples(problems, shown=10)
        expected = f"{len(header)} columns a line"
        raise UsageError(explain(f"{path} has mistakes", expected=expected, got=got, choices=SPLITS))
    return columns


def assign(
    root: Path,
    names: Collection[tuple[str, str]],
    defaults: Mapping[str, str] | None = None,
    *,
    used: Collection[str] = (),
) -> Assignment:
    """Splits and groups of items from `root/splits.csv`, whose names are item ids or paths with their extension.

    Args:
        root: folder of the list; without a list, `defaults` alone count.
        names: (item id, path below the root with extension) of every item.
        defaults: item id -> split, for items that the list omits.
        used: further columns that the caller uses; other ones are warned about.

    Returns:
        The assignment, with notes on names that fit no item, items without a split, and unknown columns.

    Raises:
        UsageError: the list has mistakes, or gives an item one split by its id and another by its path.
    """
    splits = dict(defaults or {})
    if not (root / SPLITS_FILE).is_file():
        return Assignment(splits)
    listed = read_splits(root / SPLITS_FILE)
    columns: dict[str, dict[str, str]] = {column: {} for column in listed}
    for item, path in names:
        for column, cells in listed.items():
            values = {name: cells[name] for name in dict.fromkeys((item, path)) if name in cells}
            if column in ("split", "group") and len(set(values.values())) > 1:
                got = ", ".join(f"{name!r} in {value}" for name, value in values.items())
                raise UsageError(explain(f"{SPLITS_FILE} gives one item two {column}s", expected="one", got=got))
            if values:
                columns[column][item] = next(iter(values.values()))
    splits |= columns.get("split", {})
    notes = []
    known = {name for pair in names for name in pair}
    if unknown := sorted(listed["name"].keys() - known):
        message = f"{SPLITS_FILE} names unknown items: {examples(unknown)}"
        notes.append(Note("warning", "split-unknown-name", "", message, "Correct the names, or add the files"))
    if "split" in listed and (missing := sorted(item for item, _ in names if item not in splits)):
        message = f"{SPLITS_FILE} gives no split to: {examples(missing)}"
        notes.append(Note("warning", "split-missing", "", message, f"Add them to {SPLITS_FILE}"))
    if strange := [column for column in listed if column not in (*_COLUMNS, *used)]:
        message = f"Columns of {SPLITS_FILE} that are not used: {examples(strange)}"
        remedy = "Name the column 'group' if its clips must stay in one fold"
        notes.append(Note("warning", "split-unknown-column", "", message, remedy))
    return Assignment(splits, columns.get("group", {}), columns, tuple(notes))
