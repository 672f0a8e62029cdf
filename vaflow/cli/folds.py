"""`vaflow folds`."""

from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, table
from vaflow.cli.train import Cache


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
