"""`vaflow view`: a page with the clips, their traces and the valence-arousal plane."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up

MediaOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", help="Directory or file with the clips; searched by recorded name and size. Repeatable."
    ),
]


def view(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|PREDICTIONS", help="Run directory, directory of predictions, or one CSV.")
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
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Write a page that plays clips with their predicted traces; it opens from disk without a network.

    Example: vaflow view runs/full --media affwild2/raw_videos --out view
    """
    set_up(verbose, quiet)
    from vaflow.viewer.page import ViewConfig, write_viewer

    viewer = write_viewer(path, out, clips or (), ViewConfig(tuple(media or ()), cache, copy))
    if json:
        print_json({"page": str(viewer.page), "clips": [clip.facts for clip in viewer.clips]})
    elif not quiet:
        typer.echo(f"{len(viewer.clips)} clip(s): {viewer.page}")
    return 0
