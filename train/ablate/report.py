"""Results of a study as CSV and Markdown, and the statements that head every report."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vaflow.errors import visible
from vaflow.timeline import Floats
from vaflow.train.ablate.grid import SCORES
from vaflow.train.ablate.plan import Options
from vaflow.train.ablate.results import Results, RowResult, TableResult

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


@dataclass(frozen=True)
class About:
    """Origin of the results.

    Attributes:
        cache: its place.
        options: seeds, overrides, aliases.
        trained, reused: runs of this call, and runs that were finished before.
        seconds: duration of the call.
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


def p_text(p: float) -> str:
    """A p-value as text."""
    return "-" if not np.isfinite(p) else "< .001" if p < 0.001 else digits(p)


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
        f"CCC on split {results.split}: {results.frames} labelled frames of {results.videos} videos; "
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
        test, versus = ["-"] * 3, row.versus
        if versus is not None:
            interval = spread(versus.low[-1], versus.high[-1])
            test = [digits(versus.difference[-1], sign=True), interval, p_text(versus.p[-1])]
        lines.append("| " + " | ".join([escaped(row.entry.row.name), *scores, *paper, *test]) + " |")
    remarks = [f"- {escaped(f'{row.entry.row.name}: {text}')}" for row in table.rows if (text := remark(row))]
    return [*lines, *([""] if remarks else []), *remarks]


def remark(row: RowResult) -> str:
    """Return the note on a row below its table; empty: none."""
    parts = (row.entry.note, row.problem)
    return ". ".join(part.rstrip(".") for part in parts if part)


def escaped(text: str) -> str:
    """Escape text for Markdown, on one line; control characters are made visible."""
    return visible("".join(f"\\{c}" if c in MARKDOWN_SPECIAL else c for c in " ".join(text.split())))
