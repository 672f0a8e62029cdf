"""Lists of failed items: `failures.jsonl`, one JSON object per line, with `item, stage, error, message` and details.

Every run writes its list anew; a run without failures leaves no list.
"""

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vaflow.errors import visible
from vaflow.files import append_line, read_document, write_file

FAILURES = "failures.jsonl"
LISTS = "failures*.jsonl"  # a run on one shard, and a copy of other caches' lists, have names of their own

log = logging.getLogger(__name__)


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
            lines = read_document(folder, path).decode("utf-8", "replace").splitlines()
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
