"""Items from cache to cache, whichever their stores: bit for bit, checked on the way, going on where a kill stopped it.

An item keeps its source, facts and time of making; only its attempt is new. What cannot be read is listed, and does
not stop the rest.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaflow.cache.cache import Cache
from vaflow.cache.failures import ItemFailure, carry, listed_failures, write_failures
from vaflow.cache.messages import cannot_write
from vaflow.cache.schema import LABELS, Record
from vaflow.cache.survey import Key
from vaflow.errors import CorruptError, DataError, MissingError

THREADS = 4  # commits wait for the disk to flush
COPY_OF = ("source", "meta", "created", "arrays", "fingerprint")  # members in which an item and its copy agree

Outcome = Literal["there", "new", "replaced"]


@dataclass(frozen=True)
class Job:
    """One item to copy, from the first of these caches that holds it whole."""

    key: Key
    origins: tuple[Cache, ...]


@dataclass(frozen=True)
class TransferSummary:
    """What a run did.

    Attributes:
        out: the cache that items were copied into.
        copied: items written; replaced: of those, how many took the place of another version.
        there: items that were there already.
        failures: items that could not be read; `failures_file` lists them.
    """

    out: str
    copied: int
    replaced: int
    there: int
    failures: tuple[ItemFailure, ...]
    failures_file: Path | str

    @property
    def nothing_done(self) -> bool:
        """Whether every item failed."""
        return bool(self.failures) and not self.copied and not self.there


def transfer(
    target: Cache,
    sources: Sequence[Cache],
    jobs: Iterable[Job],
    damaged: Iterable[ItemFailure],
    splits: Mapping[str, str | None],
    stage: str,
    *,
    show_progress: bool = False,
) -> TransferSummary:
    """Do all jobs, labels last: a clip exists once its clock and annotation do. The target lists what failed.

    Args:
        target: where to; it has every stream that the jobs name.
        sources: the caches that are read; what their runs listed as failed is carried over.
        jobs: what to copy.
        damaged: what is known not to be readable.
        splits: of the clips, for the list.
        stage: what is being done, for the list and the bar.
        show_progress: a bar.

    Raises:
        CacheError: the disk refuses; the same call goes on later.
    """
    from tqdm import tqdm

    ordered = sorted(jobs, key=lambda job: (job.key[0] == LABELS, job.key))
    features = sum(job.key[0] != LABELS for job in ordered)
    failures, done = list(damaged), Counter[Outcome]()
    carried = listed_failures(target, sources)
    try:
        with tqdm(total=len(ordered), desc=stage, unit="item", disable=not show_progress, smoothing=0.1) as bar:
            for part in (ordered[:features], ordered[features:]):
                for result in _copies(target, part, stage):
                    if isinstance(result, ItemFailure):
                        failures.append(result)
                    else:
                        done[result] += 1
                    bar.update()
    finally:
        try:
            path = write_failures(target, failures, splits)
            carry(target, carried)
            target.refresh_index()
        except OSError as error:
            raise cannot_write(target.layout, error) from error
    written = done["new"] + done["replaced"]
    return TransferSummary(
        target.place, written, done["replaced"], done["there"], tuple(failures), target.layout.named(path)
    )


def _copies(target: Cache, jobs: Sequence[Job], stage: str) -> Iterable[Outcome | ItemFailure]:
    """Several at a time; what one of them raises cancels those that have not begun."""
    with (
        ThreadPoolExecutor(THREADS, "vaflow-copy") as pool,
        closing(pool.map(lambda job: _copy(target, job, stage), jobs)) as results,  # type: ignore[type-var]
    ):
        yield from results


def _copy(target: Cache, job: Job, stage: str) -> Outcome | ItemFailure:
    """Copy one item unless its copy is there; a failure says why none of the origins has it whole."""
    stream, item = job.key
    known = _known(target, stream, item)
    reasons: list[Exception] = []
    for origin in job.origins:
        try:
            if known is not None and _is_copy(known, origin.record(stream, item)):
                return "there"
            record, arrays = origin.committed(stream, item)
            # What the target's disk refuses is no fault of the item, and is raised.
            target.adopt(record, arrays)
        except (CorruptError, MissingError, DataError, OSError) as error:
            reasons.append(error)
        else:
            return "new" if known is None else "replaced"
    message = " ".join(dict.fromkeys(map(str, reasons)))
    return ItemFailure(item, stream, stage, type(reasons[0]).__name__, message)


def _known(target: Cache, stream: str, item: str) -> Record | None:
    """What the target has; None where there is nothing that can be used."""
    if not target.has(stream, item):
        return None
    try:
        return target.record(stream, item)
    except (CorruptError, MissingError):
        return None


def _is_copy(first: Record, second: Record) -> bool:
    return all(getattr(first, name) == getattr(second, name) for name in COPY_OF)
