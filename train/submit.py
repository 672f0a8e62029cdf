"""Submission to the ABAW challenge: a prediction for every row of its sample, in the order of the sample.

A row is `TRIAL/00001.jpg,valence,arousal`; frames are counted from 1. Rows shortly after a clip's last frame repeat its
last prediction. If any other row has no prediction, the rows are counted and no file is written.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import DataError, UsageError, count, examples, explain
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.data import load_windows
from vaflow.train.ensemble import combine, maker_of, members_of, warn_of_changed_members
from vaflow.train.evaluate import read_for
from vaflow.train.prediction_files import write_sources_of_file
from vaflow.train.run_folder import load_run
from vaflow.train.scores import featureless

HEADER = "image_location,valence,arousal"
_LONGEST_ROW = 4096  # characters
_WRITTEN = re.compile(r"[^,]+,-?[01]\.[0-9]{6},-?[01]\.[0-9]{6}")  # a row of `submission_text`
_LOCATION = re.compile(r"(?P<trial>.+)/(?P<number>[0-9]{1,9})\.(?:jpg|jpeg|png)", re.IGNORECASE)


@dataclass(frozen=True)
class SampleRow:
    """One row of the sample: its text, the trial, and the frame's number, counted from 1."""

    location: str
    trial: str
    number: int


@dataclass(frozen=True)
class Submitted:
    """Numbers of rows and trials written; held_in: trial -> rows that repeat its last prediction."""

    rows: int
    trials: int
    held_in: Mapping[str, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Rows after a clip's last frame."""
        return sum(self.held_in.values())


def read_sample(path: Path) -> list[SampleRow]:
    """Rows of a sample submission, in order; its valence and arousal are ignored.

    Raises:
        UsageError: it cannot be read, has another header or no rows, or has malformed or repeated rows.
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
        parts = line.split(",")
        location = _LOCATION.fullmatch(parts[0].strip())
        if len(parts) != 3 or location is None or int(location["number"]) < 1:
            bad.append(f"line {number}: {line[:60]!r}")
        else:
            rows.append(SampleRow(parts[0].strip(), location["trial"], int(location["number"])))
    if bad:
        expected = "TRIAL/00001.jpg,valence,arousal, frames counted from 1"
        raise UsageError(
            explain(f"{path} has {count(len(bad), 'malformed line')}", expected=expected, got=examples(bad))
        )
    twice = [location for location, number in Counter(row.location for row in rows).items() if number > 1]
    if twice:
        raise UsageError(explain(f"{path} has {count(len(twice), 'row')} more than once", got=examples(twice)))
    if not rows:
        raise UsageError(explain(f"{path} has no rows", expected="a row for every frame that is to be predicted"))
    return rows


def submit_run(
    run: Path, cache: Cache, sample: Path, out: Path, *, hold: int = 1, device: str = "auto", show: bool = False
) -> Submitted:
    """Predict the sample's trials from the cache and write the submission; labels are not needed.

    Args:
        run: a finished run, or an ensemble.
        cache: the trials' features, extracted with the run's settings.
        sample: the challenge's sample submission.
        hold: most rows after a clip's last frame that repeat its last prediction; ABAW annotation often has one row
            more than the video has frames.

    Raises:
        UsageError: the run or the sample is unusable, or `out` exists and is not a submission.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: rows of the sample have no prediction; every reason is given with its count.
    """
    rows = read_sample(sample)
    if out.exists() and out.samefile(sample):
        raise UsageError(explain(f"--out {out} is the sample", expected="another file"))
    refuse_other_files(out)
    target = choose_device(device)
    counts = Counter(row.trial for row in rows)
    known = set(cache.items())
    items = [trial for trial in counts if trial in known]
    unknown = {trial: number for trial, number in counts.items() if trial not in known}
    traces: dict[str, Floats] = {}
    empty: dict[str, int] = {}
    if items:
        members, weights = members_of(run)
        warn_of_changed_members(run)
        predicted = []
        for member in members:
            trained = load_run(member, target)
            read = partial(load_windows, cache, items, device=target, show=show)
            windows = read_for(member, trained.record, cache, read)
            empty |= {clip.item: counts[clip.item] for clip in featureless(windows)}
            predicted.append(list(trained.traces(windows)))
        traces = {t.clip.item: t.va for t in combine(predicted, weights) if t.clip.item not in empty}
    beyond = [row for row in rows if row.trial in traces and row.number > len(traces[row.trial]) + hold]
    check_predicted(rows, traces, unknown, empty, beyond)
    write_file(out, submission_text(rows, traces))
    write_sources_of_file(out, maker_of(run), cache, items)
    held = Counter(row.trial for row in rows if row.number > len(traces[row.trial]))
    return Submitted(len(rows), len(counts), dict(held))


def refuse_other_files(out: Path) -> None:
    """Check that a submission replaces a submission only: the header, then a row with six decimals; or an empty file.

    Raises:
        UsageError: `out` is another file, such as the run's settings or a sample.
    """
    if not out.is_file() or not out.stat().st_size:
        return
    with out.open(encoding="utf-8", errors="replace") as file:
        header, row = (file.readline(_LONGEST_ROW).rstrip("\n") for _ in range(2))
    if header != HEADER or _WRITTEN.fullmatch(row) is None:
        expected = "a new file, or one that `vaflow submit` wrote"
        raise UsageError(explain(f"--out {out} is not a submission", expected=expected, remedy="Choose another --out"))


def submission_text(rows: Iterable[SampleRow], traces: Mapping[str, Floats]) -> str:
    """Text of the file: a line per row, in their order; a frame after a trace [R, 2] repeats its last value."""
    lines = [HEADER]
    for row in rows:
        trace = traces[row.trial]
        valence, arousal = np.clip(trace[min(row.number, len(trace)) - 1], -1, 1)
        lines.append(f"{row.location},{valence:.6f},{arousal:.6f}")
    return "\n".join(lines) + "\n"


def check_predicted(
    rows: Sequence[SampleRow],
    traces: Mapping[str, Floats],
    unknown: Mapping[str, int],
    empty: Mapping[str, int],
    beyond: Sequence[SampleRow],
) -> None:
    """Check that every row has a prediction.

    Args:
        rows: of the sample; traces: trial -> [R, 2].
        unknown: trial -> rows of trials that the cache lacks; empty: of trials without features.
        beyond: rows too far after the last frame.

    Raises:
        DataError: a row has none; every reason is given with its count.
    """
    problems = []
    for trials, reason in ((unknown, "not in the cache"), (empty, "without any features")):
        if trials:
            problems.append(f"{count(sum(trials.values()), 'row')} of {count(len(trials), 'trial')} {reason}: ")
            problems[-1] += examples(list(trials))
    remedy = "Extract these trials into the cache"
    if beyond:
        shown = [f"{row.location} ({len(traces[row.trial])} frames)" for row in beyond]
        problems.append(f"{count(len(beyond), 'row')} after the end of their clips: {examples(shown)}")
        if not (unknown or empty):
            most = max(row.number - len(traces[row.trial]) for row in beyond)
            remedy = f"--hold {most} repeats each clip's last prediction after its end"
    if problems:
        missing = sum(unknown.values()) + sum(empty.values()) + len(beyond)
        problem = f"{missing} of {len(rows)} rows of the sample have no prediction, so nothing is written"
        raise DataError(explain(problem, got="; ".join(problems), remedy=remedy))
