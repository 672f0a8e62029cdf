"""Items that failed, in a file that is true at every moment of the run."""

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vaflow.cache import is_cache, open_cache
from vaflow.datasets import Dataset
from vaflow.errors import UsageError, explain, visible

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """One item that failed: where, the error's class, what to tell a person, and the item's split."""

    item: str
    stage: str
    error: str
    message: str
    split: str | None = None


class FailureLog:
    """`failures.jsonl`: written anew by each run, one object per failed item, each line on disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures: list[Failure] = []
        self._lock = threading.Lock()
        path.write_text("")

    def add(self, failure: Failure, *, quiet: bool = False) -> None:
        """List one failure, and say so unless someone already has. Any thread may call."""
        with self._lock:
            self.failures.append(failure)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(failure), ensure_ascii=False) + "\n")
        if not quiet:
            logger.warning("%s failed (%s): %s", visible(failure.item), failure.stage, visible(failure.message))


def _items(path: Path) -> Iterator[str]:
    """Items that a list names; lines that are none (of a run that was killed) are passed over."""
    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("item"), str):
            yield line["item"]


def only_failed(dataset: Dataset, cache: Path) -> Dataset:
    """The part of a data set that the last runs into `cache` listed as failed.

    Raises:
        UsageError: no run has listed anything.
    """
    folder = open_cache(cache).path if is_cache(cache) else cache
    lists = sorted(folder.glob("failures*.jsonl"))
    failed = {item for path in lists for item in _items(path)}
    clips = tuple(clip for clip in dataset.clips if clip.id in failed)
    if not clips:
        raise UsageError(
            explain(
                f"Nothing of {dataset.root} is listed as failed in {cache}",
                expected="failures*.jsonl that names items of this data set",
                got=f"{len(failed)} failed items of other data" if failed else "no failed items",
            )
        )
    return replace(dataset, clips=clips)
