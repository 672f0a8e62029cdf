"""Options and arguments that several commands share, each declared once."""

from copy import copy
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import ParameterInfo


def variant(option: Any, **attributes: Any) -> ParameterInfo:
    """Return a copy of a shared option with other attributes, such as its help or the panel that lists it."""
    info: ParameterInfo = copy(get_args(option)[1])
    vars(info).update(attributes)
    return info


def _show_all(ctx: typer.Context, value: bool) -> None:
    if not value:
        return
    command = copy(ctx.command)
    command.epilog, command.params = None, [copy(parameter) for parameter in command.params]
    for parameter in command.params:
        parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(command.get_help(ctx))
    raise typer.Exit


# Of every command
HelpAll = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and setting, then exit."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print details.")]

# Datasets and caches
Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Root directory of the dataset.", show_default=False)]
Layout = Annotated[
    str,
    typer.Option(
        "--layout", metavar="NAME", help="Layout of the dataset: auto, affwild2, afew-va, recola, sewa, muse or videos."
    ),
]
Cache = Annotated[
    Path, typer.Argument(metavar="CACHE", help="Cache directory, as written by `vaflow extract`.", show_default=False)
]
CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Cache directory or URL.", show_default=False)]
NewCache = Annotated[Path, typer.Argument(metavar="OUT", help="Cache to write.", show_default=False)]
MovedCache = Annotated[
    Path | None,
    typer.Option(metavar="CACHE", help="Current place of the run's cache.", show_default="the run's"),
]
Store = Annotated[str | None, typer.Option(metavar="STORE", help="Store of a new cache: zarr or hdf5.")]

# Runs
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory, as written by `vaflow train`.", show_default=False)
]
RunOrEnsemble = Annotated[
    Path, typer.Argument(metavar="RUN", help="Directory of a run or an ensemble.", show_default=False)
]
ModelOutputs = Annotated[
    str | None,
    typer.Option(metavar="V,A", help="Outputs that are valence and arousal, where RUN is a model (onnx:FILE)."),
]
Aliases = Annotated[
    list[str] | None,
    typer.Option("--alias", metavar="NAME=OTHER", help="Use stream OTHER where a table names NAME. Repeatable."),
]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Score a split even if labelled clips have no features.")
]

# Encoders and hardware
Weights = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="Local weights of an encoder, instead of the hub's. Repeatable."),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")]
Engine = Annotated[str, typer.Option("--engine", metavar="NAME", help="local, or ray (all nodes of a Ray cluster).")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster to join: auto, HOST:PORT or ray://HOST:PORT; local starts one here.",
    ),
]
Together = Annotated[
    str,
    typer.Option(metavar="WHEN", help="Train runs of one architecture in one batch: auto (if faster), always, never."),
]
