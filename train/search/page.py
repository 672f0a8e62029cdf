"""`search.html`: the trials, the importance of the settings and the held-out score, in one file."""

from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup

from vaflow.demonstration import random_encoders
from vaflow.pages import render
from vaflow.train.search.space import Space
from vaflow.train.search.trials import DONE, SearchOptions, SearchResult, Trial

WIDTH, HEIGHT = 860, 260  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40


def html_page(space: Space, result: SearchResult, place: str, options: SearchOptions, streams: Iterable[str]) -> str:
    """The whole page; `streams` are those of the winner."""
    return render(
        "search.html",
        result=result,
        options=options,
        place=place,
        settings=list(space.searched),
        holdout=[(name, float(np.mean(values)), min(values), max(values)) for name, values in result.holdout.items()],
        plot=Markup(plot(result.trials)),
        trials=sorted(result.trials, key=lambda trial: (trial.state != DONE, -np.nan_to_num(trial.score, nan=-9))),
        demonstration=random_encoders(sorted(streams)),
    )


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
