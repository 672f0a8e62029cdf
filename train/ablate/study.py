"""`vaflow ablate` as one function: plan, train what is not there, measure, write."""

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vaflow.cache import Cache
from vaflow.failures import FAILURES, Failure, write_failures
from vaflow.files import lock_folder, write_file
from vaflow.train.ablate.grid import Study
from vaflow.train.ablate.page import html_page
from vaflow.train.ablate.plan import Job, Options, Plan, add_command, make_plan
from vaflow.train.ablate.pool import RUNS, Ended, Outcome, run_jobs
from vaflow.train.ablate.report import About, csv_text, markdown
from vaflow.train.ablate.results import Results, collect
from vaflow.train.ablate.statistics import moments_file
from vaflow.train.runs import RunFolder

OnPlan = Callable[[Plan, int], None]
OnRun = Callable[[Outcome], None]


@dataclass(frozen=True)
class StudyResult:
    """What a call of `run_study` came to.

    Attributes:
        results: every table.
        about: how it was made.
        files: "csv", "markdown", "html", and "tables" (a copy of the tables, to edit) -> path.
        failures: what did not work, as in `failures_file`.
        to_add: the command that adds every stream that rows lack; empty: none is lacking.
    """

    results: Results
    about: About
    files: Mapping[str, Path]
    failures: Sequence[Failure] = ()
    failures_file: Path | None = None
    to_add: str = ""


def run_study(
    cache: Cache,
    study: Study,
    names: Sequence[str],
    out: Path,
    options: Options,
    *,
    processes: int = 1,
    level: int = logging.ERROR,
    on_plan: OnPlan | None = None,
    on_run: OnRun | None = None,
) -> StudyResult:
    """Train every configuration of the chosen tables with every seed, and write `results.csv`, `.md` and `.html`.

    Runs are stored in `out/runs/<hash>`; finished runs are reused, interrupted ones resume.

    Args:
        cache: what to train on.
        study: the tables and the full model.
        names: which tables; none or "all": every one.
        out: the study's folder.
        options: seeds, overrides, aliases.
        processes: runs at once.
        level: of log lines that are shown while runs go on.
        on_plan: told the plan and how many runs of it are to be done; on_run: told of every run that ends.

    Raises:
        UsageError: tables, aliases or settings that do not fit, or another process works in this folder.
        CorruptError: a finished run is damaged.
    """
    begun = time.perf_counter()
    plan = make_plan(cache, study, names, options)
    with lock_folder(out, "vaflow ablate"):
        todo = [job for job in plan.jobs if not _done(out, job)]
        if on_plan is not None:
            on_plan(plan, len(todo))
        runs = run_jobs(todo, cache, out, processes=processes, allow_missing=options.allow_missing, level=level)
        failures = _failed(runs, on_run)
        results = collect(plan, out, failures)
        about = About(
            cache=cache.place,
            options=options,
            trained=len(todo) - len(failures),
            reused=len(plan.jobs) - len(todo),
            seconds=time.perf_counter() - begun,
        )
        return _write(cache, out, study, plan, results, about, failures)


def _failed(runs: Generator[Outcome, None, None], on_run: OnRun | None) -> dict[str, Ended]:
    """Let all runs go to their ends; by hash, those that failed."""
    failures = {}
    with closing(runs):
        for outcome in runs:
            if outcome.ended.error:
                failures[outcome.job.key] = outcome.ended
            if on_run is not None:
                on_run(outcome)
    return failures


def _done(out: Path, job: Job) -> bool:
    run = out / RUNS / job.key
    return RunFolder(run).done and moments_file(run).is_file()


def _write(
    cache: Cache, out: Path, study: Study, plan: Plan, results: Results, about: About, failed: Mapping[str, Ended]
) -> StudyResult:
    texts = {
        "csv": ("results.csv", csv_text(results)),
        "markdown": ("results.md", markdown(results, about)),
        "html": ("results.html", html_page(results, about)),
    }
    files = {"tables": out / "tables.toml"}
    write_file(files["tables"], study.text)
    for kind, (name, text) in texts.items():
        files[kind] = out / name
        write_file(files[kind], text)
    failures = _failures(plan, failed)
    path = out / FAILURES
    write_failures(path, failures)
    missing = [pair for entry in (*plan.entries, plan.reference) for pair in entry.missing]
    to_add = add_command(cache, missing) if missing else ""
    return StudyResult(results, about, files, failures, path if failures else None, to_add)


def _failures(plan: Plan, failed: Mapping[str, Ended]) -> list[Failure]:
    """One object per row that could not be planned, and per run that failed."""
    found = []
    for entry in (*plan.entries, plan.reference):
        place = {"table": entry.row.table, "row": entry.row.name}
        item = " / ".join(part for part in place.values() if part)
        if entry.problem:
            found.append(Failure(item, "plan", entry.error, entry.problem, place))
        for seed, key in enumerate(entry.keys, entry.config.seed):
            if key in failed:
                run = failed[key]
                found.append(Failure(f"{item} / seed {seed}", "train", run.error, run.message, place | {"run": key}))
    return found
