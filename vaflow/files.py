"""Write files whole and durably; read small files without following links; tensors in files; lists of failed items.

A file is written under a short temporary name in its own folder, flushed to the disk, and renamed. After a kill or a
power cut the old content is there or the new, never half of it. A link at the target is replaced, not followed.
Tensors are in safetensors files, never in pickles.

`failures.jsonl` lists failed items: one JSON object per line, with `item, stage, error, message` and details. Every run
writes its list anew; a run without failures leaves no list.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from vaflow.errors import CorruptError, UsageError, VaflowError, explain, visible

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp-"  # prefix of files that are being written; readers skip them
LARGEST_DOCUMENT = 64 * 2**20  # bytes
LOCK = ".lock"  # file in the folder; the system releases the lock when its process ends, however that happens

# What file systems without hard links (some network file systems, FAT) answer to `link`.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

FAILURES = "failures.jsonl"
LISTS = "failures*.jsonl"  # a run on one shard, and a copy of other caches' lists, have names of their own

log = logging.getLogger(__name__)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a user's file and its parent folders, replacing an existing file.

    Args:
        path: where to. Names of up to 255 bytes work: the temporary name does not derive from it.
        data: text is encoded as UTF-8; lone surrogates (of file names that are not UTF-8) become `\\udcNN`.

    Raises:
        VaflowError: the disk is full or read-only, or the folder cannot be written.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        make_folder(path.parent)
        replace_file(path, content)
    except OSError as error:
        remedy = "Free disk space or grant write access, then run the same command again: it resumes"
        raise VaflowError(explain(f"Cannot write {path}", got=error.strerror or error, remedy=remedy)) from error


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file in an existing folder, replacing an existing one. Raises OSError.

    Not `durable`: whole for other readers, but not flushed, for files that can be downloaded again.
    """
    temporary = _write_temporary(path.parent, data, durable=durable)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def create_file(path: Path, data: bytes) -> bool:
    """Create a file whole, unless one exists; returns False if another writer was first. Raises OSError."""
    temporary = _write_temporary(path.parent, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Exclusive as well, but a kill here leaves half a file: records carry a checksum that reveals it.
        try:
            _write_new(path, data)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def _write_temporary(folder: Path, data: bytes, *, durable: bool = True) -> Path:
    temporary = folder / f"{TEMPORARY}{token_hex(8)}"
    try:
        _write_new(temporary, data, durable=durable)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_new(path: Path, data: bytes, *, durable: bool = True) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append a line to a log and flush it to the disk; makes the file. Refuses a link. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
        file.write(f"{line}\n".encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents; every new name is flushed. Raises OSError."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        if path == path.parent:
            break
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; a missing one is ignored. Raises OSError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # what unlink reports for a folder depends on the system
        if not path.is_dir():
            raise
        shutil.rmtree(path)


def sync(path: Path | str) -> None:
    """Flush one file or folder to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(top: Path, names: Iterable[str]) -> None:
    """Flush the files `names` below `top`, then every folder between them and `top`. Raises OSError.

    Several at once: a journaling file system flushes them together, which is three to four times faster for zarr.
    """
    root = os.fspath(top)  # text: paths would take most of the time
    paths, folders = [], {root}
    for name in names:
        paths.append(f"{root}/{name}")
        folder = name.rpartition("/")[0]
        while folder:
            folders.add(f"{root}/{folder}")
            folder = folder.rpartition("/")[0]
    for group in (paths, folders):
        if len(group) < 2:
            for path in group:
                sync(path)
        else:
            for _ in _flushers().map(sync, group):  # raises what a thread raised
                pass


@cache
def _flushers() -> ThreadPoolExecutor:
    """Threads that wait for the disk; starting them for each item would take longer than to write it."""
    return ThreadPoolExecutor(max_workers=8, thread_name_prefix="flush")


os.register_at_fork(after_in_child=_flushers.cache_clear)  # a forked process has no threads


def refuse_links(root: Path, *paths: Path) -> None:
    """Check that no path below `root`, and no folder between the two, is a link. Links above `root` are allowed.

    Raises:
        OSError: there is a link, or a path does not lie below `root`.
    """
    here = str(root) == os.curdir  # `Path` leaves it out of the paths below
    top = "" if here else str(root).rstrip(os.sep) + os.sep
    checked = set()  # strings and one `lstat` per folder: this runs for every item that is read
    for path in map(os.fspath, paths):
        if path == str(root):
            continue
        below = path[len(top) :].split(os.sep)  # noqa: PTH206
        if not path.startswith(top) or os.pardir in below or (here and os.path.isabs(path)):  # noqa: PTH117
            raise OSError(errno.ELOOP, "a path outside the folder", path)
        current = str(root)
        for part in below:
            current = f"{current}{os.sep}{part}"
            if current not in checked and os.path.islink(current):  # noqa: PTH114
                raise OSError(errno.ELOOP, "a link, which is not followed", current)
            checked.add(current)


def is_behind_link(root: Path, path: Path) -> bool:
    """Whether a folder between `root` and `path` is a link, so that removing `path` would change another folder."""
    try:
        refuse_links(root, path.parent)
    except OSError:
        return True
    return False


def read_document(root: Path, path: Path) -> bytes:
    """All bytes of a small file below `root`.

    Raises:
        ValueError: it is a link or behind one, not a regular file, or larger than `LARGEST_DOCUMENT`.
        OSError: it does not exist or cannot be read.
    """
    try:
        refuse_links(root, path)
    except OSError as error:
        raise ValueError(f"it is not in the folder: {error.filename} is {error.strerror}") from error
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST_DOCUMENT:
        raise ValueError(f"it has {status.st_size} bytes; such a file has at most {LARGEST_DOCUMENT}")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of a link's target.

    Raises:
        ValueError: it is not UTF-8, or not a regular file: a named pipe or a device could be read forever.
        OSError: it does not exist or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return path.read_text("utf-8")


@contextmanager
def lock_folder(folder: Path, command: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if it does not exist; `command` names the work in errors.

    Raises:
        UsageError: another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UsageError(explain(f"Cannot write to {folder}", expected="a folder", got=error.strerror)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"Another `{command}` is writing to {folder}"
            raise UsageError(explain(problem, remedy="Wait until it ends, or choose another --out")) from error
        except OSError:  # a file system without locks
            pass
        yield


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], note: Mapping[str, str] | None = None) -> None:
    """Write tensors and `note`, text in the header, to a safetensors file.

    Raises:
        VaflowError: the file cannot be written.
    """
    from safetensors.torch import save  # imports torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(plain, dict(note or {})))


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read the tensors, on the CPU, and the note of a safetensors file.

    Raises:
        CorruptError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # By its number: safetensors refuses paths that are not UTF-8.
        with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptError(explain(f"{path} is damaged", got=error)) from error


@dataclass(frozen=True)
class Failure:
    """One failed item.

    Attributes:
        item: the item's id, or another name for what failed.
        stage: where it failed: "open", "labels", "audio", "faces", "encode", "commit", "convert", "train" ...
        error: name of the exception's class; message: as printed, in one line or more.
        details: further members of the line: "split" and "stream" of a clip; "table", "row" and "run" of a study.
            A line without "split" is of every split.
        listed: when the list that it was read from was last written, in seconds since 1970.
    """

    item: str
    stage: str
    error: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)
    listed: float = field(default=0.0, compare=False)

    def line(self) -> dict[str, Any]:
        """The object on this failure's line."""
        members = {"item": self.item, "stage": self.stage, "error": self.error, "message": self.message}
        return members | dict(self.details)


def read_failures(folder: Path) -> list[Failure]:
    """Failures of all lists in a folder. Lines that are not failures, as a killed run leaves them, are skipped."""
    failures: list[Failure] = []
    for path in sorted(folder.glob(LISTS)):
        try:
            listed = path.stat().st_mtime
            # Split as bytes: text would also be split at characters of names, such as U+2028.
            lines = [line.decode("utf-8", "replace") for line in read_document(folder, path).splitlines()]
        except (OSError, ValueError) as error:
            log.warning("%s is skipped: %s", visible(str(path)), error)
            continue
        for line in lines:
            failure = _parse(line)
            if failure is None:
                log.warning("%s has a line that is not a failure; the line is skipped", visible(str(path)))
            else:
                failures.append(replace(failure, listed=listed))
    return failures


def _parse(line: str) -> Failure | None:
    try:
        members = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(members, dict) and isinstance(members.get("item"), str)):
        return None
    item, stage, error, message = (str(members.pop(name, "")) for name in ("item", "stage", "error", "message"))
    return Failure(item, stage, error, message, members)


def write_failures(path: Path, failures: Iterable[Failure]) -> None:
    """Write a list whole; without failures, remove the list of an earlier run.

    Raises:
        VaflowError: the disk refuses.
    """
    lines = [_format(failure) for failure in failures]
    if lines:
        write_file(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


def _format(failure: Failure) -> str:
    return json.dumps(failure.line(), ensure_ascii=False)


class FailureLog:
    """A list that is written during a run: each line is on the disk when `add` returns.

    Attributes:
        path: of the list; the list of an earlier run is removed at once.
        failures: all that were added, in that order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures: list[Failure] = []
        self._lock = threading.Lock()
        write_failures(path, ())

    def add(self, failure: Failure, *, quiet: bool = False) -> None:
        """List one failure, and log it unless `quiet`. Any thread may call."""
        with self._lock:
            self.failures.append(failure)
            append_line(self.path, _format(failure))
        if not quiet:
            log.warning("%s failed (%s): %s", visible(failure.item), failure.stage, visible(failure.message))
