"""Walk the folders of a data set: file kinds by extension, safe names, and a list of everything unused.

A name that cannot be used does not end a scan: it is recorded in `LeftOut`, which becomes notes.
"""

import codecs
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vaflow.datasets.clip import Note
from vaflow.errors import DataError, explain

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

_LONGEST_NAME = 255  # bytes
_SHOWN_NAME = 100
_HEAD = 4096  # bytes


@dataclass
class LeftOut:
    """Unused names below a root, by reason; paths as text with forward slashes.

    Attributes:
        linked: folders that are links, where a layout does not enter them.
        unreadable: folders that cannot be listed.
        unusable: dangling or looping links, pipes and devices, names that are not UTF-8.
        ignored: files of a kind that the layout does not use.
    """

    root: Path
    linked: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

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
            message = f"Broken links, special files and names that are not UTF-8: {examples(self.unusable)}"
            notes.append(Note("warning", "unusable-name", "", message, "Rename the files, or correct the links"))
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
        left_out.unusable += [left_out.name(entry.path) for entry in visible if not printable(entry.name)]
    return [entry for entry in visible if printable(entry.name)]


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
        if level < DEPTH:
            queue.extend((Path(entry.path), level + 1) for entry in inside if is_folder(entry))
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


def below(folder: Path, name: str) -> Path:
    """Path of a name from a data set or a cache, inside a folder. Checks the text only, not the disk.

    Raises:
        DataError: the name leads out of the folder, or no file can have it.
    """
    parts = name.split("/")
    odd = not name or {"", ".", ".."} & set(parts) or "\0" in name or "\\" in name or not printable(name)
    if odd or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        problem = "A name cannot be that of a file in a folder"
        expected = "names separated by '/', none of them '..', empty, or longer than 255 bytes"
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


def examples(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
