"""`vaflow demo`: the whole pipeline on synthetic clips."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data, cache, run and pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the people, their feelings, and the training.")] = 0,
    clips: Annotated[int, typer.Option(min=3, metavar="N", help="Labelled clips; two thirds of them train.")] = 24,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """No data, no download: synthetic clips -> cache -> heads -> scores and pictures, in about two minutes.

    Writes clips in Aff-Wild2's layout (DIR/data), encodes them with tiny seeded encoders (DIR/cache), trains the full
    model (DIR/run), scores it on people that it has not seen, and draws what it says (DIR/run/pictures).

    Example: vaflow demo --out demo

    Example: vaflow demo --out large --clips 60
    """
    set_up(verbose, quiet)
    from vaflow.demo.run import describe, run_demo

    result = run_demo(out, seed=seed, clips=clips, show_progress=show_bars(quiet))
    if json:
        print_json(result.metrics)
    elif not quiet:
        typer.echo(describe(result))
    return 0
