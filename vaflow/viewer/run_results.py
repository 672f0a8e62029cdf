"""Results of a finished run on a split: its files, and sums over its prediction tables."""

import csv
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.errors import CorruptError, UsageError, command, explain
from vaflow.timeline import Floats
from vaflow.train.metrics import SCORES, concordance_of_moments, region_of, scope, smoothing_text, video_moments
from vaflow.viewer.clip_data import ClipScores, masks_of, scores_of
from vaflow.viewer.predictions import DIMENSIONS, PredictedClip, PredictionSet, find_predictions, read_predictions

BINS = 24  # of a dimension's histogram
SPARK = 160  # points of a small plot of a clip
_CCC_TOLERANCE = 1e-3  # predictions on disk have six digits
_DEPTH = 4  # directories below the one that `vaflow runs` searches


@dataclass(frozen=True)
class ReportClip:
    """One labelled clip: its scores, and its traces at `SPARK` points.

    Attributes:
        traces: [4, SPARK] predictions, then labels. std: [2, SPARK], or None without standard deviations.
    """

    clip: PredictedClip
    scores: ClipScores
    traces: Floats
    std: Floats | None = None


@dataclass
class PlaneSums:
    """Sums over labelled frames, from which the plots and tables of the plane follow.

    Attributes:
        histogram: [2, BINS, BINS], frames by label bin and prediction bin, per dimension.
        region: [9, 5], by region of the label: frames, squared errors [2], errors [2].
        predicted: [9] frames by region of the prediction.
        flow: [5, 5, 5], by bin of the label: frames, sums of labels [2], sums of predictions [2].
    """

    histogram: Floats = field(default_factory=lambda: np.zeros((2, BINS, BINS)))
    region: Floats = field(default_factory=lambda: np.zeros((9, 5)))
    predicted: Floats = field(default_factory=lambda: np.zeros(9))
    flow: Floats = field(default_factory=lambda: np.zeros((5, 5, 5)))

    def add(self, va: Floats, label: Floats, centers: float) -> None:
        """Add frames that are labelled in both dimensions, [N, 2] each."""
        bins = [np.clip(((x + 1) / 2 * BINS).astype(int), 0, BINS - 1) for x in (label, va)]
        for k in range(2):
            np.add.at(self.histogram[k], (bins[0][:, k], bins[1][:, k]), 1)
        error = va - label
        np.add.at(self.region, region_of(label, centers), np.column_stack([np.ones(len(va)), error**2, error]))
        self.predicted += np.bincount(region_of(va, centers), minlength=9)
        cell = np.clip(((label + 1) / 2 * 5).astype(int), 0, 4)
        np.add.at(self.flow, (cell[:, 0], cell[:, 1]), np.column_stack([np.ones(len(va)), label, va]))


@dataclass(frozen=True)
class RunResults:
    """One finished run.

    Attributes:
        path: its directory; name: unique among the runs of a report.
        config: `config.toml`; text: the same as it stands in the file.
        prediction_set: all predictions.
        moments: source video -> [6, 2] of `vaflow.train.metrics.video_moments`; without the clips left out.
        plane: sums over all labelled frames.
        masked: of the split: frames, unlabelled frames, seconds, seconds without a face; None: not recorded.
        scope: what the scores are of.
        outdated: clips whose records in the cache are no longer those that were scored.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    text: str
    metrics: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...]
    prediction_set: PredictionSet
    clips: tuple[ReportClip, ...]
    moments: Mapping[str, Floats]
    plane: PlaneSums
    masked: Mapping[str, float | None]
    scope: str
    outdated: tuple[str, ...] = ()


def read_run(path: Path, name: str = "") -> RunResults:
    """Read a finished run.

    Raises:
        UsageError: the directory is not a run, or its training has not finished.
        CorruptError: a file is damaged.
    """
    text, metrics_text = _text(path / "config.toml", path), _text(path / "metrics.json", path)
    try:
        config = tomllib.loads(text)
        metrics = json.loads(metrics_text)
        history = _history(path / "history.csv")
        split = str(metrics["split"])
        scored = scope(metrics)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(explain(f"Cannot read the run {path}", got=error)) from error
    prediction_set = find_predictions(path)
    of_split = [clip for clip in prediction_set.clips if clip.split == split]
    left_out = set(metrics.get("missing", {}).get("clips", ()))
    cache = prediction_set.open_cache()
    clips: list[ReportClip] = []
    moments: dict[str, Floats] = {}
    plane, masked = PlaneSums(), {"frames": 0.0, "unlabelled": 0.0, "seconds": 0.0, "no_face": 0.0}
    for clip in of_split:
        table = read_predictions(clip.csv)
        scores = scores_of(table, masks_of(table, cache, clip.item, prediction_set.streams))
        label = np.full_like(table.va, np.nan) if table.label is None else table.label
        valid = np.asarray(np.isfinite(label), bool)
        both = np.asarray(valid.all(axis=1), bool)
        masked["frames"] += len(both)
        masked["unlabelled"] += int((~both).sum())
        masked["seconds"] += scores.seconds
        masked["no_face"] += np.nan if scores.missing_face is None else scores.missing_face * scores.seconds
        if not valid.any() or clip.item in left_out:
            continue
        video = next((str(s["group"]) for s in clip.records() if s.get("group")), clip.item)  # resampled as one
        moments[video] = moments.get(video, np.zeros((6, 2))) + video_moments(table.va, label, valid)
        plane.add(table.va[both], label[both], prediction_set.centers)
        at = np.linspace(0, len(table.time) - 1, min(SPARK, len(table.time))).astype(int)
        std = None if table.std is None else table.std[at].T
        clips.append(ReportClip(clip, scores, np.concatenate([table.va[at].T, label[at].T]), std))
    _check_same_frames(path, metrics, moments)
    known: dict[str, float | None] = {k: v if np.isfinite(v) else None for k, v in masked.items()}
    outdated = tuple(clip.item for clip in of_split if cache is not None and clip.is_outdated(cache))
    parts = (prediction_set, tuple(clips), moments, plane, known, scored, outdated)
    return RunResults(path, name or path.name, config, text, metrics, history, *parts)


def _check_same_frames(path: Path, metrics: Mapping[str, Any], moments: Mapping[str, Floats]) -> None:
    """Check that the predictions of a run are those that `metrics.json` is about, by their CCC.

    Raises:
        UsageError: they are not, for example because the split was evaluated on another cache since.
    """
    if not moments:
        return
    scored = dict(zip(DIMENSIONS, concordance_of_moments(np.sum(list(moments.values()), axis=0)).tolist(), strict=True))
    stated = {name: metrics.get("ccc", {}).get(name) for name in DIMENSIONS}
    differs = [n for n in DIMENSIONS if stated[n] is not None and not abs(stated[n] - scored[n]) < _CCC_TOLERANCE]
    if differs:
        problem = f"The predictions of {path} are not those that its metrics.json is about"
        expected = ", ".join(f"CCC of {name} {stated[name]:.4f}" for name in differs)
        got = ", ".join(f"{scored[name]:.4f}" for name in differs) + "; the split was evaluated on other data"
        remedy = f"Evaluate the run on its cache again: {command('evaluate', path)}"
        raise UsageError(explain(problem, expected=expected, got=got, remedy=remedy))


def _text(path: Path, run: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        from vaflow.train.runs import refuse_ensemble  # imports torch

        refuse_ensemble(run)
        expected = "a directory written by `vaflow train`"
        got = f"no {path.name}" if run.is_dir() else "no such directory"
        remedy = f"List the finished runs: {command('runs', run.parent)}"
        raise UsageError(explain(f"{run} is not a finished run", expected=expected, got=got, remedy=remedy)) from error


def _history(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple({k: float(v or "nan") for k, v in row.items() if k} for row in csv.DictReader(file))


def read_runs(paths: list[Path]) -> list[RunResults]:
    """Read runs under unique names: the shortest ends of their paths that differ."""
    depth = 1
    parts = [path.resolve().parts for path in paths]
    while len({p[-depth:] for p in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return [read_run(path, "/".join(p[-depth:])) for path, p in zip(paths, parts, strict=True)]


@dataclass(frozen=True)
class RunLine:
    """One line of `vaflow runs`: a run and its headline, or why it has none."""

    path: str
    status: str
    streams: str = ""
    temporal: str = ""
    fusion: str = ""
    seed: int | None = None
    split: str = ""
    epochs: int | None = None
    ccc: Mapping[str, float | None] = field(default_factory=dict)
    ci95: Mapping[str, Any] = field(default_factory=dict)
    smoothing: str = ""


def list_runs(root: Path) -> Iterator[RunLine]:
    """Yield every run below a directory, sorted by path.

    Raises:
        UsageError: the directory does not exist.
    """
    if not root.is_dir():
        raise UsageError(explain(f"{root} is not a directory", expected="a directory with runs"))
    patterns = ["/".join(["*"] * depth + ["config.toml"]) for depth in range(_DEPTH + 1)]
    for path in sorted(file for pattern in patterns for file in root.glob(pattern)):
        line = _line(root, path.parent)
        if line is not None:
            yield line


def _line(root: Path, run: Path) -> RunLine | None:
    name = run.relative_to(root).as_posix()
    try:
        config = tomllib.loads((run / "config.toml").read_text("utf-8"))
        if not isinstance(config.get("train"), dict):
            return None
        train = config["train"]
        common: dict[str, Any] = {
            "streams": ", ".join(str(stream.get("name")) for stream in config.get("stream", ())),
            "temporal": str(train.get("temporal", "")),
            "fusion": str(train.get("fusion", "")),
            "seed": train.get("seed"),
        }
        if not (run / "metrics.json").is_file():
            return RunLine(name, "not finished", **common)
        metrics = json.loads((run / "metrics.json").read_text("utf-8"))
        if smoothing := metrics.get("smoothing"):
            tuned = f", tuned on {smoothing['chosen_on']}" if smoothing["chosen_on"] else ""
            common["smoothing"] = f"{smoothing_text(smoothing)}{tuned}"
        scores = {d: metrics["ccc"].get(d) for d in SCORES}
        return RunLine(
            name, "done", **common, split=str(metrics["split"]), epochs=metrics.get("epochs"), ccc=scores,
            ci95=metrics.get("ci95", {}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return RunLine(name, "damaged")
