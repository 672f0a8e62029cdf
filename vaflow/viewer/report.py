"""The report of one or several runs: scores with intervals, learning curves, clips, the plane, configuration."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from vaflow import __version__
from vaflow.errors import UsageError, explain
from vaflow.files import make_folder, replace_file
from vaflow.pages import render
from vaflow.regions import REGION_NAMES
from vaflow.timeline import Floats
from vaflow.train.ablate.statistics import compare, draw, resampled_ccc
from vaflow.train.metrics import concordance_of_moments, mean_over_dimensions
from vaflow.viewer.charts import (
    SCORES,
    attention_chart,
    band,
    calibration,
    coverage_rows,
    learning_curves,
    plain,
    region_errors,
    score_axis,
    shifts,
    sparklines,
)
from vaflow.viewer.run_results import ReportClip, RunResults, read_runs

if TYPE_CHECKING:
    from vaflow.viewer.gates import FusionStatistics

SHOWN = 3  # best and worst clips


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
        UsageError: a directory is not a finished run, or `out` cannot be written.
        CorruptError: a file of a run is damaged.
    """
    runs = read_runs(list(paths))
    index = None if viewer is None else viewer / "index.html"
    if index is not None and not index.is_file():
        raise UsageError(
            explain(f"{viewer} is not a viewer", expected="index.html", remedy=f"vaflow view {paths[0]} --out {viewer}")
        )
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
    try:
        make_folder(out.parent)
        replace_file(out, page.encode())
    except OSError as error:
        raise UsageError(explain(f"Cannot write the report {out}", got=error.strerror)) from error
    return runs


def paired_differences(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    """Each run minus the first on the same videos, with a paired bootstrap interval; `problem` where they differ."""
    rows: list[dict[str, Any]] = []
    for run in runs[1:]:
        first = runs[0]
        videos = sorted(set(first.moments) & set(run.moments))
        same = all(np.array_equal(first.moments[v][0], run.moments[v][0]) for v in videos)  # labelled frames
        if len(videos) < 2 or set(first.moments) != set(run.moments) or not same:
            rows.append({"name": run.name, "problem": "the runs are not scored on the same labelled frames"})
            continue
        one, other = (np.stack([r.moments[v] for v in videos])[None] for r in (run, first))
        draws = draw(len(videos))
        observed = _with_mean(one) - _with_mean(other)
        comparison = compare(resampled_ccc(one, draws), resampled_ccc(other, draws), observed, len(videos))
        values = zip(SCORES, comparison.difference, comparison.low, comparison.high, comparison.p, strict=True)
        scores = {name: tuple(map(plain, numbers)) for name, *numbers in values}
        rows.append({"name": run.name, "problem": "", "videos": len(videos), "scores": scores})
    return rows


def _with_mean(moments: Floats) -> Floats:
    """[1, V, 6, 2] -> [3]: concordance over all videos, and the mean of both dimensions."""
    ccc = concordance_of_moments(moments.sum(axis=1)[0])
    return np.append(ccc, mean_over_dimensions(ccc))


def differing_settings(runs: Sequence[RunResults]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the training settings and streams that are not the same in all."""
    tables = []
    for run in runs:
        streams = ", ".join(str(stream.get("name")) for stream in run.config.get("stream", ()))
        tables.append({**run.config.get("train", {}), "streams": streams})
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [(name, [_setting(table.get(name, "-")) for table in tables]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def run_section(run: RunResults, viewer: str | None, gates: bool) -> dict[str, Any]:
    """Everything that the template shows of one run."""
    metrics = run.metrics
    fusion = _fusion(run) if gates else None
    ranked = sorted(run.clips, key=lambda clip: -clip.scores.ccc["mean"])
    rows = [_clip_row(clip, viewer) for clip in run.clips]
    frames, seconds = run.masked["frames"] or 0, run.masked["seconds"] or 0
    no_face = run.masked["no_face"]
    return {
        "name": run.name,
        "path": str(run.path),
        "metrics": metrics,
        "scores": [
            {
                "name": name,
                "ccc": metrics["ccc"].get(name),
                "ci95": metrics.get("ci95", {}).get(name) or [None, None],
                "within": metrics.get("within_video_ccc", {}).get(name),
                "rmse": metrics.get("rmse", {}).get(name),
                "pearson": metrics.get("pearson", {}).get(name),
            }
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
        "fusion": str(run.config.get("train", {}).get("fusion", "")),
        "masked": {
            "frames": int(frames),
            "unlabelled": (run.masked["unlabelled"] or 0) / frames if frames else None,
            "no_face": no_face / seconds if no_face is not None and seconds else None,
            "missing": metrics.get("missing", {}),
        },
        "provenance": _provenance(run),
        "config": run.text,
    }


def _fusion(run: RunResults) -> "FusionStatistics":
    """Statistics of the fusion; empty where the run has none or its cache is gone."""
    from vaflow.viewer.gates import FusionStatistics, fusion_statistics  # imports torch

    cache = run.prediction_set.open_cache()
    if cache is None:
        return FusionStatistics()
    return fusion_statistics(run.path, cache, str(run.metrics["split"]), run.prediction_set.centers)


def _clip_row(clip: ReportClip, viewer: str | None) -> dict[str, Any]:
    link = f"{viewer}#clip={quote(clip.clip.item, safe='')}" if viewer else None
    return {"item": clip.clip.item, "link": link, **vars(clip.scores)}


def _sketch(clip: ReportClip, viewer: str | None) -> dict[str, Any]:
    return {**_clip_row(clip, viewer), "paths": sparklines(clip), "bands": [band(clip, k) for k in range(2)]}


def _clips_side_by_side(runs: Sequence[RunResults]) -> list[tuple[str, list[float | None]]]:
    """(clip, mean CCC in each run), the clips that differ most between runs first."""
    tables = [{clip.clip.item: clip.scores.ccc["mean"] for clip in run.clips} for run in runs]
    rows = [(item, [table.get(item) for table in tables]) for item in dict.fromkeys(i for t in tables for i in t)]
    known = [[x for x in values if x is not None] for _, values in rows]
    order = sorted(range(len(rows)), key=lambda i: min(known[i]) - max(known[i]))
    return [rows[i] for i in order]


def _provenance(run: RunResults) -> list[tuple[str, str]]:
    """(name, value) of what the run was made from."""
    data: Mapping[str, Any] = run.config.get("data", {})
    rows = [
        ("directory", str(run.path)),
        ("vaflow", str(run.config.get("vaflow", ""))),
        ("cache", str(run.config.get("cache", ""))),
        ("best epoch", f"{run.metrics.get('best_epoch', '-')} of {run.metrics.get('epochs', '-')}"),
    ]
    rows += [(f"stream {s.get('name')}", str(s.get("fingerprint", ""))) for s in run.config.get("stream", ())]
    return rows + [(f"split {name}", ", ".join(f"{v} {k}" for k, v in facts.items())) for name, facts in data.items()]
