"""Ensembles: the weighted mean of the traces of several runs, frame by frame.

Traces have a row per annotated frame whatever a run's windows and streams are, so any runs on one cache fit together.
Weights are per dimension, not negative, and sum to one.

DIR/ensemble.json        the runs, their weights, and the split that those were chosen on
    metrics.json         as of a run
    uncertainty.json     calibration of the standard deviations
    predictions/SPLIT/CLIP.csv, and sources.json: what they were made from
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, open_cache
from vaflow.device import choose_device
from vaflow.encoders import warn_of_demonstration
from vaflow.errors import CorruptError, DataError, UsageError, command, explain
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.data import load_split
from vaflow.train.evaluate import data_warnings, read_for
from vaflow.train.inputs import check_same_targets
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.prediction_files import Maker, read_sources, write_evaluation
from vaflow.train.run_folder import ENSEMBLE_FILE, RunFolder, cache_of, load_run, require_record
from vaflow.train.run_record import RunRecord
from vaflow.train.scores import check_complete, failed_items, score, score_traces
from vaflow.train.traces import Trace
from vaflow.train.uncertainty import (
    Calibration,
    calibrate,
    calibrated,
    read_calibration,
    uncertainty_report,
    write_calibration,
)
from vaflow.train.windows import ClipRows

log = logging.getLogger(__name__)

WEIGHTS = ("mean", "ccc", "search")
_ROUNDS, _STEPS = 60, 2000
_ENOUGH = 1e-12  # change of the concordance below which the search stops


@dataclass(frozen=True)
class Ensemble:
    """Contents of `ensemble.json`.

    Attributes:
        runs: folders.
        how: one of `WEIGHTS`.
        weights: dimension -> the weight of each run.
        weights_split: split that they were chosen on; empty for plain means.
        scores: dimension -> the CCC of each run on that split.
        relative: the folders from that of the ensemble, which may be moved together with them.
    """

    runs: tuple[str, ...]
    how: str
    weights: Mapping[str, Sequence[float]]
    weights_split: str = ""
    scores: Mapping[str, Sequence[float | None]] | None = None
    relative: Sequence[str] = ()

    @property
    def table(self) -> Floats:
        """[N, 2], a row per run."""
        return np.array([self.weights[name] for name in DIMENSIONS], np.float64).T


def ensemble_runs(
    runs: Sequence[Path],
    out: Path,
    how: str = "mean",
    *,
    cache: Cache | None = None,
    split: str | None = None,
    weights_split: str | None = None,
    device: str = "auto",
    allow_missing: bool = False,
    show: bool = False,
) -> tuple[Ensemble, dict[str, Any]]:
    """Weight finished runs, average their traces, score and write them; returns the ensemble and its metrics.

    Args:
        out: a new folder, or that of an earlier ensemble.
        how: "mean"; "ccc": proportional to each run's CCC, per dimension; "search": the weights with the best CCC.
        cache: of the clips; None: that of the first run.
        split: the split to score; None: the runs' validation split.
        weights_split: the split to choose weights on; None: the runs' validation split.

    Raises:
        UsageError: an unknown `how`, a folder that is not a finished run, a run listed twice, or runs with different
            validation splits and no split given.
        DataError: clips have no features or labels.
        FingerprintError: the cache's streams were made with other settings than a run's.
    """
    if how not in WEIGHTS:
        raise UsageError(explain("Unknown weights", got=how, choices=WEIGHTS))
    if how == "mean" and weights_split is not None:
        raise UsageError(explain("--weights-split is only for --weights ccc and search", got=weights_split))
    if not runs:
        raise UsageError(explain("An ensemble needs runs", expected="at least one", got="none"))
    if repeated := [str(run) for run, number in Counter(Path(run).resolve() for run in runs).items() if number > 1]:
        raise UsageError(explain("A run is listed twice", got=", ".join(repeated), remedy="List each run once"))
    records = [require_record(run) for run in runs]
    cache = open_cache(cache_of(runs[0])) if cache is None else cache
    split = _common_split(runs, records, "--split") if split is None else split
    folder = RunFolder(Path(out))
    if not (folder.path / ENSEMBLE_FILE).is_file():
        folder.refuse()
        folder.make()
    warn_of_demonstration(stream.name for record in records for stream in record.streams)
    members = Members(cache, tuple(Path(run) for run in runs), device, allow_missing, show)
    chosen_on = ""
    if how != "mean":
        chosen_on = _common_split(runs, records, "--weights-split") if weights_split is None else weights_split
    ensemble = weigh(members.runs, how, members.scored(chosen_on) if chosen_on else (), chosen_on)
    traces, lost, failed = combine(members.traces(split), ensemble.table), members.lost(split), members.failed(split)
    report = score_traces(traces, split, lost, failed, centers=records[0].config.centers)
    if len(runs) > 1 or traces[0].std is not None:
        splits = {record.config.val_split for record in records}
        calibrated_on = chosen_on or (splits.pop() if len(splits) == 1 else split)
        calibration = calibrate_ensemble(members, ensemble.table, calibrated_on)
        write_calibration(folder.path, calibration)
        traces = list(calibrated(traces, calibration))
        used = [trace for trace in traces if trace.clip.item not in report["missing"]["clips"]]
        report |= uncertainty_report(used, split, calibration.split)
    items = [trace.clip.item for trace in traces]
    report["warnings"] += data_warnings(dict(zip(runs, records, strict=True)), cache, split, items, report["ccc"])
    report["ensemble"] = {"runs": len(runs), "weights": how, "weights_split": chosen_on}
    if chosen_on == split and how == "search":
        report["warnings"].append("the weights were tuned on this split; the score is optimistic")
    ensemble = replace(ensemble, relative=[os.path.relpath(run, folder.path.resolve()) for run in ensemble.runs])
    write_file(folder.path / ENSEMBLE_FILE, (json.dumps(asdict(ensemble), indent=2) + "\n"))
    write_evaluation(folder.output_folder(split), maker_of(folder.path), cache, traces)
    folder.write_metrics(report)
    return ensemble, report


def calibrate_ensemble(members: "Members", weights: Floats, split: str) -> Calibration:
    """Calibrate the standard deviations of an ensemble on a split."""
    return calibrate(combine(members.scored(split), weights), split)


def members_of(path: Path) -> tuple[list[Path], Floats]:
    """Runs of an ensemble and their weights, [N, 2]; a run alone has weight 1.

    Raises:
        UsageError: a run of the ensemble does not exist any more.
        CorruptError: `ensemble.json` is damaged.
    """
    ensemble = _read(path)
    if ensemble is None:
        return [Path(path)], np.ones((1, 2))
    runs = _places(path, ensemble)
    missing = [name for run, name in zip(runs, ensemble.runs, strict=True) if not run.is_dir()]
    if missing:
        remedy = f"Move them back, or make an ensemble of other runs: {command('ensemble', 'RUN...', '--out', path)}"
        raise UsageError(explain(f"Runs of the ensemble {path} do not exist", got=", ".join(missing), remedy=remedy))
    return runs, ensemble.table


def _places(path: Path, ensemble: Ensemble) -> list[Path]:
    """Where the runs are: the recorded folders, or the same ones relative to the ensemble."""
    moved = [Path(os.path.normpath(path.resolve() / place)) for place in ensemble.relative or ensemble.runs]
    return [Path(run) if Path(run).is_dir() else other for run, other in zip(ensemble.runs, moved, strict=True)]


def _read(path: Path) -> Ensemble | None:
    """The contents of `ensemble.json`; None if there is none. Raises CorruptError if it is damaged."""
    file = Path(path) / ENSEMBLE_FILE
    if not file.is_file():
        return None
    try:
        ensemble = Ensemble(**json.loads(file.read_text("utf-8")))
        _places(path, ensemble), ensemble.table
        return ensemble
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise CorruptError(explain(f"{file} cannot be read", got=error)) from error


def maker_of(path: Path) -> Maker:
    """The `Maker` of a run or an ensemble.

    Raises:
        UsageError: the path is neither, or a run of the ensemble is missing.
        CorruptError: one of their files is damaged.
    """
    runs, _ = members_of(path)
    ensemble = _read(path)
    names = dict(zip(runs, ensemble.runs, strict=True)) if ensemble is not None else {}
    return Maker(Path(path), {run: require_record(run) for run in runs}, names)


def warn_of_changed_members(path: Path) -> None:
    """Log a warning if weights or smoothing of an ensemble's runs are not those that its predictions were made with."""
    if not (path / ENSEMBLE_FILE).is_file():
        return
    folder = RunFolder(path)
    if not folder.metrics_file.is_file():
        return
    recorded = read_sources(folder.predictions(str(folder.read_metrics().get("split"))))  # other splits can be older
    if recorded is None:
        return
    maker = maker_of(path)
    files = {name for name, _ in recorded.weights.items() ^ maker.weights().items()}
    changed = [str(run) for run, name in maker.names.items() if any(file.startswith(f"{name}/") for file in files)]
    if changed:
        again = command("ensemble", *maker.runs, "--out", path)
        problem = f"changed since {path} was made; its weights and its calibration are those of the earlier runs"
        log.warning("%s: %s. To make it again: %s", ", ".join(changed), problem, again)


class Members:
    """Traces of several runs on splits of a cache, each predicted once."""

    def __init__(self, cache: Cache, runs: tuple[Path, ...], device: str, allow_missing: bool, show: bool) -> None:
        self.runs = runs
        self._cache = cache
        self._device = choose_device(device)
        self._allow_missing = allow_missing
        self._show = show
        self._made: dict[str, list[list[Trace]]] = {}
        self._lost: dict[str, dict[str, ClipRows]] = {}

    def traces(self, split: str) -> list[list[Trace]]:
        """Traces of every run on a split, smoothed as stored with the run."""
        if split not in self._made:
            self._lost[split] = {}
            traces: list[list[Trace]] = []
            for run in self.runs:
                trained = load_run(run, self._device)
                read = partial(load_split, self._cache, split, device=self._device, show=self._show)
                windows = read_for(run, trained.record, self._cache, read)
                check_same_targets(trained.record.targets, self._cache)
                items = [clip.item for clip in windows.clips]
                if traces and items != [trace.clip.item for trace in traces[0]]:
                    problem = f"{self.runs[0]} and {run} have other clips in split {split!r}"
                    expected = "runs with the same --fold-groups and fold_splits"
                    raise UsageError(explain(problem, expected=expected))
                lost = check_complete(windows, self.failed(split), self._allow_missing)
                self._lost[split] |= {clip.item: clip for clip in lost}
                traces.append(list(trained.traces(windows)))
            self._made[split] = traces
        return self._made[split]

    def scored(self, split: str) -> list[list[Trace]]:
        """The traces of clips that have features."""
        return [[t for t in traces if t.clip.item not in self._lost[split]] for traces in self.traces(split)]

    def lost(self, split: str) -> list[ClipRows]:
        """Labelled clips without features of some run."""
        return list(self._lost[split].values())

    def failed(self, split: str) -> list[str]:
        """Clips of the split that the cache lacks."""
        return failed_items(self._cache, split, require_record(self.runs[0]).config.fold_splits)


def weigh(runs: Sequence[Path], how: str, traces: Sequence[Sequence[Trace]] = (), weights_split: str = "") -> Ensemble:
    """Choose weights of runs per dimension on a labelled split; a dimension without labels gets equal weights.

    Args:
        how: one of `WEIGHTS`.
        traces: per run a trace per clip; not used for plain means.
    """
    names = tuple(str(Path(run).resolve()) for run in runs)
    equal = np.full(len(names), 1 / len(names))
    if how == "mean":
        return Ensemble(names, how, {name: equal.tolist() for name in DIMENSIONS})
    scores = np.array([score(each)[:2] for each in traces])
    weights = {}
    for k, name in enumerate(DIMENSIONS):
        valid = np.concatenate([trace.clip.valid[:, k] for trace in traces[0]])
        if not valid.any():
            weights[name] = equal.tolist()
        elif how == "ccc":
            weights[name] = concordance_weights(scores[:, k]).tolist()
        else:
            x = np.stack([np.concatenate([t.va[:, k] for t in each])[valid] for each in traces], axis=-1)
            y = np.concatenate([trace.clip.value[:, k] for trace in traces[0]])[valid]
            weights[name] = best_weights(x, y).tolist()
    plain = {n: [float(s) if np.isfinite(s) else None for s in scores[:, k]] for k, n in enumerate(DIMENSIONS)}
    return Ensemble(names, how, weights, weights_split, plain)


def concordance_weights(ccc: Floats) -> Floats:
    """Weights proportional to each run's CCC, [N] -> [N]; a CCC at or below 0 gives 0, equal weights if all are."""
    worth = np.clip(np.nan_to_num(np.asarray(ccc, np.float64)), 0, None)
    total = worth.sum()
    return worth / total if total > 0 else np.full(len(worth), 1 / len(worth))


def best_weights(prediction: Floats, label: Floats) -> Floats:
    """Weights whose mixture has the highest CCC with the labels.

    For weights w on the simplex CCC = 2 c'w / w'Qw, with Q positive semidefinite: a linear function over a convex one,
    so a local maximum above 0 is the global one. Dinkelbach's method turns it into quadratic problems, which projected
    gradients solve.

    Args:
        prediction: [T, N], of N runs.
        label: [T].

    Returns:
        [N]. The best single run if no mixture is above 0.

    Raises:
        ValueError: shapes disagree, or there is no label.
    """
    x, y = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not x.size:
        raise ValueError(f"best_weights: expected predictions [T, N] and labels [T]; got {[*x.shape]}, {[*y.shape]}")
    # c and Q for weights that sum to one
    mean = x.mean(axis=0)
    dx, dy = x - mean, y - y.mean()
    apart = mean - y.mean()
    linear = dx.T @ dy / len(y)
    quadratic = dx.T @ dx / len(y) + np.outer(apart, apart) + dy @ dy / len(y)
    runs = x.shape[1]

    def ccc(w: Floats) -> float:
        spread = w @ quadratic @ w
        return float(2 * linear @ w / spread) if spread > 0 else 0.0

    weights = max(np.eye(runs), key=ccc)
    for _ in range(_ROUNDS):
        before = ccc(weights)
        if before <= 0:
            break
        better = maximize(linear, before * quadratic, weights)
        if ccc(better) <= before + _ENOUGH:
            break
        weights = better
    return weights


def maximize(linear: Floats, quadratic: Floats, start: Floats) -> Floats:
    """Maximize 2 linear'w - w'quadratic w over w on the simplex, by accelerated projected gradients."""
    # Only differences matter along the simplex.
    centred = quadratic - quadratic.mean(axis=0) - quadratic.mean(axis=1, keepdims=True) + quadratic.mean()
    curvature = float(np.linalg.norm(centred, 2))
    if curvature <= _ENOUGH * float(np.linalg.norm(quadratic, 2)):
        return start  # the runs agree
    step = 1 / curvature
    w, ahead, speed = start, start, 1.0
    for _ in range(_STEPS):
        following = onto_simplex(ahead + step * (linear - quadratic @ ahead))
        faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
        back = (ahead - following) @ (following - w) > 0  # the score has dropped: restart the acceleration
        ahead = following if back else following + (speed - 1) / faster * (following - w)
        speed = 1.0 if back else faster
        if np.abs(following - w).max() < _ENOUGH and not back:
            return following
        w = following
    return w


def onto_simplex(point: Floats) -> Floats:
    """Project a point onto the simplex (non-negative, sum 1), [N] -> [N]."""
    high = np.sort(point)[::-1]
    over = (np.cumsum(high) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - over[high > over][-1], 0)


def combine(runs: Sequence[Sequence[Trace]], weights: Floats) -> list[Trace]:
    """The weighted mean of every clip's traces; regions, where every run has them, with the mean over dimensions.

    Variances follow from the law of total variance: the mean of the runs' variances (0 of a run without) plus the
    variance of their predictions. One run without standard deviations has none here.

    Args:
        runs: per run a trace per clip, in the same order.
        weights: [N, 2], a row per run.

    Raises:
        DataError: the runs predict different frames.
    """
    combined = []
    shares = weights.mean(axis=1)
    for traces in zip(*runs, strict=True):
        first = traces[0]
        if any(t.clip.item != first.clip.item or t.va.shape != first.va.shape for t in traces):
            raise DataError(explain(f"The runs do not predict the same frames of clip {first.clip.item!r}"))
        va = np.asarray(sum(weight * trace.va for weight, trace in zip(weights, traces, strict=True)))
        names = [name for name in first.extra if all(name in trace.extra for trace in traces)]
        optional = ("regions", "face", "audio", "interpolated", "far")
        known = {name: [part for t in traces if (part := getattr(t, name)) is not None] for name in optional}
        regions = zip(shares, known["regions"], strict=True) if len(known["regions"]) == len(traces) else None
        mean = replace(
            first,
            va=np.clip(va, -1, 1),
            regions=None if regions is None else np.asarray(sum(share * part for share, part in regions)),
            extra={n: sum(s * trace.extra[n] for s, trace in zip(shares, traces, strict=True)) for n in names},
            face=next(iter(known["face"]), None),
            audio=next(iter(known["audio"]), None),
            interpolated=np.all(known["interpolated"], axis=0) if known["interpolated"] else None,
            std=total_deviation(traces, weights, va),
            far=np.mean(known["far"], axis=0) >= 0.5 if known["far"] else None,
        )
        combined.append(mean)
    return combined


def total_deviation(traces: Sequence[Trace], weights: Floats, mean: Floats) -> Floats | None:
    """Standard deviation of a mixture of runs, [R, 2]; None for one run without standard deviations."""
    if len(traces) == 1 and traces[0].std is None:
        return None
    variance = np.zeros_like(mean)
    for trace, weight in zip(traces, weights, strict=True):
        variance += weight * (np.square(trace.va - mean) + (0 if trace.std is None else np.square(trace.std)))
    return np.sqrt(variance)


def ensemble_traces(path: Path, runs: Sequence[Sequence[Trace]], weights: Floats) -> list[Trace]:
    """Traces of a run or an ensemble from those of its runs, with calibrated standard deviations.

    Args:
        runs, weights: see `combine`.

    Raises:
        DataError: the runs predict different frames.
        CorruptError: the calibration is damaged.
    """
    traces = combine(runs, weights)
    if (path / ENSEMBLE_FILE).is_file():  # the traces of a run are calibrated already
        return list(calibrated(traces, read_calibration(path)))
    return traces


def _common_split(runs: Sequence[Path], records: Sequence[RunRecord], option: str) -> str:
    splits = {str(run): record.config.val_split for run, record in zip(runs, records, strict=True)}
    if len(set(splits.values())) == 1:
        return records[0].config.val_split
    expected = f"{option}, a split that none of them was trained on"
    got = "; ".join(f"{run}: {split}" for run, split in splits.items())
    raise UsageError(explain("The runs have different validation splits", expected=expected, got=got))
