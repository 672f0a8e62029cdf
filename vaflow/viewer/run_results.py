"""Results of a finished run on a split: its files, sums over its prediction tables, and its use of audio.

The use of audio is the gate's share of audio in the fused features, by condition, and the distribution of attention in
time. It is measured by predicting the split again, which imports torch. Attention is summed per bin of time, so that
memory does not grow with the split.
"""

import csv
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaflow.cache import Cache
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import CorruptError, UsageError, command, explain
from vaflow.files import read_text
from vaflow.timeline import Bools, Floats
from vaflow.train.metrics import DIMENSIONS, concordance_of_moments, region_of, scope, video_moments
from vaflow.viewer import PredictedClip, PredictionSet, find_predictions, outdated_clips, read_predictions
from vaflow.viewer.clip_data import ClipScores, masks_of, scores_of

if TYPE_CHECKING:
    from vaflow.train.heads import VAModel
    from vaflow.train.heads.fusion import Track
    from vaflow.train.windows import WindowSet

# Seconds from a frame to an audio step, edges of the bins; negative: the step is earlier.
EDGES = np.array([-np.inf, -8, -4, -2, -1, -0.5, 0.5, 1, 2, 4, 8, np.inf])
NEAR = 1.0  # seconds
BINS = 24  # of a dimension's histogram
SPARK = 160  # points of a small plot of a clip
_CCC_TOLERANCE = 1e-3  # predictions on disk have six digits


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
        outdated: clips whose records in the cache are no longer those that were scored, or that left or joined the
            split.
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
        history = read_history(path / "history.csv")
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
    outdated = () if cache is None else outdated_clips(of_split, split, cache, cache.record)
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
        return read_text(path)
    except ValueError as error:
        raise CorruptError(explain(f"Cannot read the run {run}", got=f"{path.name}: {error}")) from error
    except OSError as error:
        from vaflow.train.run_folder import refuse_ensemble  # imports torch

        refuse_ensemble(run)
        expected = "a directory written by `vaflow train`"
        got = f"no {path.name}" if run.is_dir() else "no such directory"
        remedy = f"List the finished runs: {command('runs', run.parent)}"
        raise UsageError(explain(f"{run} is not a finished run", expected=expected, got=got, remedy=remedy)) from error


def read_history(path: Path) -> tuple[Mapping[str, float], ...]:
    """The rows of `history.csv`, NaN for empty cells; none without the file."""
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
class AttentionSummary:
    """Mean attention of the frames to one audio stream; shares are of the attention mass.

    Attributes:
        stream: name of the audio stream.
        frames: counted; a frame of several windows counts in each.
        shares: [H, B] per head and time bin; uniform: [B] if every step were attended alike.
        near, before, after: share within `NEAR` seconds, before and after the frame (beyond `NEAR`), mean of the heads.
        distance: mean seconds between frame and step.
        entropy: mean entropy divided by that of attending every step alike, per head [H]; 1: uniform, 0: one step.
        masked: share on steps without audio.
        no_face: `near` of the frames without a face; None where every frame has one.
    """

    stream: str
    frames: int
    shares: Floats
    uniform: Floats
    near: float
    before: float
    after: float
    distance: float
    entropy: Floats
    masked: float
    no_face: float | None = None


class AttentionSums:
    """Sums over the frames of one audio stream; `mass` is [H, B], `uniform` [B], `entropy` [H]."""

    def __init__(self, heads: int) -> None:
        bins = len(EDGES) - 1
        self.mass, self.uniform, self.entropy = np.zeros((heads, bins)), np.zeros(bins), np.zeros(heads)
        self.near, self.faceless = np.zeros(3), np.zeros(2)  # before, near, after; mass near, frames
        self.distance = self.masked = 0.0
        self.frames = 0

    def add(self, weights: Floats, time: Floats, track: "Track", counted: Bools, face: Bools) -> None:
        """Add windows: weights [B, H, F, S], time [B, F] of the frames, counted and face [B, F]."""
        window, frame = np.nonzero(counted & track.present.numpy()[:, None])
        if not len(window):
            return
        w = weights.swapaxes(1, 2)[window, frame].astype(np.float64)  # [N, H, S]
        key, inside = track.key.numpy()[window], track.inside.numpy()[window]
        offset = track.time.numpy()[window].astype(np.float64) - time[window, frame, None]  # [N, S]
        in_bin = np.eye(len(EDGES) - 1)[np.searchsorted(EDGES[1:-1], offset)] * inside[..., None]
        self.mass += np.einsum("nhs,nsb->hb", w, in_bin)
        steps = key.sum(axis=1, keepdims=True)
        self.uniform += np.einsum("ns,nsb->b", key / steps, in_bin)
        entropy = -(w * np.log(np.where(w > 0, w, 1))).sum(axis=-1)
        self.entropy += (entropy / np.log(np.maximum(steps, 2))).sum(axis=0)
        mean = w.mean(axis=1)
        sides = [offset < -NEAR, np.abs(offset) <= NEAR, offset > NEAR]
        self.near += [(mean * side).sum() for side in sides]
        self.distance += float((mean * np.abs(offset) * inside).sum())
        self.masked += float((mean * ~key).sum())
        self.frames += len(window)
        faceless = ~face[window, frame]
        self.faceless += [(mean * sides[1])[faceless].sum(), faceless.sum()]

    def summary(self, stream: str) -> AttentionSummary:
        """Means over the frames; at least one was added."""
        n = self.frames
        before, near, after = (self.near / n).tolist()
        no_face = float(self.faceless[0] / self.faceless[1]) if self.faceless[1] else None
        means = self.mass / n, self.uniform / n, near, before, after, self.distance / n, self.entropy / n
        return AttentionSummary(stream, n, *means, self.masked / n, no_face)


class AttentionRecorder:
    """Sums the attention of a fusion while its model predicts, as forward pre-hooks of the model and of the fusion."""

    def __init__(self, model: "VAModel") -> None:
        self.visual = [s.name for s in model.streams if s.kind == "visual"]
        attends: Any = model.fusion and model.fusion.attends
        audio = [s.name for s in model.streams if s.kind != "visual"]
        self.attends: dict[str, Any] = dict(zip(audio, attends, strict=True)) if attends else {}
        self.sums = {name: AttentionSums(attend.attention.num_heads) for name, attend in self.attends.items()}

    def model_hook(self, model: Any, arguments: tuple[Any, ...]) -> None:
        """Store which frames the batch has, and which have a visual input."""
        (batch,) = arguments
        self.inside = batch.inside.numpy()
        self.face = np.any([batch.valid[name].numpy() for name in self.visual], axis=0) & self.inside

    def fusion_hook(self, fusion: Any, arguments: tuple[Any, ...]) -> None:
        """Attend once more with weights, and add them."""
        visual, time, audio = arguments
        query, keys = fusion.attention_inputs(visual, time, audio)
        for (name, attend), key, track in zip(self.attends.items(), keys, audio, strict=True):
            ignored = ~track.key & track.present.unsqueeze(1)
            _, weights = attend.attention(
                query, key, track.value, key_padding_mask=ignored, need_weights=True, average_attn_weights=False
            )
            self.sums[name].add(weights.numpy(), time.numpy(), track, self.inside, self.face)


@dataclass(frozen=True)
class GateShare:
    """Mean and 10th to 90th percentile of the gate over the frames of one condition."""

    condition: str
    frames: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FusionStatistics:
    """Statistics of a run's fusion on a split.

    Attributes:
        gates: the gate's mean over the features, at every frame with audio, by condition: 1 means that the fused
            features are the audio's, 0 the visual ones. Empty for runs without a gate.
        attention: per audio stream; empty for runs without cross-modal attention.
    """

    gates: tuple[GateShare, ...] = ()
    attention: tuple[AttentionSummary, ...] = ()


def fusion_statistics(run: Path, cache: Cache, split: str, centers: float) -> FusionStatistics:
    """Predict a split once more and return how its fusion uses the audio.

    Empty for runs without a fusion or with encoders of their own.

    Raises:
        VaflowError: the run or the cache cannot be read.
    """
    from vaflow.train.data import load_windows
    from vaflow.train.folds import split_items
    from vaflow.train.run_folder import load_run
    from vaflow.train.traces import predict_windows

    loaded = load_run(run)
    fusion, config = loaded.model.fusion, loaded.record.config
    if fusion is None or loaded.record.tuned:
        return FusionStatistics()
    items = split_items(cache, split, config.fold_splits, config.fold_groups)
    windows = load_windows(cache, items, loaded.record.head_streams, config)
    shares: list[Floats] = []
    if fusion.gate is not None:
        fusion.gate.register_forward_hook(lambda _, __, gate: shares.append(gate.sigmoid().mean(dim=-1).numpy()))
    recorder = AttentionRecorder(loaded.model)
    if recorder.attends:
        loaded.model.register_forward_pre_hook(recorder.model_hook)
        fusion.register_forward_pre_hook(recorder.fusion_hook)
    predict_windows(loaded.model, windows)
    gates = gate_shares(windows, np.concatenate(shares)[..., None].astype(np.float64), centers) if shares else []
    attention = [sums.summary(name) for name, sums in recorder.sums.items() if sums.frames]
    return FusionStatistics(tuple(gates), tuple(attention))


def gate_shares(windows: "WindowSet", gate: Floats, centers: float) -> list[GateShare]:
    """Summarize the gate of every window, [W, F, 1], by condition."""
    from vaflow.train.traces import input_at_frames, stitch

    values, faces, regions = [], [], []
    for clip in windows.clips:
        rows = slice(clip.first, clip.last)
        inside = windows.inside_array[rows]
        has_audio = input_at_frames(windows, clip, "audio")
        if not inside.any() or not has_audio.any():
            continue
        values.append(stitch(windows.sample_time[rows], gate[rows], inside, clip.time)[has_audio, 0])
        faces.append(input_at_frames(windows, clip, "visual")[has_audio])
        labelled = clip.valid.all(axis=1)
        regions.append(np.where(labelled, region_of(np.nan_to_num(clip.value), centers), -1)[has_audio])
    if not values:
        return []
    value, face, region = (np.concatenate(x) for x in (values, faces, regions))
    conditions: list[tuple[str, Bools]] = [("all frames with audio", np.ones(len(value), bool))]
    conditions += [("with a face", face), ("without a face", ~face)]
    conditions += [(f"label: {name}", region == r) for r, name in enumerate(REGION_NAMES)]
    known = [(name, value[mask]) for name, mask in conditions if mask.any()]
    return [GateShare(n, len(x), float(x.mean()), *map(float, np.quantile(x, (0.1, 0.9)))) for n, x in known]
