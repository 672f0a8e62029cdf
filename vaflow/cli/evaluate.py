"""`vaflow evaluate`, `vaflow folds` and `vaflow ensemble`: score finished runs and show cross-validation folds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.common import AllowMissing, Cache, JsonFlag, Quiet, Run, Verbose, print_json, set_up, show_bars, table
from vaflow.errors import UsageError, explain


def evaluate(
    run: Run,
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Another cache than the run was trained on.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="Which split; the run's validation split.")] = None,
    smooth: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="mean or savgol: smooth this run's predictions from now on; none: no longer do so."
        ),
    ] = None,
    smooth_seconds: Annotated[
        str,
        typer.Option(metavar="SECONDS", help="Width of the smoothing; auto: the best on the run's validation split."),
    ] = "auto",
    without: Annotated[
        str | None, typer.Option(metavar="MODALITY", help="visual or audio: mark that modality as missing everywhere.")
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV with item and columns such as gender, age: metrics of each group."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    allow_missing: AllowMissing = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Score a run on every annotated frame of a split: concordance with its interval, within videos, errors.

    Predictions are written to RUN/predictions/SPLIT/. A smoothing is kept in RUN/smoothing.json, and `predict` and
    `submit` apply it, too.

    Example: vaflow evaluate runs/full --split val --json

    Example: vaflow evaluate runs/full --smooth savgol --smooth-seconds auto

    Example: vaflow evaluate runs/full --without audio --groups groups.csv
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.train.breakdown import read_groups
    from vaflow.train.runs import require_record
    from vaflow.train.training import evaluate_run

    path = cache if cache is not None else Path(require_record(run).cache)
    opened, bars = open_cache(path), show_bars(quiet or json)
    named = read_groups(groups) if groups else None
    if smooth is not None:
        from vaflow.train.smoothing_choice import set_smoothing

        set_smoothing(run, opened, smooth, smoothing_width(smooth_seconds), device=device, show=bars)
    metrics = evaluate_run(
        *(run, opened, split),
        device=device,
        allow_missing=allow_missing,
        show=bars,
        without=without,
        groups=named,
    )
    if json:
        print_json(metrics)
    else:
        typer.echo(summary(metrics))
        for kind, parts in metrics.get("by_group", {}).items():
            typer.echo(f"\n{group_table(kind, parts)}")
        for warning in metrics["warnings"]:
            typer.echo(f"warning: {warning}", err=True)
    return 0


def summary(metrics: dict[str, Any]) -> str:
    """The metrics as a table for people."""
    names = ("valence", "arousal", "mean")
    interval = [_span(metrics["ci95"][name]) for name in names]
    within = metrics["within_video_ccc"]
    rows = [
        ("CCC", *(_digits(metrics["ccc"][name]) for name in names)),
        ("95 % interval", *interval),
        ("CCC within videos", *(_digits(within[name]) for name in names)),
        ("Pearson", *(_digits(metrics["pearson"][name]) for name in names)),
        ("RMSE", *(_digits(metrics["rmse"][name]) for name in names)),
    ]
    scope = f"{metrics['split']}: {metrics['n_frames']} labelled frames of {metrics['n_videos']} videos"
    lost = metrics["missing"]["frames"]
    if lost or metrics["missing"]["clips"]:
        scope += f"; left out: {lost} frames, {len(metrics['missing']['clips'])} clips without features"
    if "without" in metrics:
        scope += f"; without {metrics['without']}"
    if "smoothing" in metrics:
        scope += "; smoothed: {kind}, {seconds:g} s".format(**metrics["smoothing"])
        if metrics["smoothing"]["chosen_on"] == metrics["split"]:
            scope += ", chosen on these very labels: the score flatters"
    return f"{scope}\n\n{table(rows, ('', *names))}"


def group_table(kind: str, parts: dict[str, Any]) -> str:
    """One kind of group as a table for people."""
    names = ("valence", "arousal", "mean")
    rows = [
        (group, part["n_clips"], part["n_frames"], *(_digits(part["ccc"][name]) for name in names))
        for group, part in parts.items()
    ]
    return table(rows, (kind, "clips", "frames", *(f"CCC {name}" for name in names)))


def smoothing_width(text: str) -> float | None:
    """What --smooth-seconds says; None: auto.

    Raises:
        UsageError: neither auto nor a number.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(explain("--smooth-seconds is not a width", expected="seconds, or auto", got=text)) from error


def _span(edges: Sequence[float | None]) -> str:
    return "-" if None in edges else "..".join(_digits(edge) for edge in edges)


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def folds(
    cache: Cache,
    count: Annotated[int, typer.Option("--folds", metavar="K", help="How many parts.")] = 5,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="SPLIT", help="Divide the clips of this split. Repeatable. [train, val]"),
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Show the parts of a cross-validation, as `vaflow train --folds K --fold I` takes them.

    A source video is never divided: its _left and _right stay together. Parts have about as many labelled frames each,
    and are the same every time.

    Example: vaflow folds affwild2.cache --folds 5
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.train.config import TrainConfig
    from vaflow.train.folds import make_folds

    parts = make_folds(open_cache(cache), splits or TrainConfig().fold_splits, count)
    facts = [
        {"fold": k, "videos": list(part.groups), "clips": list(part.items), "labelled_frames": part.labelled}
        for k, part in enumerate(parts, 1)
    ]
    if json:
        print_json(facts)
        return 0
    rows = [(k, len(part.groups), len(part.items), part.labelled) for k, part in enumerate(parts, 1)]
    typer.echo(table(rows, ("fold", "videos", "clips", "labelled frames")))
    if verbose:
        for k, part in enumerate(parts, 1):
            typer.echo(f"\nfold {k}: {', '.join(part.items)}")
    return 0


def ensemble(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Finished runs.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the ensemble.", show_default=False)],
    weights: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="mean; ccc: in proportion to each run's CCC, per dimension; "
            "search: those with the best CCC, per dimension.",
        ),
    ] = "mean",
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Another cache than the first run was trained on.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="Which split; the runs' validation split.")] = None,
    weights_split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Where ccc and search look; the runs' validation split.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    allow_missing: AllowMissing = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Average the predictions of several runs, frame by frame; their windows and streams may differ.

    Writes DIR/predictions/SPLIT/, DIR/metrics.json and DIR/ensemble.json (the weights). Weights that are found on the
    split that is scored flatter the score: name another with --weights-split where there is one.

    Example: vaflow ensemble runs/full runs/tcn runs/seed1 --out runs/ensemble --weights ccc
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.train.ensemble import ensemble_runs

    made, metrics = ensemble_runs(
        runs,
        out,
        weights,
        cache=None if cache is None else open_cache(cache),
        split=split,
        weights_split=weights_split,
        device=device,
        allow_missing=allow_missing,
        show=show_bars(quiet or json),
    )
    if json:
        print_json(metrics)
    elif not quiet:
        rows = [(run, *(f"{w:.3f}" for w in row)) for run, row in zip(runs, made.table.tolist(), strict=True)]
        typer.echo(f"{summary(metrics)}\n\n{table(rows, ('weights', 'valence', 'arousal'))}")
    if not json:
        for warning in metrics["warnings"]:
            typer.echo(f"warning: {warning}", err=True)
    return 0
