"""Results of a study from its finished runs: means over seeds, intervals over videos, differences, best rows.

The bootstrap over videos draws the same resamples for all configurations. The table of a cache's encoders and their
comparison are here too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.costs import stream_costs
from vaflow.cache.schema import stored_layers
from vaflow.errors import UsageError, explain
from vaflow.timeline import Floats
from vaflow.train.ablate.pool import RUNS
from vaflow.train.ablate.tables import Entry, Schedule, Study, Table, parse_study
from vaflow.train.ablate.workers import Ended, read_moments
from vaflow.train.config import NONE
from vaflow.train.metrics import (
    SCORES,
    PairedDifference,
    paired_difference,
    percentile_interval,
    resampled_ccc,
    shared_draws,
)
from vaflow.train.run_folder import RunFolder

ENCODERS = "encoders"  # name of the table of a cache's encoders
COSTS = ("stream", "dimensions", "layers", "MB", "parameters (M)", "s per minute", "device", "precision")
COSTS_NOTE = "s per minute: seconds of encoding per minute of video, without decoding. -: not recorded."


@dataclass(frozen=True)
class RowResult:
    """Results of a row.

    Attributes:
        scores: [S, 3] CCC of every finished seed: valence, arousal, mean; NaN where nothing is labelled.
        within: [S] mean CCC within videos.
        interval: [3, 2] over videos, of the mean over seeds.
        versus: comparison with the full model; None for itself, or where one of them has no run.
        best: [3] significantly the highest of its table.
        problem: why runs are missing; empty: none is.
    """

    entry: Entry
    scores: Floats
    within: Floats
    interval: Floats
    versus: PairedDifference | None = None
    best: tuple[bool, ...] = (False,) * len(SCORES)
    problem: str = ""

    @property
    def seeds(self) -> int:
        """Number of finished runs."""
        return len(self.scores)

    @property
    def mean(self) -> Floats:
        """[3] over seeds; NaN without any."""
        return self.scores.mean(axis=0) if self.seeds else np.full(len(SCORES), np.nan)

    @property
    def within_mean(self) -> float:
        """Mean over seeds of the CCC within videos; NaN without any."""
        return float(self.within.mean()) if self.seeds else float("nan")

    @property
    def std(self) -> Floats:
        """[3] over seeds, of a sample (n - 1); NaN for fewer than two."""
        return self.scores.std(axis=0, ddof=1) if self.seeds > 1 else np.full(len(SCORES), np.nan)


@dataclass(frozen=True)
class TableResult:
    """A table with its rows."""

    table: Table
    rows: tuple[RowResult, ...]


@dataclass(frozen=True)
class Results:
    """All tables.

    Attributes:
        videos: number of videos that intervals are drawn from.
        frames: labelled frames of the split.
        uneven: some runs have scores on further videos; intervals and tests use the videos that all have.
    """

    tables: tuple[TableResult, ...]
    reference: RowResult
    videos: int
    frames: int
    split: str
    uneven: bool = False


def collect(schedule: Schedule, out: Path, failures: Mapping[str, Ended]) -> Results:
    """Read the finished runs and score every row.

    Args:
        failures: hash -> end of each failed run.

    Raises:
        CorruptError: a finished run's files are damaged.
    """
    folders = {run.key: out / RUNS / run.key for run in schedule.runs if run.key not in failures}
    metrics = {key: RunFolder(run).read_metrics() for key, run in folders.items()}
    moments = {key: read_moments(run) for key, run in folders.items()}
    sets = [set(videos) for videos in moments.values()]
    videos = sorted(set.intersection(*sets)) if sets else []
    measure = _Measure(metrics, moments, videos, failures)
    reference = measure.row(schedule.reference)
    tables = []
    for table, entries in schedule.tables:
        rows = [measure.row(entry, reference) for entry in entries]
        tables.append(TableResult(table, tuple(measure.with_best(rows))))
    first = next(iter(metrics.values()), {})
    split = str(first.get("split", schedule.reference.config.val_split))
    uneven = any(names != set(videos) for names in sets)
    return Results(tuple(tables), reference, len(videos), int(first.get("n_frames", 0)), split, uneven)


class _Measure:
    """Scores rows; every configuration is resampled once, with draws that all share."""

    def __init__(
        self,
        metrics: Mapping[str, Mapping[str, Any]],
        moments: Mapping[str, Mapping[str, Floats]],
        videos: Sequence[str],
        failures: Mapping[str, Ended],
    ) -> None:
        self._metrics, self._moments, self._videos, self._failures = metrics, moments, videos, failures
        self._draws = shared_draws(len(videos)) if videos else np.zeros((0, 0))
        self._resampled: dict[tuple[str, ...], Floats] = {}

    def row(self, entry: Entry, reference: RowResult | None = None) -> RowResult:
        """Results of a row, compared with the full model if it is another one."""
        finished = [self._metrics[key] for key in entry.keys if key in self._metrics]
        scores = np.array([[metrics["ccc"][name] for name in SCORES] for metrics in finished], np.float64)  # None: NaN
        within = np.array([metrics["within_video_ccc"]["mean"] for metrics in finished], np.float64)
        edges = np.full((len(SCORES), 2), np.nan)
        if finished and self._videos:
            edges = percentile_interval(self._resamples(entry))
        failed = [self._failures[key] for key in entry.keys if key in self._failures]
        problem = entry.problem
        if failed:
            problem = f"{len(failed)} of {len(entry.keys)} runs failed: {failed[0].message}"
        row = RowResult(entry, scores.reshape(-1, len(SCORES)), within, edges, problem=problem)
        if reference is None or entry.keys == reference.entry.keys:
            return row
        return replace(row, versus=self._compare(row, reference))

    def with_best(self, rows: Sequence[RowResult]) -> list[RowResult]:
        """The rows of a table; the best of each column is marked where it significantly beats the runner-up."""
        marked = list(rows)
        for k in range(len(SCORES)):
            ranked = sorted((r for r in rows if np.isfinite(r.mean[k])), key=lambda r: -r.mean[k])
            if len(ranked) < 2:
                continue
            versus = self._compare(ranked[0], ranked[1])
            if versus is not None and versus.low[k] > 0:
                at = next(i for i, row in enumerate(rows) if row is ranked[0])
                best = tuple(flag or i == k for i, flag in enumerate(marked[at].best))
                marked[at] = replace(marked[at], best=best)
        return marked

    def _compare(self, one: RowResult, other: RowResult) -> PairedDifference | None:
        if not (one.seeds and other.seeds and self._videos):
            return None
        resamples = self._resamples(one.entry), self._resamples(other.entry)
        return paired_difference(*resamples, one.mean - other.mean, len(self._videos))

    def _resamples(self, entry: Entry) -> Floats:
        keys = tuple(key for key in entry.keys if key in self._moments)
        if keys not in self._resampled:
            moments = np.array([[self._moments[key][video] for video in self._videos] for key in keys])
            self._resampled[keys] = resampled_ccc(moments, self._draws)
        return self._resampled[keys]


def encoder_study(cache: Cache) -> Study:
    """Table `encoders`: the same heads on every stream of a cache, every pair, and all visual streams together.

    It is written as the TOML of any other table, so that `tables.toml` of the study repeats it. The full model has the
    first visual and the first audio stream.

    Raises:
        UsageError: the cache has no stream of an encoder.
    """
    visual, audio = encoder_streams(cache, "visual"), encoder_streams(cache, "audio")
    if not visual and not audio:
        raise UsageError(explain(f"{cache.place} has no encoder's stream", expected="a visual or an audio stream"))
    lines = ["[base]", 'preset = "p1"', *_selected(visual[:1], audio[:1]), ""]
    lines += [f"[table.{ENCODERS}]", 'title = "Encoders of the cache"', ""]
    rows = {name: _selected([name], []) for name in visual} | {name: _selected([], [name]) for name in audio}
    rows |= {f"{one} + {other}": _selected([one], [other]) for one in visual for other in audio}
    if len(visual) > 1:
        rows["all visual"] = _selected(visual, [])
    for name, settings in rows.items():
        lines += [f"[[table.{ENCODERS}.row]]", f"name = {json.dumps(name)}", *settings, ""]
    return parse_study("\n".join(lines), f"table {ENCODERS}")


def encoder_streams(cache: Cache, kind: str) -> list[str]:
    """Names of the visual or audio streams of a cache."""
    return [name for name, info in cache.streams().items() if info.kind == kind]


def _selected(visual: Sequence[str], audio: Sequence[str]) -> list[str]:
    return [f"visual = {json.dumps(list(visual) or [NONE])}", f"audio = {json.dumps(list(audio) or [NONE])}"]


@dataclass(frozen=True)
class EncoderComparison:
    """Comparison of a cache's encoders, as texts.

    Attributes:
        heads: columns of the matrix; rows: its rows: mean CCC of visual streams (rows) with audio streams (columns).
        together: mean CCC of all visual streams together; "" with fewer than two.
        costs: rows of the table of costs, whose columns are `COSTS`.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    together: str
    costs: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Text of `encoders.md`."""
        lines = [
            "# Encoders of the cache",
            "",
            "Mean CCC over seeds; intervals and paired tests are in results.md.",
            "",
        ]
        lines += _markdown(self.heads, self.rows)
        if self.together:
            lines += ["", f"All visual streams together: {self.together}."]
        return "\n".join([*lines, "", *_markdown(COSTS, self.costs), "", COSTS_NOTE, ""])


def compare_encoders(cache: Cache, results: Results) -> EncoderComparison | None:
    """Return the comparison of a study with the table `encoders`; None for other studies."""
    if all(table.table.name != ENCODERS for table in results.tables):
        return None
    rows = {row.entry.row.name: row for table in results.tables for row in table.rows}

    def score(name: str) -> str:
        row = rows.get(name)
        return f"{row.mean[2]:.3f}" if row is not None and row.seeds else "-"

    visual, audio = encoder_streams(cache, "visual"), encoder_streams(cache, "audio")
    matrix = [[one, score(one), *(score(f"{one} + {other}") for other in audio)] for one in visual]
    matrix.append(["none", "-", *(score(other) for other in audio)])
    sizes, costs, table = cache.info()["streams"], stream_costs(cache), []
    for name in (*visual, *audio):
        info, cost = cache.streams()[name], costs.get(name)
        size = [str(info.dim), str(stored_layers(info) or 1), f"{sizes[name]['bytes'] / 1e6:.3g}"]
        if cost is None:
            table.append([name, *size, *"----"])
        else:
            parameters = "-" if cost.parameters is None else f"{cost.parameters / 1e6:.1f}"
            table.append([name, *size, parameters, f"{cost.seconds_per_minute:.2f}", cost.device, cost.precision])
    heads = ["visual \\ audio", "none", *audio]
    return EncoderComparison(heads, matrix, score("all visual") if len(visual) > 1 else "", table)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
