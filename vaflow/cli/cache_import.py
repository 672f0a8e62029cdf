"""`vaflow cache import`: features made elsewhere become a stream.

`vaflow cache targets`: expression classes and action units become a stream.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaflow.cli.cache import CachePath
from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars, summary_json

if TYPE_CHECKING:
    from vaflow.extract.importing.features import ImportSummary

SOME_FAILED = 3


def import_(
    cache: CachePath,
    stream: Annotated[
        str, typer.Option(metavar="NAME", help="What the features are called in the cache.", show_default=False)
    ],
    kind: Annotated[str, typer.Option(metavar="KIND", help="visual or audio.", show_default=False)],
    folder: Annotated[
        Path,
        typer.Option(
            "--from",
            metavar="DIR",
            help="<item>.npy [T, D] with <item>.time.npy [T] (seconds), or <item>.csv with a column time.",
            show_default=False,
        ),
    ],
    rate: Annotated[
        float | None, typer.Option(metavar="HZ", help="Rows per second, for items without times of their own.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="<item>.csv with time or frame, and valence and/or arousal; splits.csv with name,split.",
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="STORE", help="zarr or hdf5, of a new cache.", show_default="zarr")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float16 or float32, of stored features.")] = "float16",
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Bring features made elsewhere into a cache, made if there is none. Run it again to resume or to take changes.

    Rows with NaN are marked as missing. With `frame`, labels count the rows of the features from 0.

    Example: vaflow cache import my.cache --stream egemaps --kind audio --from egemaps/ --rate 10 --labels labels/
    """
    set_up(verbose, quiet)
    from tqdm import tqdm

    from vaflow.extract.importing.features import ImportConfig, import_features

    config = ImportConfig(stream, kind, rate, dtype)
    with tqdm(unit="item", desc="import", disable=not show_bars(quiet)) as bar:
        summary = import_features(cache, folder, config, labels=labels, store=store, progress=bar.update)
    if json:
        print_json(_document(config.stream, summary))
    elif not quiet:
        typer.echo(_describe(config.stream, summary))
    if summary.failures:
        typer.echo(f"{len(summary.failures)} item(s) failed: {summary.failures_file}", err=True)
        return SOME_FAILED if summary.imported or summary.done or summary.labelled else 1
    return 0


def _describe(stream: str, summary: "ImportSummary") -> str:
    lines = [f"Imported {summary.imported} item(s) into stream {stream!r}, {summary.rows} rows."]
    if summary.done:
        lines.append(f"{summary.done} item(s) were there already.")
    if summary.changed:
        lines.append(f"{summary.changed} item(s) were replaced because their files have changed.")
    if summary.masked:
        lines.append(f"{summary.masked} row(s) hold NaN or infinity and are marked as missing.")
    lines.append(f"Labels or clocks of {summary.labelled} item(s) were written.")
    return "\n".join(lines)


def _document(stream: str, summary: "ImportSummary") -> dict[str, object]:

    return {"stream": stream} | summary_json(summary)


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
