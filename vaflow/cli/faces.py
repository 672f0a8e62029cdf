"""`vaflow faces`: a contact sheet of the people in clips."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up
from vaflow.errors import UsageError, count, explain


def faces(
    path: Annotated[Path, typer.Argument(metavar="CACHE|MEDIA", help="Cache, video, or directory of videos.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Page to write; faces.csv is written beside it.")] = Path(
        "faces.html"
    ),
    media: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Directory or file with the videos of a cache, for the crops. Repeatable."),
    ] = None,
    several: Annotated[bool, typer.Option("--several", help="Show only clips with several people.")] = False,
    identity: Annotated[
        str, typer.Option(metavar="NAME", help="Network that joins tracks, for videos: auto, dlib, onnx:FILE or none.")
    ] = "auto",
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Write a page with every person of each clip: crops over time, quality, gaps and cuts; and all boxes as CSV.

    Example: vaflow faces affwild2.cache --media affwild2/raw_videos --out faces.html
    """
    set_up(verbose, quiet)
    from vaflow.viewer.people import write_people

    if not path.exists():
        raise UsageError(explain(f"{path} does not exist", expected="a cache, a video, or a directory of videos"))
    page = write_people(path, out, media or (), several=several, identity=identity)
    if json:
        print_json({"page": str(out), "table": str(page.table), "clips": page.facts()})
    elif not quiet:
        people = sum(len(clip.people) > 1 for clip in page.clips)
        typer.echo(f"{count(len(page.clips), 'clip')}, {people} with several people: {out}, {page.table}")
    return 0
