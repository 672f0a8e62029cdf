"""The report of one or several runs: scores with intervals, learning curves, clips, the plane, configuration.

Charts are coordinates in the units stated here; the template draws them as inline SVG.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vaflow import __version__
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import UsageError, command, examples, explain
from vaflow.files import write_file
from vaflow.pages import render
from vaflow.timeline import Floats, isolated_rows
from vaflow.train.metrics import (
    DIMENSIONS,
    SCORES,
    concordance_of_moments,
    mean_over_dimensions,
    paired_difference,
    plain,
    resampled_ccc,
    shared_draws,
)
from vaflow.viewer.run_results import (
    BINS,
    EDGES,
    AttentionSummary,
    FusionStatistics,
    PlaneSums,
    ReportClip,
    RunResults,
    fusion_statistics,
    read_runs,
)

CURVES = {
    "loss_total": "Training loss",
    "val_ccc_valence": "Validation CCC of valence",
    "val_ccc_arousal": "Validation CCC of arousal",
    "val_ccc_mean": "Mean validation CCC",
}
SHOWN = 3  # best and worst clips
LABEL_MOMENTS = [0, 2, 4]  # of `video_moments`: count, sum y, sum yy


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
            {"name": title, "points": " ".join(points), "low": low, "high": high, "last": values[-1]}
            | {"epochs": len(values), "best": dot}
        )
    return curves


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


def attention_chart(summary: AttentionSummary) -> dict[str, Any]:
    """A plot of 420 by 160: a bar per time bin, the mean of the heads, a tick at uniform attention; and the facts."""
    mean = summary.shares.mean(axis=0)
    top = max(float(summary.shares.max()), float(summary.uniform.max()), 1e-6)
    width = 420 / len(mean)
    texts = [f"{edge:g}".replace("-", "\N{MINUS SIGN}") for edge in EDGES[1:-1]]
    labels = [f"< {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"> {texts[-1]}"]
    bars = [
        {"x": k * width, "width": width - 4, "height": 140 * float(share) / top, "share": float(share)}
        | {"uniform": 150 - 140 * float(even) / top, "label": label}
        | {"heads": [150 - 140 * float(x) / top for x in summary.shares[:, k]]}
        for k, (share, even, label) in enumerate(zip(mean, summary.uniform, labels, strict=True))
    ]
    return {"summary": summary, "bars": bars, "top": top}


def _path(values: Floats) -> str:
    """An SVG path of values in [-1, 1]; interrupted at NaN. A value between two NaN is a line of 2 units."""
    parts, pen = [], "M"
    isolated = set(isolated_rows(values))
    for i, value in enumerate(values):
        if not np.isfinite(value):
            pen = "M"
            continue
        parts.append(f"{pen}{300 * i / max(1, len(values) - 1):.1f} {25 - 24 * min(1, max(-1, value)):.1f}")
        parts += ["h2"] * (i in isolated)
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


def write_report(
    paths: Sequence[Path], out: Path, viewer: Path | None = None, *, gates: bool = False
) -> list[RunResults]:
    """Write one HTML file about finished runs; returns what it shows.

    Args:
        paths: run directories; differences are against the first.
        out: the file.
        viewer: directory of a written viewer (`vaflow view`) that clips link to.
        gates: run the models once more on their caches for the statistics of the fusion.

    Raises:
        UsageError: a directory is not a finished run.
        VaflowError: `out` cannot be written.
        CorruptError: a file of a run is damaged.
    """
    runs = read_runs(list(paths))
    index = None if viewer is None else viewer / "index.html"
    if index is not None and not index.is_file():
        remedy = command("view", paths[0], "--out", viewer)
        raise UsageError(explain(f"{viewer} is not a viewer", expected="index.html", remedy=remedy))
    link = None if index is None else quote(os.path.relpath(index, out.parent or ".").replace(os.sep, "/"))
    page = render(
        "report.html",
        scripts=("tables.js",),
        runs=[run_section(run, link, gates) for run in runs],
        names=[run.name for run in runs],
        paired=paired_differences(runs),
        settings=differing_settings(runs),
        clip_rows=_clips_side_by_side(runs) if len(runs) > 1 else [],
        demonstration=list(dict.fromkeys(name for run in runs for name in run.prediction_set.demonstration)),
        axis=score_axis(runs),
        regions=REGION_NAMES,
        version=__version__,
    )
    write_file(out, page)
    return runs


def paired_differences(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    """Each run minus the first on the same videos, with a paired bootstrap interval; `problem` where they differ."""
    rows: list[dict[str, Any]] = []
    for run in runs[1:]:
        first = runs[0]
        videos = sorted(set(first.moments) & set(run.moments))
        same = all(np.array_equal(first.moments[v][LABEL_MOMENTS], run.moments[v][LABEL_MOMENTS]) for v in videos)
        if len(videos) < 2 or set(first.moments) != set(run.moments) or not same:
            rows.append({"name": run.name, "problem": "the runs are not scored on the same labels"})
            continue
        one, other = (np.stack([r.moments[v] for v in videos])[None] for r in (run, first))
        draws = shared_draws(len(videos))
        observed = _with_mean(one) - _with_mean(other)
        comparison = paired_difference(resampled_ccc(one, draws), resampled_ccc(other, draws), observed, len(videos))
        values = zip(SCORES, comparison.difference, comparison.low, comparison.high, comparison.p, strict=True)
        scores = {name: tuple(map(plain, numbers)) for name, *numbers in values}
        rows.append({"name": run.name, "problem": "", "videos": len(videos), "scores": scores})
    return rows


def _with_mean(moments: Floats) -> Floats:
    """[1, V, 6, 2] -> [3]: concordance over all videos, and the mean of both dimensions."""
    ccc = concordance_of_moments(moments.sum(axis=1)[0])
    return np.append(ccc, mean_over_dimensions(ccc))


def differing_settings(runs: Sequence[RunResults]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the training settings and streams that differ."""
    tables = []
    for run in runs:
        streams = ", ".join(str(stream.get("name")) for stream in run.config.get("stream", ()))
        tables.append({**run.config.get("train", {}), "streams": streams})
    names = dict.fromkeys(name for table in tables for name in table)
    rows = []
    for name in names:
        values = [table.get(name, "-") for table in tables]
        rows.append((name, [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]))
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def run_section(run: RunResults, viewer: str | None, gates: bool) -> dict[str, Any]:
    """Return the data of one run for the template."""
    metrics, train = run.metrics, run.config.get("train", {})
    fusion = _fusion(run) if gates else None
    alone = ["none"] in [train.get(kind) for kind in ("visual", "audio")]
    ranked = sorted(run.clips, key=lambda clip: -clip.scores.ccc["mean"])
    rows = [_clip_row(clip, viewer) for clip in run.clips]
    frames, seconds = run.masked["frames"] or 0, run.masked["seconds"] or 0
    no_face = run.masked["no_face"]
    measures = {"ccc": "ccc", "within": "within_video_ccc", "rmse": "rmse", "pearson": "pearson"}
    return {
        "name": run.name,
        "path": str(run.path),
        "metrics": metrics,
        "scope": run.scope,
        "outdated": examples(run.outdated),
        "scores": [
            {"name": name, "ci95": metrics.get("ci95", {}).get(name) or [None, None]}
            | {kind: metrics.get(key, {}).get(name) for kind, key in measures.items()}
            for name in SCORES
        ],
        "curves": learning_curves(run),
        "clips": rows,
        "best": [_sketch(clip, viewer) for clip in ranked[:SHOWN]],
        "worst": [_sketch(clip, viewer) for clip in ranked[: -SHOWN - 1 : -1]] if len(ranked) > SHOWN else [],
        "histograms": [calibration(run.plane, k) for k in range(2)],
        "flow": shifts(run.plane),
        "regions": region_errors(run.plane),
        "gates": None if fusion is None else fusion.gates,
        "attention": () if fusion is None else [attention_chart(summary) for summary in fusion.attention],
        "coverage": coverage_rows(metrics),
        "fusion": "one modality" if alone else f"fusion {train.get('fusion', '')}",
        "masked": {
            "frames": int(frames),
            "unlabelled": (run.masked["unlabelled"] or 0) / frames if frames else None,
            "no_face": no_face / seconds if no_face is not None and seconds else None,
            "missing": metrics.get("missing", {}),
        },
        "provenance": _provenance(run),
        "config": run.text,
    }


def _fusion(run: RunResults) -> FusionStatistics:
    """Statistics of the fusion; empty where the run has none.

    Raises:
        UsageError: the cache of the predictions cannot be opened.
    """
    cache = run.prediction_set.open_cache()
    if cache is None:
        problem = f"--gates reads the cache of {run.path}, which cannot be opened"
        expected = f"a cache at {run.prediction_set.cache}" if run.prediction_set.cache else "a cache"
        raise UsageError(explain(problem, expected=expected, remedy="Move it back, or omit --gates"))
    return fusion_statistics(run.path, cache, str(run.metrics["split"]), run.prediction_set.centers)


def _clip_row(clip: ReportClip, viewer: str | None) -> dict[str, Any]:
    link = f"{viewer}#clip={quote(clip.clip.item, safe='')}" if viewer else None
    return {"item": clip.clip.item, "link": link, **vars(clip.scores)}


def _sketch(clip: ReportClip, viewer: str | None) -> dict[str, Any]:
    """A clip with SVG paths of prediction and label, per dimension, in boxes of 300 by 50."""
    paths = [[_path(clip.traces[source + k]) for source in (0, 2)] for k in range(2)]
    return {**_clip_row(clip, viewer), "paths": paths, "bands": [band(clip, k) for k in range(2)]}


def _clips_side_by_side(runs: Sequence[RunResults]) -> list[tuple[str, list[float | None]]]:
    """(clip, mean CCC in each run), the clips that differ most between runs first."""
    tables = [{clip.clip.item: clip.scores.ccc["mean"] for clip in run.clips} for run in runs]
    rows = [(item, [table.get(item) for table in tables]) for item in dict.fromkeys(i for t in tables for i in t)]
    known = [[x for x in values if x is not None] for _, values in rows]
    order = sorted(range(len(rows)), key=lambda i: min(known[i]) - max(known[i]))
    return [rows[i] for i in order]


def _provenance(run: RunResults) -> list[tuple[str, str]]:
    """Return (name, value) of the run's provenance."""
    data: Mapping[str, Any] = run.config.get("data", {})
    rows = [
        ("directory", str(run.path)),
        ("vaflow", str(run.config.get("vaflow", ""))),
        ("cache", str(run.config.get("cache", ""))),
        ("best epoch", f"{run.metrics.get('best_epoch', '-')} of {run.metrics.get('epochs', '-')}"),
    ]
    rows += [(f"stream {s.get('name')}", str(s.get("fingerprint", ""))) for s in run.config.get("stream", ())]
    return rows + [(f"split {name}", ", ".join(f"{v} {k}" for k, v in facts.items())) for name, facts in data.items()]
