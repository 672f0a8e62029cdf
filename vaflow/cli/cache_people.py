"""`vaflow cache people`: another choice of people for a cache, without its videos."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.cache import SOME_FAILED, CachePath
from vaflow.cli.common import JsonFlag, Quiet, Verbose, echo, print_json, set_up, show_bars, summary_json, weight_pairs
from vaflow.errors import count, visible


def people(
    cache: CachePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Cache to write.", show_default=False)],
    person: Annotated[
        str | None,
        typer.Option(
            metavar="WHO", help="main, all, left, right, id:K or speaking.", show_default="the choice of CACHE"
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV with the columns clip,person: the person of single clips, or none to leave a clip out.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Local weights of an encoder, instead of the hub's. Repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    workers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Reading processes (0: by number of CPU cores).")
    ] = 0,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Store of a new cache: zarr or hdf5.", show_default="that of CACHE"),
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Copy a cache with another choice of people. The videos are not needed. Run it again to resume.

    Features of people that CACHE does not hold are encoded from its stored crops; everything else is copied.

    Example: vaflow cache people main.cache left.cache --person left
    """
    set_up(verbose, quiet)
    from vaflow.extract.choices import Choices, read_choices

    chosen = Choices(person, read_choices(choices) if choices is not None else {})
    options: dict[str, Any] = {"weights": weight_pairs(weights or []), "device": device, "workers": workers}
    from vaflow.cache import open_cache
    from vaflow.extract.chosen_people import choose_people

    encoded, copied = choose_people(
        open_cache(cache), out, chosen, options, store=store, show_progress=show_bars(quiet or json)
    )
    clips = encoded.extracted + encoded.done
    if json:
        print_json({**summary_json(copied), "clips": clips, "encoded": encoded.encoded})
    elif not quiet:
        parts = f"{count(encoded.extracted, 'clip')} encoded from stored crops, {encoded.done} copied or up to date"
        echo(visible(f"{out}: {parts}"))
    if copied.failures:
        echo(f"{count(len(copied.failures), 'clip')} failed: {copied.failures_file}", err=True)
        return SOME_FAILED if clips else 1
    return 0
