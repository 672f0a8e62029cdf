"""`vaflow demo`: the whole pipeline on synthetic clips."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import echo, loading, print_json, set_up, show_bars
from vaflow.cli.options import JsonFlag, Quiet, Verbose

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the data, cache, run and pictures.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Random seed (synthetic data and training).")]
Clips = Annotated[int, typer.Option(min=3, metavar="N", help="Labelled clips; two thirds are for training.")]


def demo(
    out: Out = Path("demo"),
    seed: Seed = 0,
    clips: Clips = 24,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Run the whole pipeline on synthetic clips in about two minutes; no data, no download.

    Writes clips in the layout of Aff-Wild2 (DIR/data), encodes them with small random encoders (DIR/cache), trains the
    full model (DIR/run), scores it on unseen people and draws the predictions (DIR/run/pictures).

    Example: vaflow demo --out demo

    Example: vaflow demo --out large --clips 60
    """
    set_up(verbose, quiet)
    with loading(quiet or json):
        from vaflow.demo.writer import describe, run_demo

    result = run_demo(out, seed=seed, clips=clips, show_progress=show_bars(quiet))
    if json:
        print_json(result.metrics)
    elif not quiet:
        echo(describe(result))
    return 0
