"""The file that the ABAW challenge takes: a prediction for every row of its sample, in the order of the sample.

A row is `TRIAL/00001.jpg,valence,arousal`; the number counts the video's frames from 1, so it is row number - 1 of the
trial's prediction. Nothing is guessed: whatever has no prediction is counted, and no file is written.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import DataError, UsageError, explain
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.data import load_windows
from vaflow.train.ensemble import combine, maker_of, members_of
from vaflow.train.evaluate import featureless
from vaflow.train.provenance import write_sources_of_file
from vaflow.train.runs import load_run
from vaflow.train.training import read_for

HEADER = "image_location,valence,arousal"
SHOWN = 5  # of what is wrong
_LOCATION = re.compile(r"(?P<trial>.+)/(?P<number>[0-9]{1,9})\.(?:jpg|jpeg|png)", re.IGNORECASE)


@dataclass(frozen=True)
class SampleRow:
    """One row of the sample: its text, the trial, and the frame's number, counted from 1."""

    location: str
    trial: str
    number: int


@dataclass(frozen=True)
class Submitted:
    """What was written: rows, of how many trials; held: rows beyond a clip's end that repeat its last prediction."""

    rows: int
    trials: int
    held: int = 0


def read_sample(path: Path) -> list[SampleRow]:
    """Rows of a sample submission, in order; what it says of valence and arousal is not looked at.

    Raises:
        UsageError: it cannot be read, has another header or no rows, or rows are malformed or there twice: counted.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(explain(f"Cannot read the sample {path}", expected="a text file", got=error)) from error
    while lines and not lines[-1].strip():
        lines.pop()
    header = ",".join(part.strip() for part in lines[0].split(",")) if lines else "an empty file"
    if header != HEADER:
        raise UsageError(explain(f"{path} is not a sample submission", expected=f"the header {HEADER}", got=header))
    rows, bad = [], []
    for number, line in enumerate(lines[1:], 2):
        row = _row(line)
        if row is None:
            bad.append(f"line {number}: {line[:60]!r}")
        else:
            rows.append(row)
    if bad:
        expected = "TRIAL/00001.jpg,valence,arousal, frames counted from 1"
        raise UsageError(explain(f"{path} has {_count(bad, 'malformed line')}", expected=expected, got=_some(bad)))
    twice = [location for location, count in Counter(row.location for row in rows).items() if count > 1]
    if twice:
        raise UsageError(explain(f"{path} has {_count(twice, 'row')} more than once", got=_some(twice)))
    if not rows:
        raise UsageError(explain(f"{path} has no rows", expected="a row for every frame that is to be predicted"))
    return rows


def _row(line: str) -> SampleRow | None:
    parts = line.split(",")
    found = _LOCATION.fullmatch(parts[0].strip())
    if len(parts) != 3 or found is None or int(found["number"]) < 1:
        return None
    return SampleRow(parts[0].strip(), found["trial"], int(found["number"]))


def submit_run(
    run: Path,
    cache: Cache,
    sample: Path,
    out: Path,
    *,
    hold: int = 0,
    device: str = "auto",
    show: bool = False,
) -> Submitted:
    """Predict the sample's trials from the cache and write the submission; labels are not needed.

    Args:
        run: a finished run, or an ensemble of some.
        cache: the trials' features, made as the run's were.
        sample: the challenge's sample submission.
        out: the file to write.
        hold: how many frames beyond a clip's last one are given its last prediction; annotation of ABAW often has a
            row more than the video has frames.
        device: "auto", "cpu" or "cuda[:N]".
        show: progress bar.

    Raises:
        UsageError: the run or the sample is unusable.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: rows of the sample have no prediction; every reason is given with its count.
    """
    rows = read_sample(sample)
    target = choose_device(device)
    counts = Counter(row.trial for row in rows)
    known = set(cache.items())
    items = [trial for trial in counts if trial in known]
    unknown = {trial: count for trial, count in counts.items() if trial not in known}
    traces: dict[str, Floats] = {}
    empty: dict[str, int] = {}
    if items:
        members, weights = members_of(run)
        said = []
        for member in members:
            trained = load_run(member, target)
            read = partial(load_windows, cache, items, device=target, show=show)
            windows = read_for(member, trained.record, cache, read)
            empty |= {clip.item: counts[clip.item] for clip in featureless(windows)}
            said.append(list(trained.traces(windows)))
        traces = {t.clip.item: t.va for t in combine(said, weights) if t.clip.item not in empty}
    beyond = [row for row in rows if row.trial in traces and row.number > len(traces[row.trial]) + hold]
    _complain(rows, traces, unknown, empty, beyond)
    write_file(out, submission_text(rows, traces))
    write_sources_of_file(out, maker_of(run), cache, items)
    held = sum(row.number > len(traces[row.trial]) for row in rows)
    return Submitted(len(rows), len(counts), held)


def submission_text(rows: Iterable[SampleRow], traces: Mapping[str, Floats]) -> str:
    """The file: a line per row, in their order; a frame beyond a trace [R, 2] is given its last value."""
    lines = [HEADER]
    for row in rows:
        trace = traces[row.trial]
        valence, arousal = np.clip(trace[min(row.number, len(trace)) - 1], -1, 1)
        lines.append(f"{row.location},{valence:.6f},{arousal:.6f}")
    return "\n".join(lines) + "\n"


def _complain(
    rows: Sequence[SampleRow],
    traces: Mapping[str, Floats],
    unknown: Mapping[str, int],
    empty: Mapping[str, int],
    beyond: Sequence[SampleRow],
) -> None:
    """Raise if any row has no prediction."""
    problems = []
    if unknown:
        trials = f"{_count(unknown, 'trial')} that the cache does not have: {_some(list(unknown))}"
        problems.append(f"{_rows(sum(unknown.values()))} of {trials}")
    if empty:
        trials = f"{_count(empty, 'trial')} without any features: {_some(list(empty))}"
        problems.append(f"{_rows(sum(empty.values()))} of {trials}")
    if beyond:
        shown = [f"{row.location} ({len(traces[row.trial])} frames)" for row in beyond]
        problems.append(f"{_rows(len(beyond))} beyond the end of their clips: {_some(shown)}")
    if not problems:
        return
    missing = sum(unknown.values()) + sum(empty.values()) + len(beyond)
    most = max((row.number - len(traces[row.trial]) for row in beyond), default=0)
    remedy = f"--hold {most} repeats each clip's last prediction beyond its end" if beyond else None
    if unknown or empty:
        remedy = "Extract these trials into the cache"
    raise DataError(
        explain(
            f"{missing} of {len(rows)} rows of the sample have no prediction, so nothing is written",
            expected="a prediction for every row",
            got="; ".join(problems),
            remedy=remedy,
        )
    )


def _count(things: Sequence[object] | Mapping[str, object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _rows(count: int) -> str:
    return f"{count} row is" if count == 1 else f"{count} rows are"


def _some(things: Sequence[str]) -> str:
    more = len(things) - SHOWN
    return ", ".join(things[:SHOWN]) + (f" and {more} more" if more > 0 else "")
