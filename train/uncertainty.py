"""Standard deviations of predictions: calibration, and coverage of the intervals that they give.

The interval at level p is the prediction +- z_p standard deviations, with z_p of the Gaussian. A calibration is one
factor per dimension on the standard deviations. It is chosen so that the intervals cover the labels of a validation
split as often as they state. Every source video has the same weight: videos are exchangeable, their frames are not.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from vaflow.errors import CorruptError, explain
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.evaluate import Trace
from vaflow.train.metrics import DIMENSIONS

FILE = "uncertainty.json"
LEVELS = (50, 80, 95)  # percent
WIDTHS = {level: NormalDist().inv_cdf(0.5 + level / 200) for level in LEVELS}  # in standard deviations
SMALLEST = 1e-4  # standard deviation
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
        return trace if trace.std is None else replace(trace, std=np.maximum(trace.std * self.factors, SMALLEST))


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
        split: its name.
        smoothing: kind and seconds of the traces' smoothing, if any.
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
    path = folder / FILE
    try:
        calibration = Calibration(**json.loads(path.read_text("utf-8")))
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
    write_file(folder / FILE, json.dumps(asdict(calibration), indent=2) + "\n")
