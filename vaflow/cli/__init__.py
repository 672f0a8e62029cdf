"""The `vaflow` command: the subcommands, exit codes, and the mapping of errors to messages.

Each command parses its options, calls one library function and prints the result. Command modules import nothing heavy
at the top, so that `vaflow --help` takes a tenth of a second.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

import typer
from typer.main import get_command

from vaflow.cli import ablate, cache, cache_import, common, extract, predict, train, view
from vaflow.cli.common import PANELS, Command, CommandGroup, help_width, print_error, print_parser_error
from vaflow.cli.options import command_class, epilog, with_options
from vaflow.errors import FAILED, INTERRUPTED, TERMINATED, UsageError, VaflowError, explain, is_out_of_memory
from vaflow.extract.config import ExtractConfig
from vaflow.process import prepare_environment
from vaflow.train.config import TrainConfig

app = typer.Typer(
    name="vaflow",
    cls=CommandGroup,
    help="Estimate valence and arousal from video with speech.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 3 some items failed, 130 interrupted, 143 terminated. "
    "First steps: vaflow demo",
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich adds 0.25 s to every start
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
DATA, CACHE, MODEL, RESULT, MORE = PANELS


def _add(panel: str, *commands: Callable[..., int], group: typer.Typer = app, hidden: bool = False) -> None:
    """Register commands under the names of their functions."""
    for command in commands:
        name = command.__name__.rstrip("_")
        group.command(name, cls=Command, rich_help_panel=panel, hidden=hidden)(with_options(command))


def _add_with_settings(panel: str, command: Callable[..., int], config: type) -> None:
    about, kind = epilog(config, "docs/settings.md"), command_class(config)
    app.command(command.__name__, cls=kind, epilog=about, rich_help_panel=panel)(with_options(command, config))


_add(DATA, extract.check)
_add_with_settings(DATA, extract.extract, ExtractConfig)
app.add_typer(cache.app, name="cache", cls=CommandGroup, rich_help_panel=CACHE)
_add("Commands", cache.info, cache.verify, cache.repair, cache.drop, cache.splits, cache.convert, group=cache.app)
_add("Commands", cache.pack, cache.merge, cache.export, cache_import.prompts, group=cache.app)
_add("Commands", cache_import.import_, cache_import.targets, cache_import.people, group=cache.app)
_add_with_settings(MODEL, train.train, TrainConfig)
_add(MODEL, train.evaluate, train.smooth, ablate.folds, train.ensemble, ablate.ablate, ablate.search)
_add(RESULT, predict.predict, predict.export, predict.submit, predict.provenance)
_add(RESULT, predict.trace, hidden=True)
_add(RESULT, view.view, view.faces, view.report, view.runs)
app.add_typer(view.app, name="labels", cls=CommandGroup, rich_help_panel=DATA)
_add("Commands", view.agree, group=view.app)
_add(MORE, extract.demo, common.info)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options of the program itself."""
    if version:
        from vaflow import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 done, 1 failed, 2 bad usage, 3 some items failed, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
    """
    prepare_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):  # for file names that are not UTF-8; standard error does so by default
        sys.stdout.reconfigure(errors="backslashreplace")
    with _sigterm_as_interrupt() as received:
        try:
            code = _run(args)
        except KeyboardInterrupt:
            code = INTERRUPTED
    if code == INTERRUPTED:  # Typer also turns Ctrl-C into this code
        cause = "terminated" if received else "interrupted"
        typer.echo(f"vaflow: {cause}. Run the same command again to resume.", err=True)
        return TERMINATED if received else INTERRUPTED
    return code


@lru_cache
def _command() -> Any:
    """Return `app` as Click's command, built once: a call of `main` from Python would spend 15 ms on it."""
    return get_command(app)


def _run(args: Sequence[str] | None) -> int:
    """Run Typer; print every expected error as one message and return its exit code."""
    try:
        if sys.flags.optimize > 1:  # transformers parses its own docstrings on import and fails without them
            problem = "PYTHONOPTIMIZE=2 (python -OO) removes docstrings that transformers requires"
            raise UsageError(explain(problem, remedy="Use PYTHONOPTIMIZE=1 or unset it"))
        arguments = list(args) if args is not None else None
        command = _command()
        return int(command(args=arguments, prog_name="vaflow", standalone_mode=False, terminal_width=help_width()) or 0)
    except VaflowError as error:
        print_error(error)
        return error.exit_code
    except typer.TyperException as error:
        print_parser_error(error)
        return int(getattr(error, "exit_code", 1))
    except BrokenPipeError:  # `vaflow ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full or read-only disk, in any command
        remedy = "Free space or grant access, then run the same command again to resume"
        print_error(explain("The operating system reported an error", got=error, remedy=remedy))
        return FAILED
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "Free memory or use smaller batches (--batch-size, --image-batch, --window-batch), then run it again"
        got = (str(error) or type(error).__name__).splitlines()[0]
        print_error(explain("Out of memory", got=got, remedy=remedy))
        return 1


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Handle SIGTERM, which schedulers send, like Ctrl-C. Yields the list of signals received so far."""
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        received.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # the host program handles it
        yield received
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def entry() -> None:
    """Run the installed `vaflow` script."""
    sys.exit(main())
