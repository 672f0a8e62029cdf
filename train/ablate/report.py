"""Results of a study as CSV, Markdown and `results.html`, and the statements that head every report.

The page is one file without external resources. Plots are inline SVG: for every row its mean CCC with the interval, its
seeds, and the published number. Colors come from the page's style sheet and follow light, dark and print; shapes differ
as well, so color is not the only cue.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import Any

import numpy as np
from markupsafe import Markup

from vaflow.encoders import random_encoders
from vaflow.errors import count, visible
from vaflow.pages import render
from vaflow.timeline import Floats
from vaflow.train.ablate.results import COSTS, COSTS_NOTE, EncoderComparison, Results, RowResult, TableResult
from vaflow.train.ablate.tables import Options
from vaflow.train.metrics import SCORES

FROZEN, TUNED = "frozen cache", "fine-tuned"  # how the rows were trained
BASE = "base"  # table name of the full model, if no row of the tables is it
# fmt: off
COLUMNS = (
    "table", "row", "temporal", "fusion", "visual", "audio", "centers", "sigma", "kl_weight", "seeds",
    "ccc_valence", "ccc_arousal", "ccc_mean", "std_mean", "paper_valence", "paper_arousal", "paper_mean",
)
MORE_COLUMNS = (
    "std_valence", "std_arousal", "low_mean", "high_mean", "within_mean", "diff_mean", "diff_low", "diff_high",
    "p_value", "ours", "stands_in", "note", "problem", "runs",
)
TEXT_COLUMNS = ("table", "row", "temporal", "fusion", "visual", "audio", "stands_in", "note", "problem")
# fmt: on
PAPER_PLACES = 4  # as published
FEW_VIDEOS = 20  # below it, a bootstrap over videos is unreliable
MARKDOWN_SPECIAL = "\\`*_{}[]<>#|~"
FORMULA = ("=", "+", "-", "@")  # first characters of cells that a spreadsheet would execute
WIDTH, LABELS, RIGHT = 860, 345, 24  # pixels: figure, names of rows, margin
TOP, ROW, BOTTOM = 30, 28, 34
NAME_LETTERS = 44  # of a row's name; longer names are cut
NOT_TRAINED = "not trained: "
MEAN = -1  # column of the mean


@dataclass(frozen=True)
class About:
    """Origin of the results.

    Attributes:
        trained, reused: runs of this call, and runs that were finished before.
    """

    cache: str
    options: Options
    trained: int
    reused: int
    seconds: float


def csv_text(results: Results) -> str:
    """Text of `results.csv`: a line per row of every table, and the full model unless a table has it.

    Cells without a number are empty. Text that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *MORE_COLUMNS], lineterminator="\n")
    writer.writeheader()
    rows = [row for table in results.tables for row in table.rows]
    records = [record(row) for row in rows]
    if all(row.entry.keys != results.reference.entry.keys for row in rows):
        records.append(record(results.reference) | {"table": BASE})
    for line in records:
        for name in TEXT_COLUMNS:
            line[name] = f"'{line[name]}" if line[name].startswith(FORMULA) else line[name]
        writer.writerow(line)
    return text.getvalue()


def record(row: RowResult) -> dict[str, str]:
    """One line of `results.csv`."""
    entry, config = row.entry, row.entry.config
    versus = row.versus
    groups: dict[str, Sequence[float] | Floats] = {"ccc": row.mean, "std": row.std, "paper": paper_scores(row)}
    named = {f"{kind}_{name}": float(values[k]) for kind, values in groups.items() for k, name in enumerate(SCORES)}
    numbers = named | {
        "centers": config.centers,
        "sigma": config.sigma,
        "kl_weight": config.kl_weight,
        "low_mean": row.interval[-1, 0],
        "high_mean": row.interval[-1, 1],
        "within_mean": row.within_mean,
        "diff_mean": versus.difference[-1] if versus else np.nan,
        "diff_low": versus.low[-1] if versus else np.nan,
        "diff_high": versus.high[-1] if versus else np.nan,
        "p_value": versus.p[-1] if versus else np.nan,
    }
    return {key: f"{number:.6g}" if np.isfinite(number) else "" for key, number in numbers.items()} | {
        "table": visible(entry.row.table),
        "row": visible(entry.row.name),
        "temporal": config.temporal,
        "fusion": config.fusion,
        "visual": "+".join(config.visual),
        "audio": "+".join(config.audio),
        "seeds": str(row.seeds),
        "ours": TUNED if config.finetune else FROZEN,
        "stands_in": stands_in(entry.stands_in),
        "note": entry.note,
        "problem": visible(row.problem),
        "runs": " ".join(entry.keys),
    }


def paper_scores(row: RowResult) -> tuple[float, ...]:
    """[3] published CCC; NaN where there is none."""
    return row.entry.row.paper or (float("nan"),) * len(SCORES)


def stands_in(pairs: Iterable[tuple[str, str]]) -> str:
    """Replacements of streams, as "ast-tiny for ast"."""
    return "; ".join(f"{other} for {name}" for name, other in pairs)


def digits(number: float, *, places: int = 3, sign: bool = False) -> str:
    """A number without its leading zero; a dash where it is not finite."""
    if not np.isfinite(number):
        return "-"
    text = f"{number:{'+' if sign else ''}.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")  # no sign on a rounded 0
    return re.sub(r"^([+-]?)0\.", r"\1.", text).replace("-", "\N{MINUS SIGN}")


def spread(low: float, high: float) -> str:
    """An interval."""
    return f"[{digits(low)}, {digits(high)}]" if np.isfinite([low, high]).all() else "-"


def difference_texts(row: RowResult) -> list[str]:
    """Difference of a row's mean CCC to that of the full model, its interval, and its p-value; dashes without one."""
    versus = row.versus
    if versus is None:
        return ["-"] * 3
    p = "< .001" if versus.p[MEAN] < 0.001 else digits(versus.p[MEAN])
    return [digits(versus.difference[MEAN], sign=True), spread(versus.low[MEAN], versus.high[MEAN]), p]


def statements(results: Results, about: About) -> list[str]:
    """Notes on the interpretation of the numbers, as plain text."""
    options, reference = about.options, results.reference
    rows = [row for table in results.tables for row in table.rows]
    seeds = f"{options.seeds} seeds" if options.seeds > 1 else "one seed"
    tuned = ", ".join(row.entry.row.name for row in rows if row.entry.config.finetune)
    encoders = (
        f"Encoders were trained as well in: {tuned}."
        if tuned
        else "Encoders are frozen and only heads are trained; published rows may come from tuned encoders."
    )
    lines = [
        f"Ours: {ours(rows)}. {encoders}",
        f"CCC on split {results.split}: {results.frames} labelled frames of {count(results.videos, 'video')}; "
        f"mean and standard deviation over {seeds}. Within: mean CCC within each video.",
        "Intervals (95 %) and tests resample videos, 10,000 times and alike for all configurations: they estimate the "
        "effect of other videos on the mean over seeds, not of other seeds.",
        "The difference is the row minus the full model, whose mean is "
        f"{digits(reference.mean[-1])} {spread(*reference.interval[-1])}; p is two-sided and not corrected for the "
        "number of rows.",
        "Published numbers (in the built-in tables, on Aff-Wild2's validation set) are comparable only with runs on "
        "the same clips.",
        "Bold: the best of its column, where the interval of its difference to the runner-up excludes 0.",
    ]
    if results.videos < FEW_VIDEOS:
        lines.append(f"With only {results.videos} videos, intervals are too narrow and small p-values unreliable.")
    if options.aliases:
        used = stands_in(options.aliases.items())
        lines.append(f"Other encoders replace the published ones: {used}. These are not the published systems.")
    if options.overrides:
        changed = ", ".join(f"{key} = {value}" for key, value in options.overrides.items())
        lines.append(f"Settings that differ from the tables': {changed}.")
    if results.uneven:
        lines.append("Not every run has a score on every video: intervals and tests use the videos that all have.")
    return lines


def ours(rows: Iterable[RowResult]) -> str:
    """How the rows were trained: on a frozen cache, fine-tuned, or both."""
    kinds = {TUNED if row.entry.config.finetune else FROZEN for row in rows}
    return " and ".join(sorted(kinds, reverse=True))


def markdown(results: Results, about: About) -> str:
    """Text of `results.md`."""
    parts = ["# Ablations", "", *(f"- {escaped(line)}" for line in statements(results, about))]
    for table in results.tables:
        note = table_note(table)
        parts += ["", f"## {escaped(heading(table))}", "", *([escaped(note), ""] if note else [])]
        parts += _markdown_table(table)
    return "\n".join(parts) + "\n"


def heading(table: TableResult) -> str:
    """Name and title of a table."""
    name = f"Table {table.table.name}"
    return f"{name}: {table.table.title}" if table.table.title else name


def table_note(table: TableResult) -> str:
    """Replaced streams of a table; empty: none."""
    pairs = dict(pair for row in table.rows for pair in row.entry.stands_in)
    return f"Replaced streams: {stands_in(pairs.items())}." if pairs else ""


def _markdown_table(table: TableResult) -> list[str]:
    header = (
        "configuration", "valence", "arousal", "mean", "std", "95 % interval", "within",
        "paper V", "paper A", "paper mean", "difference", "its interval", "p",
    )  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for row in table.rows:
        scores = [f"**{digits(x)}**" if best else digits(x) for x, best in zip(row.mean, row.best, strict=True)]
        scores += [digits(row.std[-1]), spread(*row.interval[-1]), digits(row.within_mean)]
        paper = [digits(x, places=PAPER_PLACES) for x in paper_scores(row)]
        lines.append("| " + " | ".join([escaped(row.entry.row.name), *scores, *paper, *difference_texts(row)]) + " |")
    remarks = [f"- {escaped(f'{row.entry.row.name}: {text}')}" for row in table.rows if (text := remark(row))]
    return [*lines, *([""] if remarks else []), *remarks]


def remark(row: RowResult) -> str:
    """Return the note on a row below its table; empty: none."""
    parts = (row.entry.note, row.problem)
    return ". ".join(part.rstrip(".") for part in parts if part)


def escaped(text: str) -> str:
    """Escape text for Markdown, on one line; control characters are made visible."""
    return visible("".join(f"\\{c}" if c in MARKDOWN_SPECIAL else c for c in " ".join(text.split())))


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


def _diamond(x: float, y: float) -> str:
    return f'<path class="paper" d="M{x:.1f} {y - 5:.1f} l5 5 l-5 5 l-5 -5 z"/>'


def html_page(results: Results, about: About, encoders: EncoderComparison | None = None) -> str:
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
    scores = [(digits(row.mean[k]), digits(row.std[k]) if row.seeds > 1 else "", row.best[k]) for k in range(3)]
    return {
        "name": row.entry.row.name,
        "scores": scores,
        "interval": spread(*row.interval[-1]),
        "within": digits(row.within_mean),
        "published": [digits(score, places=PAPER_PLACES) for score in paper_scores(row)],
        "difference": difference_texts(row),
    }
