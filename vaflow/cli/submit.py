"""`vaflow submit`."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars
from vaflow.cli.train import RunOrEnsemble


def submit(
    run: RunOrEnsemble,
    sample: Annotated[
        Path, typer.Option(metavar="FILE", help="The challenge's sample submission.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The submission to write.", show_default=False)],
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Where the trials' features are; the run's cache.")
    ] = None,
    hold: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Frames beyond a clip's end that repeat its last prediction, instead of failing."
        ),
    ] = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Write the file that the ABAW challenge takes: a prediction for every row of its sample, in the sample's order.

    Nothing is written when a row of the sample has no prediction. FILE.sources.json says what was made of what.

    Example: vaflow submit runs/full --cache affwild2.cache --sample VA_test_set_sample.txt --out predictions.txt
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.train.ensemble import members_of
    from vaflow.train.runs import require_record
    from vaflow.train.submit import submit_run

    path = cache if cache is not None else Path(require_record(members_of(run)[0][0]).cache)
    done = submit_run(run, open_cache(path), sample, out, hold=hold, device=device, show=show_bars(quiet or json))
    if json:
        print_json({"rows": done.rows, "trials": done.trials, "held": done.held, "file": str(out)})
    elif not quiet:
        held = f"; {done.held} of them beyond the end of their clips, held" if done.held else ""
        typer.echo(f"{done.rows} rows of {done.trials} trials{held}: {out}")
    return 0
