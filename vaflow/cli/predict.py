"""`vaflow predict`: a trained run on new clips.

`vaflow submit`.
"""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import (
    JsonFlag,
    Quiet,
    RunOrEnsemble,
    Verbose,
    print_json,
    set_up,
    show_bars,
    table,
    weight_pairs,
)

SOME_FAILED = 3


def predict(
    run: RunOrEnsemble,
    media: Annotated[list[Path], typer.Argument(metavar="MEDIA", help="Videos, or folders of videos.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for one CSV and one PNG per video.")],
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Local weights instead of the hub. Repeatable.")
    ] = None,
    faces: Annotated[str, typer.Option(metavar="HOW", help="auto, centerface or none; as for extract.")] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Keep the features in this cache, and reuse what it holds.")
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Valence and arousal for every frame of new videos: a CSV and a picture each.

    A video without sound, or stretches without a face, are predicted from what there is.

    Example: vaflow predict runs/full interview.mp4 --out predictions
    """
    set_up(verbose, quiet)
    from vaflow.predict import PredictConfig, predict_media

    config = PredictConfig(device=device, weights=weight_pairs(weights or []), face_source=faces, cache=cache)
    summary = predict_media(run, media, out, config, show_progress=show_bars(quiet))
    if json:
        print_json([{"item": p.item, "csv": str(p.csv), "png": str(p.png), **p.means} for p in summary.predicted])
    elif not quiet:
        rows = [
            (p.item, p.frames, f"{p.means['valence']:+.2f}", f"{p.means['arousal']:+.2f}", p.csv)
            for p in summary.predicted
        ]
        typer.echo(table(rows, ("clip", "frames", "mean valence", "mean arousal", "written")))
    if summary.failures:
        typer.echo(f"{len(summary.failures)} clip(s) failed: {summary.failures_file}", err=True)
        return SOME_FAILED if summary.predicted else 1
    return 0


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
    from vaflow.train.runs import cache_of
    from vaflow.train.submit import submit_run

    path = cache if cache is not None else cache_of(members_of(run)[0][0])
    done = submit_run(run, open_cache(path), sample, out, hold=hold, device=device, show=show_bars(quiet or json))
    if json:
        print_json({"rows": done.rows, "trials": done.trials, "held": done.held, "file": str(out)})
    elif not quiet:
        held = f"; {done.held} of them beyond the end of their clips, held" if done.held else ""
        typer.echo(f"{done.rows} rows of {done.trials} trials{held}: {out}")
    return 0
