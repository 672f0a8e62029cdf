"""`vaflow ablate`: tables of configurations, each trained with several seeds, next to the published numbers.

tables.py has the tables, their runs and hashes, pool.py trains the runs in workers.py, results.py has the scores,
report.py the files.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.errors import UsageError, command, count, examples, explain
from vaflow.files import FAILURES, Failure, lock_folder, write_failures, write_file
from vaflow.train.ablate.pool import RUNS, Outcome, run_all
from vaflow.train.ablate.report import About, csv_text, html_page, markdown
from vaflow.train.ablate.results import Results, collect, compare_encoders
from vaflow.train.ablate.tables import Options, Schedule, Study, add_command, make_schedule
from vaflow.train.ablate.workers import Ended, moments_file
from vaflow.train.run_folder import RunFolder

OnSchedule = Callable[[Schedule, int], None]
OnRun = Callable[[Outcome], None]


@dataclass(frozen=True)
class StudyResult:
    """Result of `run_study`.

    Attributes:
        files: "csv", "markdown", "html", "tables" (a copy of the tables, to edit) and, for the table `encoders`,
            "encoders" -> path.
        failures: rows and runs that failed, as in `failures_file`.
        to_add: the command that adds the streams that rows need and the cache lacks; empty: none.
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
    on_schedule: OnSchedule | None = None,
    on_run: OnRun | None = None,
    **pool: Any,
) -> StudyResult:
    """Train every configuration of the chosen tables with every seed, and write `results.csv`, `.md` and `.html`.

    Runs are stored in `out/runs/<hash>`; finished runs are reused, interrupted ones resume.

    Args:
        names: of tables; none or "all": every one.
        on_schedule: called with the schedule and the number of runs to train; on_run: called after every run.
        pool: keyword arguments of `vaflow.train.ablate.pool.Pool`: processes, engine, ray_address, together, level,
            on_choice.

    Raises:
        UsageError: tables, aliases or settings are invalid, another process uses the folder, or a finished run was
            smoothed since.
        CorruptError: a finished run is damaged.
    """
    begun = time.perf_counter()
    RunFolder(out).refuse()
    schedule = make_schedule(cache, study, names, options)
    with lock_folder(out, "vaflow ablate"):
        folders = {run.key: out / RUNS / run.key for run in schedule.runs}
        finished = {key for key, run in folders.items() if RunFolder(run).done and moments_file(run).is_file()}
        _check_not_smoothed([folders[key] for key in sorted(finished)])
        todo = [run for run in schedule.runs if run.key not in finished]
        if on_schedule is not None:
            on_schedule(schedule, len(todo))
        runs = run_all(todo, cache, out, allow_missing=options.allow_missing, **pool)
        failed = {}
        with closing(runs):
            for outcome in runs:
                if outcome.ended.error:
                    failed[outcome.run.key] = outcome.ended
                if on_run is not None:
                    on_run(outcome)
        results = collect(schedule, out, failed)
        about = About(
            cache=cache.place,
            options=options,
            trained=len(todo) - len(failed),
            reused=len(schedule.runs) - len(todo),
            seconds=time.perf_counter() - begun,
        )
        return _write(cache, out, study, schedule, results, about, failed)


def _check_not_smoothed(runs: Sequence[Path]) -> None:
    """Raise UsageError if the scores of finished runs are of smoothed predictions: intervals and tests are not."""
    scores = {str(run): RunFolder(run).read_metrics() for run in runs}
    smoothed = [run for run, metrics in scores.items() if metrics.get("smoothing", {}).get("seconds")]
    if smoothed:
        problem = f"{count(len(smoothed), 'run')} of this study were smoothed and scored again: {examples(smoothed)}"
        remedy = f"For each: {command('smooth', smoothed[0], '--kind', 'none')} && {command('evaluate', smoothed[0])}"
        raise UsageError(explain(problem, expected="scores without smoothing", remedy=remedy))


def _write(
    cache: Cache,
    out: Path,
    study: Study,
    schedule: Schedule,
    results: Results,
    about: About,
    failed: Mapping[str, Ended],
) -> StudyResult:
    """Write the results and `failures.jsonl`."""
    encoders = compare_encoders(cache, results)
    texts = {
        "tables": ("tables.toml", study.text),
        "csv": ("results.csv", csv_text(results)),
        "markdown": ("results.md", markdown(results, about)),
        "html": ("results.html", html_page(results, about, encoders)),
    }
    if encoders is not None:
        texts["encoders"] = ("encoders.md", encoders.markdown())
    files = {kind: out / name for kind, (name, _) in texts.items()}
    for kind, (_, text) in texts.items():
        write_file(files[kind], text)
    failures = []  # a row that cannot be trained, or a failed run
    for entry in (*schedule.entries, schedule.reference):
        row = {"table": entry.row.table, "row": entry.row.name}
        item = " / ".join(part for part in row.values() if part)
        if entry.problem:
            failures.append(Failure(item, "plan", entry.error, entry.problem, row))
        for seed, key in enumerate(entry.keys, entry.config.seed):
            if key in failed:
                run = failed[key]
                failures.append(Failure(f"{item} / seed {seed}", "train", run.error, run.message, row | {"run": key}))
    path = out / FAILURES
    write_failures(path, failures)
    missing = [pair for entry in (*schedule.entries, schedule.reference) for pair in entry.missing]
    to_add = add_command(cache, missing) if missing else ""
    return StudyResult(results, about, files, failures, path if failures else None, to_add)
