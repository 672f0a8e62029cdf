"""`vaflow view`, `vaflow report` and `vaflow runs`: pages and tables about predictions and runs."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, table
from vaflow.errors import count

MediaOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", help="Directory or file with the clips; searched by recorded name and size. Repeatable."
    ),
]


def view(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|PREDICTIONS", help="Run, predictions (directory or CSV), or videos to rate.")
    ],
    clips: Annotated[list[str] | None, typer.Argument(metavar="CLIP", help="Clip ids to show (default: all).")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the page and its data.")] = Path("view"),
    media: MediaOption = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Read masks from this cache (default: the predictions' cache).")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the clips beside the page, so that it can be moved.")
    ] = False,
    boxes: Annotated[bool, typer.Option("--boxes", help="Detect faces and draw a box around the person.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine and save ratings made in it.")
    ] = False,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port for --serve (0: any free one).")] = 0,
    ratings: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for ratings of --serve (default: DIR/ratings).")
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Write a page that plays clips with their predicted traces; it opens from disk without a network.

    Example: vaflow view runs/full --media affwild2/raw_videos --out view
    """
    set_up(verbose, quiet)
    from vaflow.viewer.page import ViewConfig, write_viewer

    viewer = write_viewer(path, out, clips or (), ViewConfig(tuple(media or ()), cache, copy, boxes))
    if json:
        print_json({"page": str(viewer.page), "clips": [clip.facts for clip in viewer.clips]})
    elif not quiet:
        typer.echo(f"{count(len(viewer.clips), 'clip')}: {viewer.page}")
    if serve:
        from vaflow.viewer.server import ViewerServer

        with ViewerServer(viewer, ratings or out / "ratings", port) as server:
            typer.echo(f"Serving {server.address} until Ctrl-C; ratings go to {server.ratings}", err=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo("Stopped", err=True)
    return 0


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Finished runs; differences are against the first.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    viewer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Link clips to this page, as written by `vaflow view`.")
    ] = None,
    gates: Annotated[
        bool,
        typer.Option(
            "--gates",
            help="Show when the fusion lets audio in and what it attends to (runs the models again).",
        ),
    ] = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Write one HTML file about runs: scores with intervals, learning curves, clips, errors in the plane.

    Example: vaflow report runs/full runs/visual --out report.html
    """
    set_up(verbose, quiet)
    from vaflow.viewer.report import paired_differences, write_report

    shown = write_report(runs, out, viewer, gates=gates)
    if json:
        scores = [{"run": str(run.path), "ccc": run.metrics["ccc"], "ci95": run.metrics.get("ci95")} for run in shown]
        print_json({"page": str(out), "runs": scores, "differences": paired_differences(shown)})
    elif not quiet:
        typer.echo(f"{count(len(shown), 'run')}: {out}")
    return 0


def runs(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that is searched for runs.")] = Path(),
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """List the runs below a directory with their scores.

    Example: vaflow runs runs
    """
    set_up(verbose, quiet)
    from vaflow.viewer.run_results import list_runs

    lines = list(list_runs(root))
    if json:
        print_json([vars(line) for line in lines])
        return 0
    rows = []
    for line in lines:
        interval = line.ci95.get("mean") or (None, None)
        scores = [
            "-" if x is None else f"{x:.3f}" for x in (*map(line.ccc.get, ("valence", "arousal", "mean")), *interval)
        ]
        seed = "-" if line.seed is None else line.seed
        rows.append((line.path, line.status, *scores, line.split, line.temporal, line.fusion, seed, line.streams))
    heads = (
        "run",
        "status",
        "valence",
        "arousal",
        "CCC mean",
        "95% low",
        "95% high",
        "split",
        "temporal",
        "fusion",
        "seed",
    )
    typer.echo(table(rows, (*heads, "streams")) if rows else f"No runs below {root}")
    return 0
