"""Options of a command, built from the settings of its config dataclass, and help pages in groups."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from vaflow.cli.common import Command, heading
from vaflow.settings import Setting, settings_of


def with_settings(config: type) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Replace a command's parameter `options` by one option for each setting of `config` that has an option.

    The command receives `options`: setting -> value of the options that were given, in the setting's type.
    """
    described = {name: known for name, known in settings_of(config).items() if known.option}

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @wraps(command)
        def wrapper(**arguments: Any) -> int:
            given = {name: arguments.pop(name) for name in described}
            options = {name: described[name].coerce(value) for name, value in given.items() if value not in (None, [])}
            return command(**arguments, options=options)

        hints = get_type_hints(command, include_extras=True)
        hints |= {name: _annotation(known) for name, known in described.items()}
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            added = described if parameter.name == "options" else ()
            parameters += [parameter.replace(name=name, default=None) for name in added] or [parameter]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword, annotation=hints[p.name]) for p in parameters]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: hints[p.name] for p in parameters} | {"return": int}
        return wrapper

    return decorate


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


def _show_all(ctx: typer.Context, value: bool) -> None:
    if not value:
        return
    ctx.command.epilog = None
    for parameter in ctx.command.params:
        parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(ctx.get_help())
    raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and setting, then exit."),
]


def command_class(config: type) -> type[Command]:
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
