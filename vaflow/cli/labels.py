"""`vaflow labels`: labels of several annotators."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, table
from vaflow.errors import count

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compare and fuse labels of several annotators.")


def agree(
    root: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Ratings: ANNOTATOR/CLIP.csv or CLIP.ANNOTATOR.csv.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write fused labels here, one CSV per clip.")] = None,
    fuse: Annotated[str, typer.Option(metavar="HOW", help="mean, or ewe (evaluator-weighted estimator).")] = "mean",
    max_lag: Annotated[
        float, typer.Option(metavar="SECONDS", help="Estimate and remove reaction lags up to this (0: none).")
    ] = 0.0,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="PREDICTIONS", help="Run or predictions that lags are measured against."),
    ] = None,
    rate: Annotated[float, typer.Option(metavar="HZ", help="Instants per second for comparison and fusion.")] = 25.0,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Print how far annotators agree (CCC, ICC, Cohen's kappa of regions), and fuse their labels.

    Example: vaflow labels agree ratings --max-lag 4 --fuse ewe --out labels
    """
    set_up(verbose, quiet)
    from vaflow.viewer.ratings import AgreeConfig, compare_ratings, fuse_ratings, read_ratings

    config = AgreeConfig(rate, max_lag, fuse, reference)
    ratings = read_ratings(root)
    agreement = compare_ratings(ratings, config)
    written = fuse_ratings(ratings, agreement, config, out) if out is not None else []
    document = agreement.as_dict()
    if json:
        print_json({**document, "labels": [str(path) for path in written]})
        return 0
    names = list(agreement.icc["valence"])
    rows = [
        (d, f"{document['mean_ccc'][d]:.3f}", *(f"{agreement.icc[d][name]:.3f}" for name in names))
        for d in agreement.icc
    ]
    typer.echo(
        f"{count(len(agreement.clips), 'clip')}, {agreement.seconds:.0f} s, "
        f"rated by all {len(agreement.annotators)} annotators"
    )
    typer.echo(table(rows, ("dimension", "mean CCC", *names)))
    typer.echo(f"Cohen's kappa of the nine regions, mean over pairs: {agreement.kappa:.3f}")
    weights = [[f"{agreement.weights[d][name]:.3f}" for d in agreement.weights] for name in agreement.annotators]
    lines = [(n, f"{agreement.lags[n]:.2f}", *w) for n, w in zip(agreement.annotators, weights, strict=True)]
    typer.echo(table(lines, ("annotator", "lag (s)", "weight valence", "weight arousal")))
    if out is not None:
        typer.echo(f"{count(len(written), 'fused label file')}: {out}")
    return 0
