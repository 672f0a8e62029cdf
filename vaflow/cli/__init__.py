"""The `vaflow` command. Each command parses, calls one library function, and prints; errors are mapped here, once.

Command modules import nothing heavy at the top: `vaflow --help` answers at once.
"""

import os
import sys
from collections.abc import Sequence

import typer

from vaflow.cli import (
    ablate,
    cache,
    cache_copy,
    cache_import,
    cache_prompts,
    cache_targets,
    check,
    demo,
    ensemble,
    extract,
    folds,
    predict,
    submit,
    trace,
    train,
)
from vaflow.errors import VaflowError

INTERRUPTED = 130

app = typer.Typer(
    name="vaflow",
    help="Valence and arousal from video with speech: encode once into a cache, train light heads on it.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich costs a quarter of a second at every start
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("check")(check.check)
app.command("extract")(extract.extract)
cache.app.command("convert")(cache_copy.convert)
cache.app.command("merge")(cache_copy.merge)
cache.app.command("prompts")(cache_prompts.prompts)
cache.app.command("import")(cache_import.import_)
cache.app.command("targets")(cache_targets.targets)
app.add_typer(cache.app, name="cache")
app.command("train")(train.train)
app.command("evaluate")(train.evaluate)
app.command("folds")(folds.folds)
app.command("ensemble")(ensemble.ensemble)
app.command("predict")(predict.predict)
app.command("ablate")(ablate.ablate)
app.command("submit")(submit.submit)
app.command("trace")(trace.trace)
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Options of the program itself."""
    if version:
        from vaflow import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 usage, 3 some items failed, 130 interrupted)."""
    # OpenMP threads that spin while they wait take the cores from our own decoders: measured 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        result = app(args=list(args) if args is not None else None, standalone_mode=False)
    except VaflowError as error:
        typer.echo(f"vaflow: {error}", err=True)
        return error.exit_code
    except typer.TyperException as error:
        show = getattr(error, "show", None)  # what Typer raises for bad usage can show itself with the usage line
        show() if show else typer.echo(f"vaflow: {error}", err=True)
        return int(getattr(error, "exit_code", 1))
    except BrokenPipeError:  # `vaflow ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if result == INTERRUPTED:  # what Typer makes of Ctrl-C
        typer.echo("vaflow: interrupted; run the same command again to go on where it stopped", err=True)
    return int(result or 0)


def entry() -> None:
    """The installed `vaflow` script."""
    sys.exit(main())
