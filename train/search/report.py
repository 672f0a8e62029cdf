"""Files of a search: `trials.csv`, `search.json`, `best.toml`, and the page `search.html`."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vaflow.cache import Cache
from vaflow.encoders import random_encoders
from vaflow.files import write_file
from vaflow.pages import render
from vaflow.train.inputs import resolve
from vaflow.train.search.trials import DONE, FAILED, STOPPED, SearchOptions, SearchResult, Space, Trial, importances
from vaflow.train.settings_files import to_toml

RESULT = "search.json"
WIDTH, HEIGHT = 860, 260  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40


def write_results(
    cache: Cache,
    space: Space,
    out: Path,
    options: SearchOptions,
    trials: Sequence[Trial],
    best: Trial | None,
    holdout: Mapping[str, tuple[float, ...]],
) -> SearchResult:
    """Write all files of a search; returns its result."""
    files = {"csv": out / "trials.csv", "json": out / RESULT, "html": out / "search.html"}
    write_file(files["csv"], trials_csv(space, trials))
    streams: tuple[str, ...] = ()
    if best is not None:
        files["config"] = out / "best.toml"
        config = space.config(best.values)
        write_file(files["config"], to_toml(config))
        config, _ = resolve(cache, config)
        streams = (*config.visual, *config.audio)
    result = SearchResult(tuple(trials), best, holdout, importances(space, trials), files)
    write_file(files["json"], json.dumps(document(result), indent=1) + "\n")
    page = render(
        "search.html",
        result=result,
        options=options,
        place=cache.place,
        settings=list(space.searched),
        holdout=[(name, float(np.mean(values)), min(values), max(values)) for name, values in holdout.items()],
        plot=Markup(plot(trials)),
        trials=sorted(trials, key=lambda trial: (trial.state != DONE, -np.nan_to_num(trial.score, nan=-9))),
        demonstration=random_encoders(sorted(streams)),
    )
    write_file(files["html"], page)
    return result


def document(result: SearchResult) -> dict[str, Any]:
    """`search.json`, which --json prints."""
    best = result.best
    return {
        "trials": len(result.trials),
        "states": {state: sum(t.state == state for t in result.trials) for state in (DONE, STOPPED, FAILED)},
        "best": None
        if best is None
        else {"trial": best.number, "values": dict(best.values), "selected_ccc": best.score},
        "holdout_ccc": {name: float(np.mean(values)) for name, values in result.holdout.items()},
        "importance": dict(result.importance),
        "files": {kind: str(path) for kind, path in result.files.items()},
    }


def trials_csv(space: Space, trials: Sequence[Trial]) -> str:
    """A row per trial, with the score of each fold."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "ccc_mean", "epochs", "seconds", *space.searched, "folds", "rungs", "message"])
    for trial in trials:
        values = [trial.values[name] for name in space.searched]
        lists = [" ".join(f"{score:.6f}" for score in scores) for scores in (trial.folds, trial.rungs)]
        score = f"{trial.score:.6f}" if trial.rungs else ""
        writer.writerow(
            [trial.number, trial.state, score, trial.epochs, f"{trial.seconds:.1f}", *values, *lists, trial.message]
        )
    return text.getvalue()


def plot(trials: Sequence[Trial]) -> str:
    """Score of every trial in order, and the best so far, as an SVG element."""
    scored = [trial for trial in trials if trial.rungs]
    if not scored:
        return ""
    low, high = (edge(trial.score for trial in scored) for edge in (min, max))
    spread = max(high - low, 0.01)
    low, high = low - 0.05 * spread, high + 0.05 * spread

    def place(number: float, score: float) -> tuple[str, str]:
        x = LEFT + (number - 0.5) / len(trials) * (WIDTH - LEFT - RIGHT)
        return f"{x:.1f}", f"{TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Mean CCC of every trial">']
    for tick in np.linspace(low, high, 5):
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{tick:.3f}</text>')
    best, points = -np.inf, []
    for trial in scored:
        if trial.state == DONE:
            best = max(best, trial.score)
            points.append(",".join(place(trial.number, best)))
    parts.append(f'<polyline class="series0" points="{" ".join(points)}"/>')
    for trial in scored:
        x, y = place(trial.number, trial.score)
        title = f"<title>trial {trial.number}: {trial.score:.3f}, {trial.state} after {trial.epochs} epochs</title>"
        kind = "mean" if trial.state == DONE else "seed"
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{4 if kind == "mean" else 3}">{title}</circle>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">trial</text>')
    return "\n".join([*parts, "</svg>"])
