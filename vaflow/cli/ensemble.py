"""`vaflow ensemble`."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars, table
from vaflow.cli.train import AllowMissing, summary


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
