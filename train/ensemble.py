"""Several runs as one: the weighted mean of their traces, frame by frame.

Traces have a row per annotated frame whatever a run's windows and streams are, so any runs on one cache go together.

DIR/ensemble.json        the runs, their weights, and on which split those were found
    metrics.json         as of a run
    predictions/SPLIT/CLIP.csv, and sources.json: what they were made from

How much each run counts in an ensemble, per dimension: weights that are not negative and sum to one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, open_cache
from vaflow.device import choose_device
from vaflow.errors import CorruptError, DataError, UsageError, explain
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.data import load_split
from vaflow.train.evaluate import Trace, check_complete, failed_items, score, score_traces, write_predictions
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.provenance import Maker, write_sources
from vaflow.train.runs import ENSEMBLE_FILE, RunFolder, RunRecord, cache_of, load_run, require_record
from vaflow.train.training import read_for
from vaflow.train.windows import ClipRows

_ROUNDS, _STEPS = 60, 2000
_ENOUGH = 1e-12  # change of the concordance below which the search has ended


def concordance_weights(ccc: Floats) -> Floats:
    """Weights in proportion to each run's concordance, [N] -> [N]; those at or below 0 count only where all are."""
    worth = np.clip(np.nan_to_num(np.asarray(ccc, np.float64)), 0, None)
    total = worth.sum()
    return worth / total if total > 0 else np.full(len(worth), 1 / len(worth))


def best_weights(prediction: Floats, label: Floats) -> Floats:
    """The weights whose mixture has the highest concordance with the labels.

    For weights w on the simplex CCC = 2 c'w / w'Qw, with Q positive semidefinite: a linear function over a convex one,
    so a local maximum above 0 is the global one. Dinkelbach's method makes quadratic problems of it, which projected
    gradients solve.

    Args:
        prediction: [T, N], what each of N runs says.
        label: [T].

    Returns:
        [N]. The best single run where no mixture is better than 0.

    Raises:
        ValueError: shapes disagree, or there is nothing to learn from.
    """
    x, y = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not x.size:
        raise ValueError(f"best_weights: expected predictions [T, N] and labels [T]; got {[*x.shape]}, {[*y.shape]}")
    linear, quadratic = _terms(x, y)
    runs = x.shape[1]

    def ccc(w: Floats) -> float:
        spread = w @ quadratic @ w
        return float(2 * linear @ w / spread) if spread > 0 else 0.0

    weights = max(np.eye(runs), key=ccc)
    for _ in range(_ROUNDS):
        before = ccc(weights)
        if before <= 0:
            break
        found = _maximum(linear, before * quadratic, weights)
        if ccc(found) <= before + _ENOUGH:
            break
        weights = found
    return weights


def _terms(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """c and the matrix Q with CCC(w) = 2 c'w / w'Qw for weights that sum to one."""
    mean = x.mean(axis=0)
    dx, dy = x - mean, y - y.mean()
    apart = mean - y.mean()
    return dx.T @ dy / len(y), dx.T @ dx / len(y) + np.outer(apart, apart) + dy @ dy / len(y)


def _maximum(linear: Floats, quadratic: Floats, start: Floats) -> Floats:
    """The w on the simplex that maximises 2 linear'w - w'quadratic w, by accelerated projected gradients."""
    # Along the simplex only differences count.
    centred = quadratic - quadratic.mean(axis=0) - quadratic.mean(axis=1, keepdims=True) + quadratic.mean()
    curvature = float(np.linalg.norm(centred, 2))
    if curvature <= _ENOUGH * float(np.linalg.norm(quadratic, 2)):
        return start  # the runs say the same
    step = 1 / curvature
    w, ahead, speed = start, start, 1.0
    for _ in range(_STEPS):
        found = onto_simplex(ahead + step * (linear - quadratic @ ahead))
        faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
        back = (ahead - found) @ (found - w) > 0  # uphill no longer: begin the acceleration anew
        ahead = found if back else found + (speed - 1) / faster * (found - w)
        speed = 1.0 if back else faster
        if np.abs(found - w).max() < _ENOUGH and not back:
            return found
        w = found
    return w


def onto_simplex(point: Floats) -> Floats:
    """The nearest weights, not negative and summing to one, [N] -> [N]."""
    high = np.sort(point)[::-1]
    over = (np.cumsum(high) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - over[high > over][-1], 0)


WEIGHTS = ("mean", "ccc", "search")


@dataclass(frozen=True)
class Ensemble:
    """What `ensemble.json` says.

    Attributes:
        runs: folders.
        how: one of `WEIGHTS`.
        weights: dimension -> the weight of each run.
        weights_split: where they were found; empty for plain means.
        scores: dimension -> the CCC of each run on that split.
    """

    runs: tuple[str, ...]
    how: str
    weights: Mapping[str, Sequence[float]]
    weights_split: str = ""
    scores: Mapping[str, Sequence[float | None]] | None = None

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
    """Weigh finished runs, average their traces, measure and write.

    Args:
        runs: their folders.
        out: a new folder, or that of an earlier ensemble.
        how: "mean"; "ccc": each run in proportion to its CCC, per dimension; "search": the weights with the best CCC.
        cache: of the clips; None: that of the first run.
        split: what is predicted and scored; None: the runs' validation split.
        weights_split: where weights are found; None: the runs' validation split.
        device: "auto", "cpu" or "cuda[:N]".
        allow_missing: leave labelled clips without features out of the metrics.
        show: progress bars.

    Returns:
        The ensemble and its metrics.

    Raises:
        UsageError: an unknown `how`, a folder that is no finished run, or runs that validate on different splits where
            the split is left to them.
        DataError: clips are without features or labels.
        FingerprintError: the cache's streams were made with other settings than a run's.
    """
    if how not in WEIGHTS:
        raise UsageError(explain("Unknown weights", got=how, choices=WEIGHTS))
    if not runs:
        raise UsageError(explain("An ensemble needs runs", expected="at least one", got="none"))
    records = [require_record(run) for run in runs]
    cache = open_cache(cache_of(runs[0])) if cache is None else cache
    split = _common_split(runs, records, "--split") if split is None else split
    folder = _folder(out)
    members = Members(cache, tuple(Path(run) for run in runs), device, allow_missing, show)
    found_on = ""
    if how != "mean":
        found_on = _common_split(runs, records, "--weights-split") if weights_split is None else weights_split
    ensemble = weigh(members.runs, how, members.traces(found_on) if found_on else (), found_on)
    said, lost, failed = members.traces(split), members.lost(split), members.failed(split)
    traces = combine(said, ensemble.table)
    report = score_traces(traces, split, lost, failed, centers=records[0].config.centers)
    report["ensemble"] = {"runs": len(runs), "weights": how, "weights_split": found_on}
    if found_on == split and how == "search":
        report["warnings"].append("the weights were found on the split that they are scored on")
    write_file(folder.path / ENSEMBLE_FILE, (json.dumps(asdict(ensemble), indent=2) + "\n"))
    write_predictions(folder.predictions(split), traces)
    write_sources(folder.predictions(split), maker_of(folder.path), cache, [trace.clip.item for trace in traces])
    folder.write_metrics(report)
    return ensemble, report


def members_of(path: Path) -> tuple[list[Path], Floats]:
    """The runs of an ensemble and their weights, [N, 2]; of a run, itself.

    Raises:
        CorruptError: `ensemble.json` is damaged.
    """
    file = Path(path) / ENSEMBLE_FILE
    if not file.is_file():
        return [Path(path)], np.ones((1, 2))
    try:
        ensemble = Ensemble(**json.loads(file.read_text("utf-8")))
        return [Path(run) for run in ensemble.runs], ensemble.table
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise CorruptError(explain(f"{file} cannot be read", got=error)) from error


def maker_of(path: Path) -> Maker:
    """A run, or an ensemble with its runs, as what makes predictions.

    Raises:
        UsageError: it is neither, or a run of the ensemble is not there.
        CorruptError: a file of it is damaged.
    """
    runs, _ = members_of(path)
    return Maker(Path(path), {run: require_record(run) for run in runs})


class Members:
    """The runs' traces of splits of a cache, each made once.

    Args:
        cache: of the clips.
        runs: folders.
        device: "auto", "cpu" or "cuda[:N]".
        allow_missing: whether labelled clips may be without features.
        show: progress bars.
    """

    def __init__(self, cache: Cache, runs: tuple[Path, ...], device: str, allow_missing: bool, show: bool) -> None:
        self.runs = runs
        self._cache = cache
        self._device = choose_device(device)
        self._allow_missing = allow_missing
        self._show = show
        self._made: dict[str, list[list[Trace]]] = {}
        self._lost: dict[str, dict[str, ClipRows]] = {}

    def traces(self, split: str) -> list[list[Trace]]:
        """What every run says of the split, smoothed where that was chosen for the run."""
        if split not in self._made:
            self._lost[split] = {}
            self._made[split] = [self._traces(run, split) for run in self.runs]
        return self._made[split]

    def _traces(self, run: Path, split: str) -> list[Trace]:
        trained = load_run(run, self._device)
        read = partial(load_split, self._cache, split, device=self._device, show=self._show)
        windows = read_for(run, trained.record, self._cache, read)
        lost = check_complete(windows, self.failed(split), self._allow_missing)
        self._lost[split] |= {clip.item: clip for clip in lost}
        return list(trained.traces(windows))

    def lost(self, split: str) -> list[ClipRows]:
        """Labelled clips of which some run has no features."""
        return list(self._lost[split].values())

    def failed(self, split: str) -> list[str]:
        """Clips of the split that are not in the cache at all."""
        return failed_items(self._cache, split, require_record(self.runs[0]).config.fold_splits)


def weigh(runs: Sequence[Path], how: str, said: Sequence[Sequence[Trace]] = (), weights_split: str = "") -> Ensemble:
    """Weights of runs, per dimension, from what they say of a labelled split; a dimension without labels gets the mean.

    Args:
        runs: folders.
        how: one of `WEIGHTS`.
        said: per run a trace per clip; not looked at for plain means.
        weights_split: the split's name.
    """
    names = tuple(str(Path(run).resolve()) for run in runs)
    equal = np.full(len(names), 1 / len(names))
    if how == "mean":
        return Ensemble(names, how, {name: equal.tolist() for name in DIMENSIONS})
    scores = np.array([score(traces)[:2] for traces in said])
    weights = {}
    for k, name in enumerate(DIMENSIONS):
        valid = np.concatenate([trace.clip.valid[:, k] for trace in said[0]])
        if not valid.any():
            weights[name] = equal.tolist()
        elif how == "ccc":
            weights[name] = concordance_weights(scores[:, k]).tolist()
        else:
            x = np.stack([np.concatenate([t.va[:, k] for t in traces])[valid] for traces in said], axis=-1)
            y = np.concatenate([trace.clip.value[:, k] for trace in said[0]])[valid]
            weights[name] = best_weights(x, y).tolist()
    plain = {n: [float(s) if np.isfinite(s) else None for s in scores[:, k]] for k, n in enumerate(DIMENSIONS)}
    return Ensemble(names, how, weights, weights_split, plain)


def combine(said: Sequence[Sequence[Trace]], weights: Floats) -> list[Trace]:
    """The weighted mean of every clip's traces; regions, where every run has them, with the mean over dimensions.

    Args:
        said: per run a trace per clip, in the same order.
        weights: [N, 2], a row per run.

    Raises:
        DataError: the runs do not speak of the same frames.
    """
    combined = []
    for traces in zip(*said, strict=True):
        first = traces[0]
        if any(t.clip.item != first.clip.item or t.va.shape != first.va.shape for t in traces):
            raise DataError(explain(f"The runs do not predict the same frames of clip {first.clip.item!r}"))
        va = sum(weight * trace.va for weight, trace in zip(weights, traces, strict=True))
        regions = [trace.regions for trace in traces]
        mixed = None
        if all(part is not None for part in regions):
            mixed = sum(float(weight.mean()) * part for weight, part in zip(weights, regions, strict=True))
        shares = weights.mean(axis=1)
        names = [name for name in first.extra if all(name in trace.extra for trace in traces)]
        extra = {n: sum(s * trace.extra[n] for s, trace in zip(shares, traces, strict=True)) for n in names}
        combined.append(replace(first, va=np.clip(va, -1, 1), regions=mixed, extra=extra))
    return combined


def _common_split(runs: Sequence[Path], records: Sequence[RunRecord], option: str) -> str:
    splits = {str(run): record.config.val_split for run, record in zip(runs, records, strict=True)}
    if len(set(splits.values())) == 1:
        return records[0].config.val_split
    raise UsageError(
        explain(
            "The runs were validated on different splits",
            expected=f"{option}, a split that none of them was trained on",
            got="; ".join(f"{run}: {split}" for run, split in splits.items()),
        )
    )


def _folder(out: Path) -> RunFolder:
    folder = RunFolder(Path(out))
    if not (folder.path / ENSEMBLE_FILE).is_file():
        folder.make()
        if folder.config_file.exists():
            raise UsageError(explain(f"{out} is a run's folder", expected="a folder of its own for the ensemble"))
    return folder
