"""Tables as CSV and Markdown, and the sentences that every page of results says about itself."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vaflow.timeline import Floats
from vaflow.train.ablate.grid import SCORES
from vaflow.train.ablate.plan import Options
from vaflow.train.ablate.results import Results, RowResult, TableResult

FROZEN, TUNED = "frozen cache", "fine-tuned"  # what of ours the numbers are
# fmt: off
COLUMNS = (
    "table", "row", "temporal", "fusion", "visual", "audio", "centers", "sigma", "kl_weight", "seeds",
    "ccc_valence", "ccc_arousal", "ccc_mean", "std_mean", "paper_valence", "paper_arousal", "paper_mean",
)
MORE_COLUMNS = (
    "std_valence", "std_arousal", "low_mean", "high_mean", "within_mean", "diff_mean", "diff_low", "diff_high",
    "p_value", "ours", "stands_in", "note", "problem", "runs",
)
# fmt: on
PAPER_PLACES = 4  # as published
FEW_VIDEOS = 20  # below it, a bootstrap over videos is not to be trusted
MARKDOWN_SPECIAL = "\\`*_{}[]<>#|~"


@dataclass(frozen=True)
class About:
    """How results were made.

    Attributes:
        cache: the folder.
        options: seeds, overrides, aliases.
        trained, reused: runs of this call, and those that were there.
        seconds: that it took.
    """

    cache: str
    options: Options
    trained: int
    reused: int
    seconds: float


def csv_text(results: Results) -> str:
    """`results.csv`: a row per row of every table; empty where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *MORE_COLUMNS], lineterminator="\n")
    writer.writeheader()
    for table in results.tables:
        writer.writerows(record(row) for row in table.rows)
    return text.getvalue()


def record(row: RowResult) -> dict[str, str]:
    """One line of `results.csv`."""
    entry, config = row.entry, row.entry.config
    named = {f"{kind}_{name}": number for kind, group in _scores(row).items() for name, number in group.items()}
    versus = row.versus
    numbers = named | {
        "centers": config.centers,
        "sigma": config.sigma,
        "kl_weight": config.kl_weight,
        "low_mean": row.interval[-1, 0],
        "high_mean": row.interval[-1, 1],
        "within_mean": row.within.mean() if row.seeds else np.nan,
        "diff_mean": versus.difference[-1] if versus else np.nan,
        "diff_low": versus.low[-1] if versus else np.nan,
        "diff_high": versus.high[-1] if versus else np.nan,
        "p_value": versus.p[-1] if versus else np.nan,
    }
    return {key: _plain(number) for key, number in numbers.items()} | {
        "table": entry.row.table,
        "row": entry.row.name,
        "temporal": config.temporal,
        "fusion": config.fusion,
        "visual": "+".join(config.visual),
        "audio": "+".join(config.audio),
        "seeds": str(row.seeds),
        "ours": TUNED if config.finetune else FROZEN,
        "stands_in": stands_in(entry.stands_in),
        "note": entry.note,
        "problem": row.problem,
        "runs": " ".join(entry.keys),
    }


def _scores(row: RowResult) -> Mapping[str, Mapping[str, float]]:
    groups: dict[str, Sequence[float] | Floats] = {"ccc": row.mean, "std": row.std, "paper": paper_scores(row)}
    return {kind: {name: float(values[k]) for k, name in enumerate(SCORES)} for kind, values in groups.items()}


def paper_scores(row: RowResult) -> tuple[float, ...]:
    """[3] published concordance; NaN where there is none."""
    return row.entry.row.paper or (float("nan"),) * len(SCORES)


def _plain(number: float) -> str:
    return f"{number:.6g}" if np.isfinite(number) else ""


def stands_in(pairs: Iterable[tuple[str, str]]) -> str:
    """Which streams took the place of which."""
    return "; ".join(f"{other} for {name}" for name, other in pairs)


def digits(number: float, *, places: int = 3, sign: bool = False) -> str:
    """A number for people, without the leading zero; a dash where there is none."""
    if not np.isfinite(number):
        return "-"
    text = f"{number:{'+' if sign else ''}.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")  # what rounds to 0 has no sign
    return re.sub(r"^([+-]?)0\.", r"\1.", text).replace("-", "\N{MINUS SIGN}")


def spread(low: float, high: float) -> str:
    """An interval."""
    return f"[{digits(low)}, {digits(high)}]" if np.isfinite([low, high]).all() else "-"


def p_text(p: float) -> str:
    """A p-value for people."""
    return "-" if not np.isfinite(p) else "< .001" if p < 0.001 else digits(p)


def statements(results: Results, about: About) -> list[str]:
    """What readers must know before they read a number, each one sentence or two of plain text."""
    options, reference = about.options, results.reference
    seeds = f"{options.seeds} seeds" if options.seeds > 1 else "one seed"
    lines = [
        _what_ours_are(results),
        f"Concordance (CCC) on split {results.split}: {results.frames} labelled frames of {results.videos} videos; "
        f"mean and standard deviation over {seeds}.",
        "Intervals (95 %) and tests resample videos, 10,000 times and for all configurations alike; they say what "
        "other videos would do to the mean over seeds, not what other seeds would.",
        "The difference is the row minus the full model, whose mean is "
        f"{digits(reference.mean[-1])} {spread(*reference.interval[-1])}; p is two-sided and not corrected for the "
        "number of rows.",
        "Published numbers are of their own data (Aff-Wild2's validation set, in the built-in tables): they compare "
        "with runs on the same clips only.",
        "Bold: the best of its column, where the interval of its difference to the runner-up excludes 0.",
    ]
    if results.videos < FEW_VIDEOS:
        lines.append(
            f"{results.videos} videos are few: intervals over so few are too narrow, and small p-values mean little."
        )
    if options.aliases:
        used = stands_in(options.aliases.items())
        lines.append(f"Other encoders stand in for the published ones: {used}. These are not the published systems.")
    if options.overrides:
        said = ", ".join(f"{key} = {value}" for key, value in options.overrides.items())
        lines.append(f"Settings that differ from the tables': {said}.")
    if results.uneven:
        lines.append("Not every run could be measured on every video: intervals and tests use those that all have.")
    return lines


def ours(rows: Iterable[RowResult]) -> str:
    """What of ours the numbers of some rows are."""
    kinds = {TUNED if row.entry.config.finetune else FROZEN for row in rows}
    return " and ".join(sorted(kinds, reverse=True))


def _what_ours_are(results: Results) -> str:
    rows = [row for table in results.tables for row in table.rows]
    said = ours(rows)
    if said == FROZEN:
        heads = (
            "Encoders stay as they are and only heads are trained, while published rows may come from tuned encoders"
        )
        return f"Ours: {FROZEN}. {heads}."
    tuned = ", ".join(row.entry.row.name for row in rows if row.entry.config.finetune)
    return f"Ours: {said}. Encoders were trained, too, in: {tuned}."


def markdown(results: Results, about: About) -> str:
    """`results.md`."""
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
    """Which streams stood in for which in a table; empty: none did."""
    pairs = dict(pair for row in table.rows for pair in row.entry.stands_in)
    return f"Stand-ins: {stands_in(pairs.items())}." if pairs else ""


def _markdown_table(table: TableResult) -> list[str]:
    header = (
        "configuration", "valence", "arousal", "mean", "std", "95 % interval",
        "paper V", "paper A", "paper mean", "difference", "its interval", "p",
    )  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(_markdown_cells(row)) + " |" for row in table.rows]
    remarks = [(row, text) for row in table.rows if (text := remark(row))]
    return (
        lines + ([""] if remarks else []) + [f"- {escaped(f'{row.entry.row.name}: {text}')}" for row, text in remarks]
    )


def _markdown_cells(row: RowResult) -> list[str]:
    ours = [f"**{digits(x)}**" if best else digits(x) for x, best in zip(row.mean, row.best, strict=True)]
    paper = [digits(x, places=PAPER_PLACES) for x in paper_scores(row)]
    versus = row.versus
    test = ["-"] * 3
    if versus is not None:
        test = [digits(versus.difference[-1], sign=True), spread(versus.low[-1], versus.high[-1]), p_text(versus.p[-1])]
    return [escaped(row.entry.row.name), *ours, digits(row.std[-1]), spread(*row.interval[-1]), *paper, *test]


def remark(row: RowResult) -> str:
    """What must be said below a table about one of its rows; empty: nothing."""
    parts = (row.entry.note, row.problem)
    return ". ".join(part.rstrip(".") for part in parts if part)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return "".join(f"\\{c}" if c in MARKDOWN_SPECIAL else c for c in " ".join(text.split()))
