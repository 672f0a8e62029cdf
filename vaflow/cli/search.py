"""`vaflow search`: random or Bayesian search over settings."""

import logging
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import FAILED, echo, loading, print_json, set_up
from vaflow.cli.options import (
    AllowMissing,
    Cache,
    Device,
    Engine,
    JsonFlag,
    Quiet,
    RayAddress,
    Together,
    Verbose,
)
from vaflow.errors import UsageError, explain, visible
from vaflow.ray_cluster import check_engine

if TYPE_CHECKING:
    from vaflow.train.search import SearchResult
    from vaflow.train.search.study import NestedResult
    from vaflow.train.search.trials import Trial


Space = Annotated[
    Path,
    typer.Option(metavar="FILE", help="TOML file of settings to search and settings to keep.", show_default=False),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory of trials and results.", show_default=False)]
Trials = Annotated[int, typer.Option(metavar="N", help="Trials in all, those of earlier calls included.")]
Sampler = Annotated[str, typer.Option(metavar="NAME", help="bayes (TPE) or random.")]
Folds = Annotated[int, typer.Option(metavar="K", help="Folds of the training split that score a trial.")]
Train = Annotated[str, typer.Option("--train", metavar="SPLIT", help="Split that the folds divide.")]
Holdout = Annotated[str, typer.Option(metavar="SPLIT", help="Split that scores the winner only.")]
Halving = Annotated[
    bool, typer.Option("--halving/--no-halving", help="Stop trials early that are not among the best third.")
]
OuterFolds = Annotated[
    int, typer.Option(metavar="K", help="Repeat the search for K outer folds and score on them (0: --holdout).")
]
Batch = Annotated[int, typer.Option(metavar="N", help="Trials that are proposed and trained at once.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Random seed of the proposals.", min=0)]


def search(
    cache: Cache,
    space: Space,
    out: Out,
    trials: Trials = 30,
    sampler: Sampler = "bayes",
    folds: Folds = 3,
    train: Train = "train",
    holdout: Holdout = "val",
    halving: Halving = True,
    outer_folds: OuterFolds = 0,
    batch: Batch = 4,
    together: Together = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    engine: Engine = "local",
    ray_address: RayAddress = None,
    allow_missing: AllowMissing = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Search for settings on the training split; score the winner on a split that no trial has seen.

    Writes trials.csv, search.json, search.html and best.toml, for `vaflow train --config`. Run it again to resume, or
    with more --trials to continue.

    Example: vaflow search affwild2.cache --space space.toml --trials 50 --out search
    """
    set_up(verbose, quiet)
    check_engine(engine, ray_address)
    from vaflow.cache import open_cache

    with loading(quiet):
        from vaflow.train.search import SearchOptions, run_nested_search, run_search
        from vaflow.train.search.trials import read_space

    options = SearchOptions(sampler, folds, train, holdout, seed, halving, device, allow_missing, batch, together)
    if outer_folds and (train, holdout) != (SearchOptions.train, SearchOptions.holdout):
        raise UsageError(explain("--outer-folds divides all clips", expected="no --train and no --holdout"))

    arguments = (open_cache(cache), read_space(space), trials, out, options)
    shown: dict[str, Any] = {
        "engine": engine,
        "ray_address": ray_address,
        "level": logging.DEBUG if verbose else logging.ERROR,
        "on_trial": lambda trial: None if quiet else _print_trial(trial, trials),
        "on_choice": lambda text: None if quiet else echo(text, err=True),
    }
    if outer_folds:
        nested = run_nested_search(*arguments, outer_folds, **shown)
        if json:
            print_json(nested.document())
        elif not quiet:
            echo(nested_summary(nested))
        return 0
    result = run_search(*arguments, **shown)
    if json:
        print_json(result.document())
    elif not quiet:
        echo(summary(result, options.holdout))
    return FAILED if result.best is None else 0


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


def summary(result: "SearchResult", holdout: str) -> str:
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
