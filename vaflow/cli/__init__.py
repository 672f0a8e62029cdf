"""The `vaflow` command. Each command parses, calls one library function, and prints; errors are mapped here, once.

Command modules import nothing heavy at the top: `vaflow --help` answers at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer

from vaflow.cli import ablate, cache, cache_import, check, demo, evaluate, extract, predict, train
from vaflow.cli import cache as cache_copy
from vaflow.cli import cache as cache_prompts
from vaflow.cli import cache_import as cache_targets
from vaflow.cli import predict as submit
from vaflow.cli import provenance as trace
from vaflow.errors import VaflowError, explain, is_out_of_memory

INTERRUPTED, TERMINATED = 130, 143

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
app.command("evaluate")(evaluate.evaluate)
app.command("folds")(evaluate.folds)
app.command("ensemble")(evaluate.ensemble)
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
    """Run the command line; returns the exit code.

    0 done, 1 failed, 2 usage, 3 some items failed, 130 interrupted (Ctrl-C), 143 asked to end (SIGTERM).
    """
    # OpenMP threads that spin while they wait take the cores from our own decoders: measured 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _asked_to_end() as asked:
        try:
            result = _run(args)
        except KeyboardInterrupt:
            result = INTERRUPTED
    if result == INTERRUPTED:  # what Typer makes of Ctrl-C, too
        how = "ended by SIGTERM" if asked else "interrupted"
        typer.echo(f"vaflow: {how}; run the same command again to go on where it stopped", err=True)
        return TERMINATED if asked else INTERRUPTED
    return result


def _run(args: Sequence[str] | None) -> int:
    """Run Typer; every error that a person can do something about becomes one paragraph."""
    try:
        return int(app(args=list(args) if args is not None else None, standalone_mode=False) or 0)
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
    except OSError as error:  # a full or read-only disk, wherever it was met
        remedy = "Make room or give access, then run the same command again: it goes on where it stopped"
        typer.echo(f"vaflow: {explain('The system refused', got=error, remedy=remedy)}", err=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "Free memory, or use smaller batches (--batch-size, --image-batch, --window-batch); run it again"
        got = (str(error) or type(error).__name__).splitlines()[0]
        typer.echo(f"vaflow: {explain('Out of memory', got=got, remedy=remedy)}", err=True)
        return 1


@contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """SIGTERM, which schedulers and shutdowns send, ends a command as Ctrl-C does: tidily. Yields what came."""
    came: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        came.append(number)
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # the program that we are in handles it
        yield came
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def entry() -> None:
    """The installed `vaflow` script."""
    sys.exit(main())
