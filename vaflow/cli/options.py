"""Options of the commands: those that several commands share, and those derived from settings."""

import inspect
from collections.abc import Callable
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import ParameterInfo

from vaflow.cli.common import Command, Output, heading
from vaflow.settings import Setting, settings_of


def option(metavar: str, help: str, *names: str, default: str | bool = True, **attributes: Any) -> ParameterInfo:
    """Return an option that takes a value; without `names`, its name is the parameter's.

    Args:
        metavar: placeholder of the value.
        help: one line.
        default: what the help page shows as the default; True: the default itself.
        attributes: further ones of `typer.Option`, such as limits.
    """
    info: ParameterInfo = typer.Option(*names, metavar=metavar, help=help, show_default=default, **attributes)
    return info


def flag(help: str, *names: str) -> ParameterInfo:
    """Return an option that takes no value."""
    info: ParameterInfo = typer.Option(*names, help=help)
    return info


def argument(metavar: str, help: str, default: str | bool = True) -> ParameterInfo:
    """Return an argument."""
    info: ParameterInfo = typer.Argument(metavar=metavar, help=help, show_default=default)
    return info


def variant(shared: Any, **attributes: Any) -> ParameterInfo:
    """Return a copy of an option, or of an annotation with one, with other attributes, such as its help."""
    info: ParameterInfo = copy(shared if isinstance(shared, ParameterInfo) else get_args(shared)[1])
    vars(info).update(attributes)
    return info


def grouped(panel: str, shared: Any, *, shown: bool = False, **attributes: Any) -> ParameterInfo:
    """Return a variant for the group `panel` of a long help page; unless `shown`, only --help-all lists it."""
    return variant(shared, rich_help_panel=panel, hidden=not shown, **attributes)


def _show_all(ctx: typer.Context, value: bool) -> None:
    if not value:
        return
    command = copy(ctx.command)
    command.epilog, command.params = None, [copy(parameter) for parameter in command.params]
    for parameter in command.params:
        parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(command.get_help(ctx))
    raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and setting, then exit."),
]
# Of every command; the fields of `Output`
OUTPUT = {
    "json": Annotated[bool, flag("Print one JSON document on standard output.", "--json")],
    "verbose": Annotated[bool, flag("Print details.", "--verbose", "-v")],
    "quiet": Annotated[bool, flag("Print errors only.", "--quiet", "-q")],
}

# Datasets and caches
Root = Annotated[Path, argument("ROOT", "Root directory of the dataset.")]
Layout = Annotated[
    str, option("NAME", "Layout of the dataset: auto, affwild2, afew-va, recola, sewa, muse or videos.", "--layout")
]
Cache = Annotated[Path, argument("CACHE", "Cache directory, as written by `vaflow extract`.")]
CachePath = Annotated[Path, argument("CACHE", "Cache directory or URL.")]
NewCache = Annotated[Path, argument("OUT", "Cache to write.")]
MovedCache = Annotated[Path | None, option("CACHE", "Current place of the run's cache.", default="the run's")]
Store = Annotated[str | None, option("STORE", "Store of a new cache: zarr or hdf5.")]

# Runs
RunPath = Annotated[Path, argument("RUN", "Run directory, as written by `vaflow train`.")]
RunOrEnsemble = Annotated[Path, argument("RUN", "Directory of a run or an ensemble.")]
RunOrPredictions = Annotated[Path, argument("RUN", "Directory of a run or an ensemble, or their predictions.")]
ModelOutputs = Annotated[
    str | None, option("V,A", "Outputs that are valence and arousal, where RUN is a model (onnx:FILE).")
]
Aliases = Annotated[
    list[str] | None, option("NAME=OTHER", "Use stream OTHER where a table names NAME. Repeatable.", "--alias")
]
AllowMissing = Annotated[bool, flag("Score a split even if labelled clips have no features.", "--allow-missing")]

# Encoders and hardware
Weights = Annotated[
    list[str] | None, option("NAME=PATH", "Local weights of an encoder, instead of the hub's. Repeatable.")
]
Device = Annotated[str, option("DEVICE", "auto, cpu or cuda[:N].")]
Engine = Annotated[str, option("NAME", "local, or ray (all nodes of a Ray cluster).", "--engine")]
RayAddress = Annotated[
    str | None,
    option(
        "ADDRESS", "Ray cluster to join: auto, HOST:PORT or ray://HOST:PORT; local starts one here.", "--ray-address"
    ),
]
Together = Annotated[
    str, option("WHEN", "Train runs of one architecture in one batch: auto (if faster), always, never.")
]


def with_options(command: Callable[..., int], config: type | None = None) -> Callable[..., int]:
    """Return a command for Typer whose options replace two parameters.

    Args:
        command: its parameter `output` stands for --json, --verbose and --quiet; its parameter `options`, a dictionary,
            receives the options of `config` that were given: setting -> value in the setting's type.
        config: each of its settings with an option adds that option.
    """
    described = {name: known for name, known in settings_of(config).items() if known.option} if config else {}

    @wraps(command)
    def wrapper(**arguments: Any) -> int:
        output = Output(*(arguments.pop(name) for name in OUTPUT))
        output.set_up()
        if config is not None:
            given = {name: arguments.pop(name) for name in described}
            given = {name: value for name, value in given.items() if value not in (None, [])}
            arguments["options"] = {name: described[name].coerce(value) for name, value in given.items()}
        return command(output=output, **arguments)

    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "options":
            parameters += [_parameter(name, _annotation(known), None) for name, known in described.items()]
        elif parameter.name != "output":
            parameters.append(_parameter(parameter.name, hints[parameter.name], parameter.default))
    parameters += [_parameter(name, annotation, False) for name, annotation in OUTPUT.items()]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": int}
    return wrapper


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(known: Setting) -> Any:
    """The Typer annotation of one setting. Values stay text: `Setting.coerce` converts them and words the errors."""
    option = typer.Option(
        known.option,
        metavar=None if known.flag else known.placeholder,
        help=known.summary,
        hidden=not known.shown,
        rich_help_panel=known.group.capitalize(),
    )
    kind: Any = bool if known.flag else list[str] if known.kind is tuple else str
    return Annotated[kind | None, option]


def command_class(config: type) -> type["Command"]:
    """A command class whose `--help-all` also lists the settings without an option."""

    class SettingsCommand(Command):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write the groups of options; with `--help-all`, the settings for `--set` as well."""
            super().format_options(ctx, formatter)
            if not any(getattr(parameter, "hidden", False) for parameter in self.params):
                settings = settings_of(config).values()
                rows = [(f"{s.name}={s.placeholder}", s.summary) for s in settings if not s.option]
                if rows:
                    with formatter.section(heading("Settings without an option (--set KEY=VALUE)")):
                        formatter.write_dl(rows, col_max=30 if formatter.width >= 60 else 4)

    return SettingsCommand


def epilog(config: type, page: str) -> str:
    """Return the note on options and settings that `--help` does not list."""
    known = settings_of(config).values()
    hidden = sum(bool(setting.option and not setting.shown) for setting in known)
    keys = sum(not setting.option for setting in known)
    settings = f" and {keys} settings (--set KEY=VALUE)" if keys else ""
    return f"{hidden} more options{settings}: --help-all, or {page}."
