"""What a run did, and the books that are kept while it goes on: the same for every engine."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from vaflow.failures import Failure, FailureLog


@dataclass
class Summary:
    """What a run did.

    Attributes:
        extracted: items committed; done: items that had nothing to do; changed: items redone for a changed source.
        failures: items that failed, with their reasons; `failures_file` lists them.
        encoded: encoder name -> rows encoded.
        media_seconds: video time of the extracted items; wall_seconds: of the run.
        stages: where the time of the main process went, in seconds; with several processes the sum over them.
    """

    extracted: int = 0
    done: int = 0
    changed: int = 0
    failures: list[Failure] = field(default_factory=list)
    failures_file: Path | str = Path()
    encoded: dict[str, int] = field(default_factory=dict)
    media_seconds: float = 0.0
    wall_seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Extracted:
    """One item that is committed now, and the seconds of its video."""

    item: str
    seconds: float


Outcome = Extracted | Failure


class Books:
    """Takes the outcome of every item into the summary, the list of failures and the bar. Any thread may call.

    Use as a context manager: leaving it closes the bar.
    """

    def __init__(self, summary: Summary, log: FailureLog, items: int, *, show_progress: bool) -> None:
        self.summary = summary
        self._log = log
        self._lock = threading.Lock()
        self._bar = tqdm(total=items, unit="clip", desc="extract", disable=not show_progress, smoothing=0.1)

    def __enter__(self) -> "Books":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def take(self, outcome: Outcome) -> None:
        """An item has come to its end, whichever."""
        with self._lock:
            if isinstance(outcome, Failure):
                self._log.add(outcome)
            else:
                self.summary.extracted += 1
                self.summary.media_seconds += outcome.seconds
            self._bar.update()

    def count(self, rows: Mapping[str, int], stages: Mapping[str, float], note: str = "") -> None:
        """What has been encoded so far, by encoder, and where the time went; shown as rates."""
        with self._lock:
            self.summary.encoded, self.summary.stages = dict(rows), dict(stages)
            seconds = max(self._bar.format_dict["elapsed"], 1e-3)
            rates = [f"{name} {count / seconds:.0f}/s" for name, count in rows.items()]
            self._bar.set_postfix_str(", ".join([*rates, note] if note else rates), refresh=False)
