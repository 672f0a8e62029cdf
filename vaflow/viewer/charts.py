"""Charts of the report as coordinates: the template draws them as inline SVG, in the units stated here."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vaflow.regions import REGION_NAMES
from vaflow.timeline import Floats
from vaflow.viewer.predictions import DIMENSIONS
from vaflow.viewer.run_results import BINS, PlaneSums, ReportClip, RunResults

if TYPE_CHECKING:
    from vaflow.viewer.attention import AttentionSummary

SCORES = (*DIMENSIONS, "mean")
CURVES = {
    "loss_total": "Training loss",
    "val_ccc_valence": "Validation CCC of valence",
    "val_ccc_arousal": "Validation CCC of arousal",
    "val_ccc_mean": "Mean validation CCC",
}


def plain(value: Any) -> float | None:
    """A number for JSON and templates; None for NaN."""
    return float(value) if np.isfinite(value) else None


def learning_curves(run: RunResults) -> list[dict[str, Any]]:
    """One small plot per column of the history, as points in a box of 300 by 120."""
    curves = []
    for name, title in CURVES.items():
        values = [row.get(name, float("nan")) for row in run.history]
        finite = [v for v in values if np.isfinite(v)]
        if not finite:
            continue
        low, high = min(finite), max(finite)
        span = (high - low) or 1.0
        points = [
            f"{40 + 250 * i / max(1, len(values) - 1):.1f},{110 - 100 * (v - low) / span:.1f}"
            for i, v in enumerate(values)
            if np.isfinite(v)
        ]
        best = run.metrics.get("best_epoch")
        dot = None
        if isinstance(best, int) and 1 <= best <= len(values) and np.isfinite(values[best - 1]):
            dot = (40 + 250 * (best - 1) / max(1, len(values) - 1), 110 - 100 * (values[best - 1] - low) / span)
        curves.append(
            {
                "name": title,
                "points": " ".join(points),
                "low": low,
                "high": high,
                "last": values[-1],
                "epochs": len(values),
                "best": dot,
            }
        )
    return curves


def sparklines(clip: ReportClip) -> list[list[str]]:
    """SVG paths of prediction and label, per dimension, in boxes of 300 by 50."""
    return [[_path(clip.traces[source + k]) for source in (0, 2)] for k in range(2)]


def band(clip: ReportClip, k: int) -> str:
    """SVG path around 1.96 standard deviations of dimension `k`, in a box of 300 by 50; empty without them."""
    if clip.std is None:
        return ""
    edges = [np.clip(clip.traces[k] + sign * 1.96 * clip.std[k], -1, 1) for sign in (1, -1)]
    last = max(1, len(edges[0]) - 1)
    upper, lower = ([f"{300 * i / last:.1f} {25 - 24 * y:.1f}" for i, y in enumerate(edge)] for edge in edges)
    return f"M{'L'.join([*upper, *lower[::-1]])}Z"


def coverage_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stated and observed coverage per level, and the points of a plot of 240 by 240; empty without intervals."""
    table = metrics.get("coverage") or {}
    rows = []
    for level in next(iter(table.values()), {}):
        observed = {name: table[name].get(level) for name in DIMENSIONS}
        points = {name: None if x is None else (2.4 * float(level), 240 - 240 * x) for name, x in observed.items()}
        rows.append({"level": level, "observed": observed, "points": points})
    return rows


def attention_chart(summary: "AttentionSummary") -> dict[str, Any]:
    """A plot of 420 by 160: a bar per time bin, the mean of the heads, a tick at uniform attention; and the facts."""
    mean = summary.shares.mean(axis=0)
    top = max(float(summary.shares.max()), float(summary.uniform.max()), 1e-6)
    width = 420 / len(mean)
    bars = [
        {"x": k * width, "width": width - 4, "height": 140 * float(share) / top, "share": float(share)}
        | {"uniform": 150 - 140 * float(even) / top, "label": label}
        | {"heads": [150 - 140 * float(x) / top for x in summary.shares[:, k]]}
        for k, (share, even, label) in enumerate(zip(mean, summary.uniform, _bins(summary.edges), strict=True))
    ]
    return {"summary": summary, "bars": bars, "top": top}


def _bins(edges: Floats) -> list[str]:
    """Names of bins whose first and last edges are infinite."""
    texts = [f"{edge:g}".replace("-", "\N{MINUS SIGN}") for edge in edges[1:-1]]
    return [f"< {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"> {texts[-1]}"]


def _path(values: Floats) -> str:
    """An SVG path of values in [-1, 1]; it is interrupted where there are none."""
    parts, pen = [], "M"
    for i, value in enumerate(values):
        if not np.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{300 * i / max(1, len(values) - 1):.1f} {25 - 24 * min(1, max(-1, value)):.1f}")
        pen = "L"
    return "".join(parts)


def calibration(plane: PlaneSums, k: int) -> dict[str, Any]:
    """Label against prediction: cells of a box of 240, and the mean label of each bin of predictions."""
    table = plane.histogram[k]
    top = table.max() or 1.0
    size = 240 / BINS
    cells = [
        {"x": i * size, "y": 240 - (j + 1) * size, "size": size, "share": float(np.sqrt(table[i, j] / top))}
        for i, j in zip(*np.nonzero(table), strict=True)
    ]
    middle = (np.arange(BINS) + 0.5) / BINS * 2 - 1
    count = table.sum(axis=0)
    mean = (table * middle[:, None]).sum(axis=0) / np.maximum(count, 1)
    enough = count >= max(10, 0.002 * count.sum())
    line = [
        f"{(m + 1) / 2 * 240:.1f},{240 - (p + 1) / 2 * 240:.1f}"
        for m, p, e in zip(mean, middle, enough, strict=True)
        if e
    ]
    return {"name": DIMENSIONS[k], "cells": cells, "line": " ".join(line), "size": size}


def shifts(plane: PlaneSums) -> list[dict[str, float]]:
    """Arrows in a box of 240 from the mean label to the mean prediction, per cell of the plane."""
    arrows = []
    for v, a in np.ndindex(5, 5):
        count, *sums = plane.flow[v, a]
        if count:
            x0, y0, x1, y1 = (float(s / count) for s in sums)
            place = {"x0": x0, "y0": -y0, "x1": x1, "y1": -y1}
            arrows.append({k: (value + 1) / 2 * 240 for k, value in place.items()} | {"frames": int(count)})
    return arrows


def region_errors(plane: PlaneSums) -> list[dict[str, Any]]:
    """Per region of the label: share of the frames, share of the predictions, RMSE and bias of both dimensions."""
    count, total = plane.region[:, 0], max(1.0, plane.region[:, 0].sum())
    rows = []
    for r, name in enumerate(REGION_NAMES):
        n = count[r] or np.nan
        squared, error = plane.region[r, 1:3] / n, plane.region[r, 3:] / n
        shares = {"labels": count[r] / total, "predictions": plane.predicted[r] / total}
        errors = {"rmse": [plain(x) for x in np.sqrt(squared)], "bias": [plain(x) for x in error]}
        rows.append({"name": name, "frames": int(count[r]), **shares, **errors})
    return rows


def score_axis(runs: Sequence[RunResults]) -> dict[str, Any]:
    """Limits and ticks of the plot of scores: all intervals, widened to tenths."""
    edges: list[float] = []
    for run in runs:
        for name in SCORES:
            values: Iterable[float | None] = (run.metrics["ccc"].get(name), *run.metrics.get("ci95", {}).get(name, ()))
            edges += [value for value in values if value is not None]
    low, high = (min(edges), max(edges)) if edges else (0.0, 1.0)
    low, high = float(np.floor(low * 10) / 10), float(np.ceil(high * 10) / 10)
    high = max(high, low + 0.1)
    ticks = round((high - low) * 10)
    step = max(1, -(-ticks // 8))
    return {"low": low, "high": high, "ticks": [low + k / 10 for k in range(0, ticks + 1, step)]}
