"""`vaflow cache people`: another choice of people for a cache, without its videos."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.common import echo, print_json, report_failures, set_up, show_bars, summary_json, weight_pairs
from vaflow.cli.options import (
    CachePath,
    Device,
    JsonFlag,
    NewCache,
    Quiet,
    Store,
    Verbose,
    Weights,
    variant,
)
from vaflow.errors import count, visible

Person = Annotated[
    str | None,
    typer.Option(metavar="WHO", help="main, all, left, right, id:K or speaking.", show_default="the choice of CACHE"),
]
PersonTable = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="CSV with the columns clip,person: the person of single clips, or none to leave a clip out.",
        show_default=False,
    ),
]
Workers = Annotated[int, typer.Option(metavar="N", min=0, help="Reading processes (0: by number of CPU cores).")]
NewStore = Annotated[str | None, variant(Store, show_default="that of CACHE")]


def people(
    cache: CachePath,
    out: NewCache,
    person: Person = None,
    choices: PersonTable = None,
    weights: Weights = None,
    device: Device = "auto",
    workers: Workers = 0,
    store: NewStore = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Copy a cache with another choice of people. The videos are not needed. Run it again to resume.

    Features of people that CACHE does not hold are encoded from its stored crops; everything else is copied.

    Example: vaflow cache people main.cache left.cache --person left
    """
    set_up(verbose, quiet)
    from vaflow.extract.faces.choice import Choices, read_choices

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
    return report_failures(copied, clips)
