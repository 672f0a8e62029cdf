"""`results.html`: tables with a plot each, in one file without external resources.

Plots are inline SVG: for every row its mean CCC with the interval, its seeds, and the published number. Colors come
from the page's style sheet and follow light, dark and print; shapes differ as well, so color is not the only cue.
"""

from html import escape as escape_html
from typing import Any

import numpy as np
from markupsafe import Markup

from vaflow.demonstration import random_encoders
from vaflow.errors import visible
from vaflow.pages import render
from vaflow.train.ablate.encoders import COSTS, COSTS_NOTE, Comparison
from vaflow.train.ablate.report import (
    PAPER_PLACES,
    About,
    digits,
    heading,
    ours,
    p_text,
    paper_scores,
    remark,
    spread,
    statements,
    table_note,
)
from vaflow.train.ablate.results import Results, RowResult, TableResult

WIDTH, LABELS, RIGHT = 860, 345, 24  # pixels: figure, names of rows, margin
TOP, ROW, BOTTOM = 30, 28, 34
NAME_LETTERS = 44  # of a row's name; longer names are cut
NOT_TRAINED = "not trained: "
MEAN = -1  # column of the mean


def escape(text: str) -> str:
    """Escape text for HTML; control characters are made visible."""
    return escape_html(visible(text))


def plot(table: TableResult, reference: RowResult) -> str:
    """The plot of a table as an SVG element."""
    height = TOP + ROW * len(table.rows) + BOTTOM
    values = [reference.mean[MEAN]]
    for row in table.rows:
        values += [*row.interval[MEAN], paper_scores(row)[MEAN], *row.scores[:, MEAN]]
    finite = [float(value) for value in values if np.isfinite(value)]
    scale = _Scale(min(finite, default=0.0), max(finite, default=1.0))
    title = escape(f"{heading(table)}: mean CCC of every row with its interval")
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        *_axis(scale, height),
    ]
    if np.isfinite(reference.mean[MEAN]):
        x = scale.x(reference.mean[MEAN])
        parts.append(f'<line class="reference" x1="{x}" y1="{TOP - 6}" x2="{x}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{TOP - 12}" text-anchor="middle">full model</text>')
    for i, row in enumerate(table.rows):
        parts += _marks(scale, row, TOP + ROW * (i + 0.5))
    return "\n".join([*parts, "</svg>"])


def legend() -> str:
    """Legend of the marks, as HTML."""
    marks = (
        ('<line class="interval" x1="1" y1="8" x2="31" y2="8"/><circle class="mean" cx="16" cy="8" r="4.5"/>',
         "ours: mean over seeds, 95 % interval over videos"),
        ('<circle class="seed" cx="16" cy="8" r="3"/>', "one seed"),
        (_diamond(16, 8), "published"),
        ('<line class="reference" x1="16" y1="1" x2="16" y2="15"/>', "ours: the full model"),
    )  # fmt: skip
    shown = (f'<span><svg viewBox="0 0 32 16" aria-hidden="true">{mark}</svg>{text}</span>' for mark, text in marks)
    return f'<p class="legend">{"".join(shown)}</p>'


class _Scale:
    """CCC -> pixels."""

    def __init__(self, low: float, high: float) -> None:
        self.step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 9 or step == 0.5)
        self.low = np.floor(low / self.step + 1e-9) * self.step
        self.high = max(np.ceil(high / self.step - 1e-9) * self.step, self.low + self.step)

    def x(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{LABELS + share * (WIDTH - LABELS - RIGHT):.1f}"

    def ticks(self) -> list[float]:
        return [self.low + k * self.step for k in range(round((self.high - self.low) / self.step) + 1)]


def _axis(scale: _Scale, height: int) -> list[str]:
    below = height - BOTTOM
    parts = []
    for tick in scale.ticks():
        x, text = scale.x(tick), digits(tick, places=2) if abs(tick) > 1e-9 else "0"
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{below}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{below + 16}" text-anchor="middle">{text}</text>')
    middle = (LABELS + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="tick" x="{middle}" y="{below + 31}" text-anchor="middle">mean CCC</text>']


def _marks(scale: _Scale, row: RowResult, y: float) -> list[str]:
    """Name, interval, seeds, mean and published number of a row at height `y`."""
    name = row.entry.row.name
    room = NAME_LETTERS if row.seeds else NAME_LETTERS - len(NOT_TRAINED)
    shown = escape(name if len(name) <= room else f"{name[: room - 1].rstrip()}…")
    if not row.seeds:
        shown = f'<tspan class="tick">{NOT_TRAINED}</tspan>{shown}'
    parts = [f'<text class="name" x="{LABELS - 14}" y="{y + 4}" text-anchor="end">{shown}</text>']
    mean, (low, high), paper = row.mean[MEAN], row.interval[MEAN], paper_scores(row)[MEAN]
    facts = [f"{name}: {digits(mean)}, interval {spread(low, high)}" if row.seeds else f"{name}: not trained"]
    facts += [f"published {digits(paper, places=4)}"] if np.isfinite(paper) else []
    parts.append(f"<g><title>{escape('; '.join(facts))}</title>")
    parts.append(f'<rect class="touch" x="{LABELS}" y="{y - ROW / 2}" width="{WIDTH - LABELS}" height="{ROW}"/>')
    if np.isfinite([low, high]).all():
        parts.append(f'<line class="interval" x1="{scale.x(low)}" y1="{y}" x2="{scale.x(high)}" y2="{y}"/>')
    if row.seeds > 1:
        seeds = (score for score in row.scores[:, MEAN] if np.isfinite(score))
        parts += [f'<circle class="seed" cx="{scale.x(score)}" cy="{y}" r="3"/>' for score in seeds]
    if np.isfinite(mean):
        parts.append(f'<circle class="mean" cx="{scale.x(mean)}" cy="{y}" r="4.5"/>')
    if np.isfinite(paper):
        parts.append(_diamond(float(scale.x(paper)), y))
    return [*parts, "</g>"]


def _diamond(x: float, y: float, r: float = 5) -> str:
    return f'<path class="paper" d="M{x:.1f} {y - r:.1f} l{r} {r} l{-r} {r} l{-r} {-r} z"/>'


def html_page(results: Results, about: About, encoders: Comparison | None = None) -> str:
    """Text of `results.html`."""
    tables = [
        {
            "heading": heading(table),
            "note": table_note(table),
            "plot": Markup(plot(table, results.reference)),
            "ours": ours(table.rows),
            "rows": [_cells(row) for row in table.rows],
            "remarks": [(r.entry.row.name, text, bool(r.problem)) for r in table.rows if (text := remark(r))],
        }
        for table in results.tables
    ]
    return render(
        "ablation.html",
        statements=statements(results, about),
        legend=Markup(legend()),
        tables=tables,
        encoders=encoders,
        costs=COSTS,
        costs_note=COSTS_NOTE,
        about=about,
        demonstration=random_encoders(about.options.aliases.values()),
    )


def _cells(row: RowResult) -> dict[str, Any]:
    """Texts of a row of the table."""
    versus = row.versus
    scores = [(digits(row.mean[k]), digits(row.std[k]) if row.seeds > 1 else "", row.best[k]) for k in range(3)]
    difference = ["-"] * 3
    if versus is not None:
        difference = [digits(versus.difference[-1], sign=True), spread(versus.low[-1], versus.high[-1])]
        difference.append(p_text(versus.p[-1]))
    return {
        "name": row.entry.row.name,
        "scores": scores,
        "interval": spread(*row.interval[-1]),
        "within": digits(row.within_mean),
        "published": [digits(score, places=PAPER_PLACES) for score in paper_scores(row)],
        "difference": difference,
    }
