"""`vaflow cache targets`: expression classes and action units become a stream."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.cache import CachePath
from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up


def targets(
    cache: CachePath,
    stream: Annotated[
        str, typer.Option(metavar="NAME", help="What the targets are called in the cache.", show_default=False)
    ],
    task: Annotated[
        str, typer.Option(metavar="TASK", help="classes (one of several) or binary (each or not).", show_default=False)
    ],
    folder: Annotated[
        Path,
        typer.Option(
            "--from",
            metavar="DIR",
            help="<item>.csv or .txt, with time, frame (0-based) or a row per frame; -1: not annotated.",
            show_default=False,
        ),
    ],
    names: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names of the classes, with commas; the files' own.")
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Bring further annotation of a cache's clips into it; `vaflow train --set extra_targets=NAME` learns it, too.

    Files as the ABAW challenges have them are read as they are. Run it again to take changes.

    Example: vaflow cache targets affwild2.cache --stream expr --task classes --from EXPR_Set/Train_Set
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.extract.importing.targets import import_targets

    listed = [name.strip() for name in names.split(",")] if names else []
    done = import_targets(open_cache(cache, writable=True), stream, task, folder, listed)
    if json:
        facts = {"stream": stream, "names": list(done.names), "written": done.written, "done": done.done}
        print_json(facts | {"rows": done.rows})
    elif not quiet:
        there = f", {done.done} were there already" if done.done else ""
        typer.echo(f"{done.written} clips written{there}: {done.rows} annotated rows of {', '.join(done.names)}.")
    return 0
