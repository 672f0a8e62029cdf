"""`vaflow ablate`, `search` and `folds`: many training runs on one cache, and the folds of a cross-validation."""

import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

from vaflow.cli.common import Output, alias_pairs, echo, loading, number, print_json, report_failures, table
from vaflow.cli.options import Aliases, AllowMissing, Cache, Device, Engine, RayAddress, Together, flag, option
from vaflow.errors import FAILED, UsageError, count, explain, visible
from vaflow.process import check_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vaflow.train.ablate import StudyResult
    from vaflow.train.ablate.pool import Outcome
    from vaflow.train.ablate.results import TableResult
    from vaflow.train.ablate.tables import Schedule
    from vaflow.train.search import NestedResult
    from vaflow.train.search_space import SearchResult, Trial

Out = Annotated[Path, option("DIR", "Directory of runs and results.")]
Tables = Annotated[
    list[str] | None,
    option("NAME", "1, 2, 3, p2, extra, all, or encoders; a name of --grid. Repeatable. [all]", "--table"),
]
Seeds = Annotated[int, option("N", "Runs per configuration.")]
Jobs = Annotated[
    int | None, option("N", "Number of runs in parallel, one process each. [1; with Ray one per GPU, or per CPU]")
]
Settings = Annotated[
    list[str] | None, option("KEY=VALUE", "Setting of every row without its own value. Repeatable.", "--set")
]
Grid = Annotated[Path | None, option("FILE", "TOML file of other tables, such as an edited copy of DIR/tables.toml.")]


def ablate(
    output: Output,
    cache: Cache,
    out: Out,
    tables: Tables = None,
    seeds: Seeds = 3,
    aliases: Aliases = None,
    jobs: Jobs = None,
    together: Together = "auto",
    settings: Settings = None,
    grid: Grid = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    allow_missing: AllowMissing = False,
) -> int:
    """Train every row of the published tables with several seeds, and compare with the published numbers.

    Writes results.csv, results.md and results.html. Finished runs are reused: run it again to resume, or with more
    tables or seeds to add to them.

    Example: vaflow ablate affwild2.cache --table all --seeds 5 --out ablations

    Example: vaflow ablate demo/cache --table 2 --out ablations --alias clip-vit-b16=clip-tiny --alias ast=ast-tiny
    """
    if jobs is not None and jobs < 1:
        raise UsageError(explain(f"--jobs must be >= 1 (got {jobs})"))
    check_engine(engine, ray_address)
    from vaflow.cache import open_cache
    from vaflow.settings import parse_pairs
    from vaflow.train.config import TrainConfig

    opened = open_cache(cache)
    with loading(output):
        from vaflow.train.ablate import run_study
        from vaflow.train.ablate.results import ENCODERS, encoder_study
        from vaflow.train.ablate.tables import Options, load_study

    options = Options(seeds, parse_pairs(TrainConfig, settings or []), alias_pairs(aliases or []), allow_missing)
    compared = ENCODERS in (tables or [])
    if compared and (grid is not None or len(tables or []) > 1):
        raise UsageError(explain("--table encoders cannot be combined", expected="no other --table and no --grid"))
    study = encoder_study(opened) if compared else load_study(grid)
    with _Reporter(output) as reporter:
        result = run_study(
            opened,
            study,
            tables or [],
            out,
            options,
            processes=jobs,
            engine=engine,
            ray_address=ray_address,
            together=together,
            level=output.worker_level,
            on_schedule=reporter.schedule,
            on_run=reporter.run,
            on_choice=reporter.choice,
        )
    output.result(lambda: study_document(result), lambda: study_summary(result))
    if result.failures and result.to_add and not output.quiet:
        echo(f"To add the missing streams: {result.to_add}", err=True)
    some_scored = any(row.seeds for t in result.results.tables for row in t.rows)
    return report_failures(result, some_scored, "row or run", "rows or runs")


class _Reporter:
    """Progress: a bar over runs on a terminal, a line per run elsewhere."""

    def __init__(self, output: Output) -> None:
        self._with_bar, self._quiet = output.bars, output.quiet
        self._done = self._total = 0

    def __enter__(self) -> "_Reporter":
        from tqdm import tqdm

        self._bar: tqdm[Any] = tqdm(unit="run", desc="ablate", disable=not self._with_bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def schedule(self, schedule: "Schedule", todo: int) -> None:
        """Take the number of runs; called once."""
        self._done, self._total = len(schedule.runs) - todo, len(schedule.runs)
        self._bar.total, self._bar.initial, self._bar.n = self._total, self._done, self._done
        self._bar.refresh()
        if not self._quiet:
            for entry in (*schedule.entries, schedule.reference):
                if entry.problem:
                    missing = ", ".join(name for _, name in entry.missing)
                    reason = f"the cache lacks {missing}" if missing else entry.problem
                    self._write(f"skipped: {entry.row.name}: {reason}")
            self._write(f"{count(self._total, 'run')}, {self._done} already finished")

    def choice(self, text: str) -> None:
        """Called for every batch of runs that was timed."""
        if not self._quiet:
            self._write(text)

    def run(self, outcome: "Outcome") -> None:
        """Called for every run that ends."""
        ended = outcome.ended
        self._done += 1
        self._bar.update()
        if ended.error:
            self._write(f"failed: {outcome.run.name}: {ended.message}")
        elif not self._quiet and not self._with_bar:
            score = f"mean CCC {number(ended.score)} ({ended.seconds:.0f} s)"
            self._write(f"{self._done}/{self._total}  {outcome.run.name}: {score}")

    def _write(self, line: str) -> None:
        self._bar.write(visible(line), file=sys.stderr)


def study_summary(result: "StudyResult") -> str:
    """The page of --table encoders, if any, every table with rows, the first statement, and the number of runs."""
    from vaflow.train.ablate.report import heading, statements

    page = result.files.get("encoders")
    parts = [] if page is None else [terminal_text(page.read_text("utf-8")).rstrip("\n")]
    parts += [f"{heading(one)}\n\n{_table_text(one)}" for one in result.results.tables if one.rows]
    about = result.about
    parts.append("\n".join(statements(result.results, about)[:1]))
    parts.append(
        f"{about.trained} runs trained, {about.reused} reused, in {about.seconds:.0f} s; see {result.files['html']}"
    )
    return "\n\n".join(parts)


def _table_text(scored: "TableResult") -> str:
    from vaflow.train.ablate.report import difference_texts, digits, paper_scores, spread

    rows = [
        (
            row.entry.row.name,
            *(digits(score) for score in row.mean),
            digits(row.std[-1]),
            spread(*row.interval[-1]),
            digits(row.within_mean),
            digits(paper_scores(row)[-1]),
            *difference_texts(row)[::2],
        )
        for row in scored.rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    aligned = [(name, *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))) for name, *cells in rows]
    return table(
        aligned, ("", "valence", "arousal", "mean", "std", "95 % interval", "within", "paper", "difference", "p")
    )


def study_document(result: "StudyResult") -> dict[str, Any]:
    """The document of --json."""
    from vaflow.train.ablate.report import record, statements

    about = result.about
    return {
        "tables": {t.table.name: [record(row) for row in t.rows] for t in result.results.tables},
        "full_model": record(result.results.reference),
        "statements": statements(result.results, about),
        "runs": {"trained": about.trained, "reused": about.reused, "failed": len(result.failures)},
        "seconds": about.seconds,
        "files": {kind: str(path) for kind, path in result.files.items()},
        "failures": [failure.line() for failure in result.failures],
    }


def terminal_text(markdown: str) -> str:
    """A Markdown document with its tables as aligned text, which fits narrow terminals."""
    blocks = []
    for block in markdown.strip().split("\n\n"):
        if block.startswith("|"):
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n"))
            block = table(rows, header)
        blocks.append(block.removeprefix("# "))
    return "\n\n".join(blocks) + "\n"


Space = Annotated[Path, option("FILE", "TOML file of settings to search and settings to keep.")]
SearchOut = Annotated[Path, option("DIR", "Directory of trials and results.")]
Trials = Annotated[int, option("N", "Trials in all, those of earlier calls included.")]
Sampler = Annotated[str, option("NAME", "bayes (TPE) or random.")]
Folds = Annotated[int, option("K", "Folds of the training split that score a trial.")]
Train = Annotated[str, option("SPLIT", "Split that the folds divide.", "--train")]
Holdout = Annotated[str, option("SPLIT", "Split that scores the winner only.")]
Halving = Annotated[bool, flag("Stop trials early that are not among the best third.", "--halving/--no-halving")]
OuterFolds = Annotated[int, option("K", "Repeat the search for K outer folds and score on them (0: --holdout).")]
Batch = Annotated[int, option("N", "Trials that are proposed and trained at once.")]
SearchSeed = Annotated[int, option("N", "Random seed of the proposals.", min=0)]


def search(
    output: Output,
    cache: Cache,
    space: Space,
    out: SearchOut,
    trials: Trials = 30,
    sampler: Sampler = "bayes",
    folds: Folds = 3,
    train: Train = "train",
    holdout: Holdout = "val",
    halving: Halving = True,
    outer_folds: OuterFolds = 0,
    batch: Batch = 4,
    together: Together = "auto",
    seed: SearchSeed = 0,
    device: Device = "auto",
    engine: Engine = "local",
    ray_address: RayAddress = None,
    allow_missing: AllowMissing = False,
) -> int:
    """Search for settings on the training split; score the winner on a split that no trial has seen.

    Writes trials.csv, search.json, search.html and best.toml, for `vaflow train --config`. Run it again to resume, or
    with more --trials to continue.

    Example: vaflow search affwild2.cache --space space.toml --trials 50 --out search
    """
    check_engine(engine, ray_address)
    from vaflow.cache import open_cache

    opened = open_cache(cache)
    with loading(output):
        from vaflow.train.search import run_nested_search, run_search
        from vaflow.train.search_space import SearchOptions, read_space

    options = SearchOptions(sampler, folds, train, holdout, seed, halving, device, allow_missing, batch, together)
    if outer_folds and (train, holdout) != (SearchOptions.train, SearchOptions.holdout):
        raise UsageError(explain("--outer-folds divides all clips", expected="no --train and no --holdout"))

    arguments = (opened, read_space(space), trials, out, options)
    shown: dict[str, Any] = {
        "engine": engine,
        "ray_address": ray_address,
        "level": output.worker_level,
        "on_trial": lambda trial: None if output.quiet else _print_trial(trial, trials),
        "on_choice": lambda text: None if output.quiet else echo(text, err=True),
    }
    if outer_folds:
        nested = run_nested_search(*arguments, outer_folds, **shown)
        output.result(nested.document, lambda: nested_summary(nested))
        _print_warnings(nested.searches, output)
        return 0
    result = run_search(*arguments, **shown)
    output.result(result.document, lambda: search_summary(result, options.holdout))
    _print_warnings([result], output)
    return FAILED if result.best is None else 0


def _print_warnings(searches: "Sequence[SearchResult]", output: Output) -> None:
    """Print the warnings about the scores on held-out splits; --json has them in the document."""
    for warning in () if output.json or output.quiet else [text for search in searches for text in search.warnings]:
        echo(visible(f"warning: {warning}"), err=True)


def _print_trial(trial: "Trial", trials: int) -> None:
    text = f"failed: {trial.message}" if trial.message else f"mean CCC {trial.score:.3f}, {trial.state}"
    values = ", ".join(f"{name}={value}" for name, value in trial.values.items())
    echo(visible(f"{trial.number}/{trials}  {text} ({trial.seconds:.0f} s): {values}"), err=True)
    sys.stderr.flush()


def nested_summary(result: "NestedResult") -> str:
    """The winner of each outer fold, and the mean of their scores on these folds."""
    lines = []
    for fold, search in enumerate(result.searches, 1):
        values = "" if search.best is None else " ".join(f"{k}={v}" for k, v in search.best.values.items())
        lines.append(f"outer fold {fold}: {values}; CCC mean {result.holdout['mean'][fold - 1]:.3f}")
    for name, scores in result.holdout.items():
        lines.append(f"CCC {name}: {mean(scores):.3f} +- {stdev(scores):.3f} over {len(scores)} outer folds")
    return "\n".join(map(visible, [*lines, f"see {result.file}"]))


def search_summary(result: "SearchResult", holdout: str) -> str:
    """The winner, its scores, and the importance of the settings."""
    if result.best is None:
        return visible(f"No trial was trained for all its epochs; see {result.files['csv']}")
    values = " ".join(f"{name}={value}" for name, value in result.best.values.items())
    lines = [
        f"best of {len(result.trials)} trials: {result.best.number}, {values}",
        f"mean CCC over the folds: {result.best.score:.3f} (selected by it: optimistic)",
    ]
    for name, scores in result.holdout.items():
        lines.append(f"CCC {name} on {holdout}: {sum(scores) / len(scores):.3f}, mean of {len(scores)} models")
    if result.importance:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in result.importance.items())
        lines.append(f"importance: {shares}")
    lines.append(f"see {result.files['html']}; train with --config {result.files['config']}")
    return "\n".join(map(visible, lines))


FoldCount = Annotated[int, option("K", "Number of folds.", "--folds")]
FoldSplits = Annotated[
    list[str] | None, option("SPLIT", "Split to divide. Repeatable.", "--split", default="train and val")
]
FoldGroups = Annotated[
    str | None,
    option(
        "FILE:COLUMN",
        "Column whose groups stay in one fold, as groups.csv:speaker.",
        "--fold-groups",
        default="source video",
    ),
]


def folds(
    output: Output, cache: Cache, count: FoldCount = 5, splits: FoldSplits = None, groups: FoldGroups = None
) -> int:
    """Show the folds of a cross-validation, as `vaflow train --folds K --fold I` uses them.

    The clips of a source video (_left and _right) stay in one fold. Folds have about equal numbers of labelled frames
    and are the same every time.

    Example: vaflow folds affwild2.cache --folds 5

    Example: vaflow folds affwild2.cache --folds 5 --fold-groups groups.csv:speaker
    """
    from vaflow.cache import open_cache
    from vaflow.train.config import TrainConfig
    from vaflow.train.folds import make_folds, read_column, warn_unknown

    opened = open_cache(cache)
    members = read_column(groups) if groups else None
    if members is not None:
        warn_unknown({"": members}, opened)
    parts = make_folds(opened, tuple(splits or TrainConfig.fold_splits), count, members)
    noun = "videos" if groups is None else groups.rpartition(":")[2]
    facts = [
        {"fold": k, noun: list(part.groups), "clips": list(part.items), "labelled_frames": part.labelled}
        for k, part in enumerate(parts, 1)
    ]
    if output.json:
        print_json(facts)
    elif not output.quiet:
        used = Counter(str(opened.meta(item).get("split") or "none") for part in parts for item in part.items)
        echo(f"Clips divided: {', '.join(f'{n} of split {name}' for name, n in sorted(used.items()))}\n")
        rows = [(k, len(part.groups), len(part.items), part.labelled) for k, part in enumerate(parts, 1)]
        echo(table(rows, ("fold", noun, "clips", "labelled frames")))
        if output.verbose:
            for k, part in enumerate(parts, 1):
                echo(f"\nfold {k}: {', '.join(part.items)}")
    return 0
