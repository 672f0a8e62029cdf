"""What a layout finds below a root: clips, and notes about what it had to decide."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaflow.datasets.clip import Clip

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Note:
    """One thing worth knowing about a data set.

    Attributes:
        severity: "error": an item cannot be used, or results would be wrong; "warning": look at it; "note": normal.
        code: what kind of thing, e.g. "two-videos"; equal codes are shown together.
        item: the clip's id, or "" for the data set as a whole.
        message: what was found.
        remedy: what can be done, or "".
    """

    severity: Severity
    code: str
    item: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Dataset:
    """The clips below `root`, sorted by id, and what the scan had to decide or leave out."""

    root: Path
    layout: str
    clips: tuple[Clip, ...]
    notes: tuple[Note, ...] = ()
