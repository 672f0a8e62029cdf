"""`results.html`: tables with a plot each, in one file without external resources.

Plots are inline SVG: for every row its mean CCC with the interval, its seeds, and the published number. Colours come
from the page's style sheet and follow light, dark and print; shapes differ as well, so colour is not the only cue.
"""

from collections.abc import Sequence
from html import escape as escape_html

import numpy as np

from vaflow.errors import visible
from vaflow.train.ablate.grid import SCORES
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
NAME_LETTERS = 44  # of a row's name; more does not fit
NOT_TRAINED = "not trained: "
MEAN = -1  # column of the mean


def escape(text: str) -> str:
    """Text that HTML shows literally; control characters are made visible."""
    return escape_html(visible(text))


def plot(table: TableResult, reference: RowResult) -> str:
    """The plot of a table as an SVG element."""
    height = TOP + ROW * len(table.rows) + BOTTOM
    scale = _Scale(*_limits(table.rows, reference))
    title = escape(f"{heading(table)}: mean CCC of every row with its interval")
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        *_axis(scale, height),
        *_reference(scale, reference, height),
    ]
    for i, row in enumerate(table.rows):
        parts += _row(scale, row, TOP + ROW * (i + 0.5))
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


def _limits(rows: Sequence[RowResult], reference: RowResult) -> tuple[float, float]:
    shown = [reference.mean[MEAN], *(x for row in rows for x in (*row.interval[MEAN], paper_scores(row)[MEAN]))]
    shown += [score for row in rows for score in row.scores[:, MEAN]]
    finite = [float(x) for x in shown if np.isfinite(x)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def _axis(scale: _Scale, height: int) -> list[str]:
    below = height - BOTTOM
    parts = []
    for tick in scale.ticks():
        x, text = scale.x(tick), digits(tick, places=2) if abs(tick) > 1e-9 else "0"
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP}" x2="{x}" y2="{below}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{below + 16}" text-anchor="middle">{text}</text>')
    middle = (LABELS + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="tick" x="{middle}" y="{below + 31}" text-anchor="middle">mean CCC</text>']


def _reference(scale: _Scale, reference: RowResult, height: int) -> list[str]:
    if not np.isfinite(reference.mean[MEAN]):
        return []
    x = scale.x(reference.mean[MEAN])
    return [
        f'<line class="reference" x1="{x}" y1="{TOP - 6}" x2="{x}" y2="{height - BOTTOM}"/>',
        f'<text class="tick" x="{x}" y="{TOP - 12}" text-anchor="middle">full model</text>',
    ]


def _row(scale: _Scale, row: RowResult, y: float) -> list[str]:
    name = row.entry.row.name
    room = NAME_LETTERS if row.seeds else NAME_LETTERS - len(NOT_TRAINED)
    shown = escape(name if len(name) <= room else f"{name[: room - 1].rstrip()}…")
    if not row.seeds:
        shown = f'<tspan class="tick">{NOT_TRAINED}</tspan>{shown}'
    parts = [f'<text class="name" x="{LABELS - 14}" y="{y + 4}" text-anchor="end">{shown}</text>']
    mean, (low, high), paper = row.mean[MEAN], row.interval[MEAN], paper_scores(row)[MEAN]
    said = [f"{name}: {digits(mean)}, interval {spread(low, high)}" if row.seeds else f"{name}: not trained"]
    said += [f"published {digits(paper, places=4)}"] if np.isfinite(paper) else []
    parts.append(f"<g><title>{escape('; '.join(said))}</title>")
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


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --soft: #5c5c5c; --line: #d9d9d9; --stripe: #f6f6f6;
  --ours: #0072b2; --paper: #c04f00; --reference: #6b6b6b; --warn: #8a4b00; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e8e8e8; --soft: #a9a9a9;
  --line: #3a3d41; --stripe: #1e2125; --ours: #5bb4e5; --paper: #f0a05a; --reference: #9a9a9a; --warn: #f0c24b; } }
@page { size: landscape; margin: 12mm; }
@media print { :root { color-scheme: light; } section { break-inside: avoid; } body { max-width: none; margin: 0; }
  .wide { overflow: visible; } svg.plot { max-width: 22cm; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 1120px;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; }
ul { padding-left: 1.2rem; margin: .4rem 0; } li { margin: .15rem 0; }
.soft, footer { color: var(--soft); } p.soft { margin: 0 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .28rem .4rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--soft); } thead tr:first-child th { border-bottom: 0; }
th:first-child { text-align: left; white-space: normal; min-width: 12rem; font-weight: 400; }
tbody tr:nth-child(even) { background: var(--stripe); }
.group { text-align: center; border-left: 1px solid var(--line); }
.first { border-left: 1px solid var(--line); } .std { color: var(--soft); font-size: .85em; }
td b { color: var(--ours); } .problem { color: var(--warn); }
.remarks { font-size: .88rem; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; font-size: .88rem; color: var(--soft); margin: 1rem 0 0; }
.legend svg { width: 32px; height: 16px; vertical-align: -3px; margin-right: .35rem; }
svg.plot { width: 100%; min-width: 620px; height: auto; font: 13px system-ui, sans-serif; }
.name { fill: var(--text); } .tick { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--line); }
.touch { fill: transparent; } .reference { stroke: var(--reference); stroke-dasharray: 4 3; stroke-width: 1.5; }
.interval { stroke: var(--ours); stroke-width: 2.5; stroke-linecap: round; } .mean { fill: var(--ours); }
.seed { fill: var(--back); fill-opacity: .6; stroke: var(--ours); stroke-opacity: .7; }
.paper { fill: var(--back); stroke: var(--paper); stroke-width: 2; }
"""


def html_page(results: Results, about: About) -> str:
    """The whole page."""
    notes = "\n".join(f"<li>{escape(line)}</li>" for line in statements(results, about))
    sections = "\n".join(_section(table, results.reference) for table in results.tables)
    runs = f"{about.trained} runs trained, {about.reused} reused, in {about.seconds:.0f} s."
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ablations</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Ablations</h1>
<ul>
{notes}
</ul>
{legend()}
{sections}
<footer><p>Cache: {escape(about.cache)}. {runs}</p></footer>
</body>
</html>
"""


def _section(table: TableResult, reference: RowResult) -> str:
    rows = "\n".join(_table_row(row) for row in table.rows)
    remarks = "".join(
        f"<li{' class=problem' if row.problem else ''}>{escape(row.entry.row.name)}: {escape(text)}</li>"
        for row in table.rows
        if (text := remark(row))
    )
    return f"""<section>
<h2>{escape(heading(table))}</h2>
{f'<p class="soft">{escape(note)}</p>' if (note := table_note(table)) else ""}
<div class="wide">{plot(table, reference)}</div>
<div class="wide"><table>
<thead>
<tr><th></th><th class="group" colspan="5">ours: {ours(table.rows)}</th><th class="group" colspan="3">published</th>
<th class="group" colspan="3">mean against the full model</th></tr>
<tr><th scope="col">configuration</th><th class="first" scope="col">valence</th><th scope="col">arousal</th>
<th scope="col">mean</th><th scope="col">95 % interval</th><th scope="col">within</th>
<th class="first" scope="col">valence</th>
<th scope="col">arousal</th><th scope="col">mean</th><th class="first" scope="col">difference</th>
<th scope="col">95 % interval</th><th scope="col">p</th></tr>
</thead>
<tbody>
{rows}
</tbody>
</table></div>
{f'<ul class="remarks">{remarks}</ul>' if remarks else ""}
</section>"""


def _table_row(row: RowResult) -> str:
    versus = row.versus
    cells = [_ours(row, k) for k in range(len(SCORES))]
    cells += [spread(*row.interval[-1]), digits(row.within_mean)]
    cells += [digits(score, places=PAPER_PLACES) for score in paper_scores(row)]
    if versus is None:
        cells += ["-"] * 3
    else:
        cells += [digits(versus.difference[-1], sign=True), spread(versus.low[-1], versus.high[-1])]
        cells.append(escape(p_text(versus.p[-1])))
    firsts = (0, len(SCORES) + 2, 2 * len(SCORES) + 2)  # first column of each group
    shown = "".join(f"<td{' class=first' if i in firsts else ''}>{cell}</td>" for i, cell in enumerate(cells))
    return f'<tr><th scope="row">{escape(row.entry.row.name)}</th>{shown}</tr>'


def _ours(row: RowResult, k: int) -> str:
    """Mean and standard deviation of one score."""
    mean, std = digits(row.mean[k]), digits(row.std[k])
    strong = f"<b>{mean}</b>" if row.best[k] else mean
    return f'{strong} <span class="std">± {std}</span>' if row.seeds > 1 else strong
