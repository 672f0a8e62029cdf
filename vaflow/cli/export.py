"""`vaflow export`: a run to share, or predictions for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up
from vaflow.errors import UsageError, count, explain, visible


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run; with --format also a folder of predictions.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory.", show_default=False)],
    formats: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="NAMES", help="Export predictions: csv, eaf, parquet, textgrid, separated by commas."
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write the heads as ONNX: heads.onnx and heads-fixed.onnx.")
    ] = False,
    step: Annotated[
        float, typer.Option(metavar="SECONDS", help="Length of the intervals in ELAN and Praat files.")
    ] = 0.5,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Export a run to share in the layout of the Hugging Face hub; or, with --format, predictions.

    `vaflow predict DIR` uses an exported run: config.json, model.safetensors and README.md, a model card to complete.

    Formats: `csv` writes clips.csv, a row per clip; `parquet` predictions.parquet, the frames of all clips; `eaf` and
    `textgrid` one file per clip, for ELAN and Praat.

    Example: vaflow export runs/full shared

    Example: vaflow export predictions tables --format csv,eaf,textgrid
    """
    set_up(verbose, quiet)
    if formats is not None:
        from vaflow.viewer.exports import export_predictions

        if onnx:
            raise UsageError(explain("--onnx exports a run, --format predictions", remedy="Use two commands"))
        names = [name.strip() for name in formats.split(",") if name.strip()]
        files = export_predictions(source, out, names, step)
    else:
        from vaflow.train.published import export_run

        files = export_run(source, out)
        if onnx:
            from vaflow.train.onnx_heads import export_onnx

            files += export_onnx(source, out)
    if json:
        print_json([str(file) for file in files])
    elif not quiet:
        typer.echo(f"Wrote {count(len(files), 'file')}: {visible(str(out))}")
    return 0
