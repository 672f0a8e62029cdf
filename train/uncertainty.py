"""Uncertainty of predictions: calibrated standard deviations, and frames far from the features of the training split.

The interval at level p is the prediction +- z_p standard deviations, with z_p of the Gaussian. A calibration is one
factor per dimension on the standard deviations. It is chosen so that the intervals cover the labels of a validation
split as often as they state. Every source video has the same weight: videos are exchangeable, their frames are not.

Per stream, a Gaussian is fitted to the features of the training windows: the covariance along the `AXES` directions of
largest variance, and one variance for all others (probabilistic PCA). The distance is the Mahalanobis distance divided
by the square root of the number of dimensions. A frame is far if one of its features is farther than `QUANTILE` of
those of the validation split. Source: Tipping and Bishop, J. R. Stat. Soc. B 61 (1999) 611; Lee et al. 2018,
arXiv 1807.03888.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaflow.errors import CorruptError, explain
from vaflow.files import read_tensors, read_text, write_file, write_tensors
from vaflow.timeline import Floats
from vaflow.train.batch import AUDIO, VISUAL, StreamSpec
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.traces import Trace, at_frames
from vaflow.train.windows import StreamTable, WindowSet

CALIBRATION, TRAINING_FEATURES = "uncertainty.json", "training_features.safetensors"  # files of a run
LEVELS = (50, 80, 95)  # percent
WIDTHS = {level: NormalDist().inv_cdf(0.5 + level / 200) for level in LEVELS}  # in standard deviations
SMALLEST = 1e-4  # standard deviation
AXES = 32  # of the Gaussian of a stream's features
QUANTILE = 0.99
LARGEST = 20_000  # rows of a stream that are fitted, evenly spaced
_CHUNK = 16_384
_PARTS = ("mean", "axes", "deviation", "rest", "threshold")
_STEPS = np.geomspace(1 / 30, 30, 1400)  # candidate factors relative to the median one: half a percent apart


@dataclass(frozen=True)
class Calibration:
    """Contents of `uncertainty.json`.

    Attributes:
        scale: dimension -> factor of the standard deviations; None where the split has no labels.
        split: that the factors were chosen on; videos: how many it has.
        smoothing: of the calibrated traces (`kind`, `seconds`); empty: none.
    """

    scale: Mapping[str, float | None]
    split: str
    videos: int
    smoothing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def factors(self) -> Floats:
        """[2], 1 where a dimension is not calibrated."""
        return np.array([1.0 if self.scale[name] is None else self.scale[name] for name in DIMENSIONS], np.float64)

    def apply(self, trace: Trace) -> Trace:
        """The trace with calibrated standard deviations, if it has any."""
        if trace.std is None:
            return trace
        std = np.maximum(trace.std, SMALLEST) * self.factors  # the factors were chosen for this minimum
        return replace(trace, std=np.maximum(std, SMALLEST))


@dataclass(frozen=True)
class VideoErrors:
    """Labelled frames of one source video in one dimension: errors and standard deviations, [N] each."""

    error: Floats
    std: Floats


def errors_by_video(traces: Iterable[Trace], k: int) -> list[VideoErrors]:
    """The labelled frames of dimension `k` of every source video that has some; traces have standard deviations."""
    parts: dict[str, list[tuple[Floats, Floats]]] = {}
    for trace in traces:
        valid = trace.clip.valid[:, k]
        if valid.any() and trace.std is not None:
            error = (trace.va - trace.clip.value)[valid, k]
            parts.setdefault(trace.clip.group, []).append((error, np.maximum(trace.std[valid, k], SMALLEST)))
    return [VideoErrors(*(np.concatenate(column) for column in zip(*rows, strict=True))) for rows in parts.values()]


def coverage_of(videos: Sequence[VideoErrors], scale: float | Sequence[float] = 1.0) -> dict[str, float | None]:
    """Level -> share of the labels within the interval, the mean over videos; None without labels.

    `scale` is a factor of the standard deviations, or one per video.
    """
    scales = np.broadcast_to(np.asarray(scale, np.float64), len(videos))
    pairs = list(zip(videos, scales, strict=True))
    return {
        str(level): float(np.mean([(np.abs(v.error) <= width * s * v.std).mean() for v, s in pairs])) if pairs else None
        for level, width in WIDTHS.items()
    }


@dataclass(frozen=True)
class ScaleSearch:
    """Coverage of every video at candidate factors, from which a factor for any set of videos follows.

    Attributes:
        candidates: [C] factors, ascending.
        covered: [V, L, C] share of each video's labels within the interval of each level.
    """

    candidates: Floats
    covered: Floats

    @classmethod
    def of(cls, videos: Sequence[VideoErrors]) -> "ScaleSearch":
        """The table for some videos, at least one."""
        ratios = [np.sort(np.abs(video.error) / video.std) for video in videos]
        middle = float(np.median([np.median(ratio) for ratio in ratios])) / WIDTHS[50]
        candidates = max(middle, 1e-3) * _STEPS
        edges = np.array(list(WIDTHS.values()))[:, None] * candidates
        return cls(candidates, np.stack([np.searchsorted(r, edges, side="right") / len(r) for r in ratios]))

    def best(self, left_out: int | None = None) -> float:
        """The factor whose coverage over the videos is nearest to the levels, in squares; without video `left_out`."""
        total = self.covered.sum(axis=0) - (0 if left_out is None else self.covered[left_out])
        count = len(self.covered) - (left_out is not None)
        distance = np.square(total / count - np.array(LEVELS)[:, None] / 100).sum(axis=0)
        nearest = np.flatnonzero(distance <= distance.min() + 1e-12)
        return float(self.candidates[nearest[len(nearest) // 2]])


def calibrate(traces: Sequence[Trace], split: str, smoothing: Mapping[str, Any] | None = None) -> Calibration:
    """Choose the factors on the labelled frames of a split.

    Args:
        traces: with standard deviations that are not calibrated.
    """
    by_dimension = [errors_by_video(traces, k) for k in range(2)]
    scale = {n: ScaleSearch.of(v).best() if v else None for n, v in zip(DIMENSIONS, by_dimension, strict=True)}
    return Calibration(scale, split, max(map(len, by_dimension)), dict(smoothing or {}))


def uncertainty_report(traces: Sequence[Trace], split: str, calibrated_on: str) -> dict[str, Any]:
    """`coverage` and `uncertainty` of `metrics.json` for traces with calibrated standard deviations; empty without.

    On the split of the calibration, the intervals of each video are calibrated on the other videos, so that no label
    is covered by an interval that it helped to choose; with one video there is no coverage.

    Returns:
        coverage: dimension -> level -> share. uncertainty: `calibrated_on`, `held_out`, and per dimension `mean_std`,
        `nll` (mean negative log-likelihood of the labels) and `nll_constant` (the same with one standard deviation for
        all frames, their root mean squared error).
    """
    if not any(trace.std is not None for trace in traces):
        return {}
    same = split == calibrated_on
    held_out = "each video is calibrated on the others" if same else f"calibrated on split {calibrated_on}"
    coverage: dict[str, dict[str, float | None]] = {}
    facts: dict[str, dict[str, float | None]] = {"mean_std": {}, "nll": {}, "nll_constant": {}}
    for k, name in enumerate(DIMENSIONS):
        videos = errors_by_video(traces, k)
        if same and len(videos) > 1:
            search = ScaleSearch.of(videos)
            coverage[name] = coverage_of(videos, [search.best(left_out=v) for v in range(len(videos))])
        else:
            coverage[name] = coverage_of(() if same else videos)
        error = np.concatenate([v.error for v in videos]) if videos else np.zeros(0)
        std = np.concatenate([v.std for v in videos]) if videos else np.zeros(0)
        facts["mean_std"][name] = float(std.mean()) if len(std) else None
        constant = np.full(len(std), max(SMALLEST, float(np.sqrt(np.mean(error**2))))) if len(std) else std
        facts["nll"][name], facts["nll_constant"][name] = likelihood(error, std), likelihood(error, constant)
    return {"coverage": coverage, "uncertainty": {"calibrated_on": calibrated_on, "held_out": held_out, **facts}}


def likelihood(error: Floats, std: Floats) -> float | None:
    """Mean negative log-likelihood of errors under Gaussians of these standard deviations, [N] each."""
    if not len(error):
        return None
    return float(np.mean(np.log(std) + 0.5 * np.square(error / std)) + 0.5 * np.log(2 * np.pi))


def calibrated(traces: Iterable[Trace], calibration: Calibration | None) -> Iterator[Trace]:
    """Every trace with calibrated standard deviations, or with none if `calibration` is None."""
    for trace in traces:
        yield replace(trace, std=None) if calibration is None else calibration.apply(trace)


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration stored with a run or an ensemble; None where there is none.

    Raises:
        CorruptError: the file is damaged.
    """
    path = folder / CALIBRATION
    try:
        calibration = Calibration(**json.loads(read_text(path)))
        factors = calibration.factors
        if not (np.isfinite(factors).all() and (factors > 0).all() and isinstance(calibration.smoothing, dict)):
            raise ValueError("a factor is not a positive number")
        return calibration
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptError(explain(f"{path} cannot be read", got=error)) from error


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Store the calibration with a run or an ensemble."""
    write_file(folder / CALIBRATION, json.dumps(asdict(calibration), indent=2) + "\n")


@dataclass(frozen=True)
class FeatureGaussian:
    """The features of one stream in the training split.

    Attributes:
        mean: [D]. axes: [D, A], orthonormal. deviation: [A] along the axes; rest: [1] in every other direction.
        threshold: [1] distance beyond which a feature is far.
    """

    mean: Tensor
    axes: Tensor
    deviation: Tensor
    rest: Tensor
    threshold: Tensor

    @classmethod
    def fit(cls, rows: Tensor) -> "FeatureGaussian":
        """Fit rows [N, D]; the threshold is infinite."""
        x = rows.double()
        mean = x.mean(dim=0)
        x = x - mean
        variance, axes = torch.linalg.eigh(x.T @ x / max(1, len(x) - 1))
        count = min(AXES, len(variance))
        total = variance.clamp(min=0).sum()
        floor = 1e-8 * total / len(variance) + 1e-12
        kept, others = variance[-count:].clamp(min=floor), variance[:-count]
        rest = others.mean().clamp(min=floor) if len(others) else kept.min()
        deviations = kept.sqrt().float(), rest.sqrt().float()[None]
        return cls(mean.float(), axes[:, -count:].float().contiguous(), *deviations, torch.full((1,), torch.inf))

    def distance(self, rows: Tensor) -> Tensor:
        """[N, D] -> [N]."""
        x = rows.float() - self.mean
        along = x @ self.axes
        squares = (along / self.deviation).square().sum(dim=1)
        if self.axes.shape[1] < self.axes.shape[0]:
            beyond = (x.square().sum(dim=1) - along.square().sum(dim=1)).clamp(min=0)
            squares = squares + beyond / self.rest.square()
        return (squares / len(self.mean)).sqrt()


@dataclass(frozen=True)
class TrainingFeatures:
    """Content of `training_features.safetensors`: stream name -> its Gaussian."""

    streams: Mapping[str, FeatureGaussian]

    @classmethod
    def fit(cls, train: WindowSet, val: WindowSet) -> "TrainingFeatures":
        """Fit the training split; the thresholds are quantiles of the validation split's distances."""
        streams = {}
        for spec in train.streams:
            table = train.tables[spec.name]
            used = torch.unique(table.index).cpu().long()
            used = used[used > 0]  # row 0 stands for missing input
            if len(used) < 2:
                continue
            used = used[torch.linspace(0, len(used) - 1, min(LARGEST, len(used))).long()]
            gaussian = FeatureGaussian.fit(table.rows.index_select(0, used.to(table.rows.device)).cpu())
            distances = step_distances(gaussian, spec, val.tables[spec.name], slice(None))
            known = distances[np.isfinite(distances)]
            if len(known):
                edge = torch.tensor([np.quantile(known, QUANTILE)], dtype=torch.float32)
                streams[spec.name] = replace(gaussian, threshold=edge)
        return cls(streams)

    def mark(self, windows: WindowSet, traces: Iterable[Trace]) -> Iterator[Trace]:
        """Every trace with its frames that are far from the training features."""
        known = [spec for spec in windows.streams if spec.name in self.streams]
        for trace in traces:
            clip = trace.clip
            far = np.zeros(len(clip.time), bool)
            for kind in (VISUAL, AUDIO):
                flags = []
                for spec in (spec for spec in known if spec.kind == kind):
                    gaussian, rows = self.streams[spec.name], slice(clip.first, clip.last)
                    distances = step_distances(gaussian, spec, windows.tables[spec.name], rows)
                    flags.append(np.nan_to_num(distances, nan=0.0) > float(gaussian.threshold))
                instants, flagged = windows.flagged(clip, flags)
                if flags and len(instants):
                    far |= at_frames(clip, kind, instants, flagged)
            yield replace(trace, far=far) if known else trace

    def write(self, folder: Path) -> None:
        """Write the file into a run's folder."""
        tensors = {f"{name}/{part}": getattr(g, part) for name, g in self.streams.items() for part in _PARTS}
        write_tensors(folder / TRAINING_FEATURES, tensors)


def read_training_features(folder: Path) -> TrainingFeatures | None:
    """The file of a run; None where there is none.

    Raises:
        CorruptError: the file is damaged.
    """
    path = folder / TRAINING_FEATURES
    if not path.is_file():
        return None
    streams: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path)[0].items():
        name, _, part = key.rpartition("/")
        streams.setdefault(name, {})[part] = tensor
    for parts in streams.values():
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        dim, axes = shapes.get("axes", (0,)) if len(shapes.get("axes", ())) == 2 else (0, 0)
        expected = {"mean": (dim,), "axes": (dim, axes), "deviation": (axes,), "rest": (1,), "threshold": (1,)}
        if not dim or shapes != expected:
            raise CorruptError(explain(f"{path} does not describe the training features", got=shapes))
    return TrainingFeatures({name: FeatureGaussian(**parts) for name, parts in streams.items()})


def step_distances(gaussian: FeatureGaussian, spec: StreamSpec, table: StreamTable, windows: slice) -> Floats:
    """Distances of the features of some windows, [W, S]; of a spectrogram the mean of each step; NaN where missing."""
    index = table.index[windows].cpu().long()
    used, place = torch.unique(index, return_inverse=True)
    parts = [gaussian.distance(table.rows.index_select(0, r.to(table.rows.device)).cpu()) for r in used.split(_CHUNK)]
    distance = torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
    distance[used == 0] = torch.nan  # row 0 stands for missing input
    steps: Floats = distance[place].numpy()
    if spec.frames_per_step:
        frames = steps.reshape(len(steps), -1, spec.frames_per_step)
        known = np.isfinite(frames)
        total = np.where(known, frames, 0).sum(axis=-1)
        steps = np.where(known.any(axis=-1), total / np.maximum(known.sum(axis=-1), 1), np.nan)
    return steps
