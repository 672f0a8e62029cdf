"""`vaflow cache convert` and `vaflow cache merge`: caches made of caches."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaflow.cli.cache import CachePath
from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars

if TYPE_CHECKING:
    from vaflow.cache.transfer import TransferSummary

SOME_FAILED = 3


def convert(
    cache: CachePath,
    out: Annotated[Path, typer.Option(metavar="OTHER", help="The cache to write.", show_default=False)],
    store: Annotated[str, typer.Option(metavar="STORE", help="Its store: zarr or hdf5.", show_default=False)],
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Copy a cache into another store, losing nothing. Run it again to go on, or to take what was added since.

    Every byte that is read is checked; damaged items are left out and listed in OTHER/failures.jsonl.

    Example: vaflow cache convert cache --out cache.h5 --store hdf5
    """
    from vaflow.cache import open_cache
    from vaflow.cache.convert import convert as run

    set_up(verbose, quiet)
    summary = run(open_cache(cache), out, store, show_progress=show_bars(quiet or json))
    return _report(summary, json=json, quiet=quiet)


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The cache to write.", show_default=False)],
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE", help="What to join.", show_default=False)],
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="first or newest: which version of an item counts where sources differ.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="zarr or hdf5, of a new cache.", show_default="that of the first"),
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Join caches whose parts were extracted on different machines. Run it again to go on.

    The streams must have been made with the same settings. An item that is in several is kept once.

    Example: vaflow cache merge whole part1 part2
    """
    from vaflow.cache import open_cache
    from vaflow.cache.merge import merge as run

    set_up(verbose, quiet)
    opened = [open_cache(path) for path in caches]
    summary = run(out, opened, store=store, prefer=prefer, show_progress=show_bars(quiet or json))
    return _report(summary, json=json, quiet=quiet)


def _report(summary: "TransferSummary", *, json: bool, quiet: bool) -> int:
    if json:
        print_json(_document(summary))
    elif not quiet:
        replaced = f", {summary.replaced} of them in the place of another version" if summary.replaced else ""
        typer.echo(f"{summary.out}: {_items(summary.copied)} written{replaced}; {summary.there} were there already")
    if summary.failures:
        typer.echo(f"{_items(len(summary.failures))} could not be read: {summary.failures_file}", err=True)
        return 1 if summary.nothing_done else SOME_FAILED
    return 0


def _items(count: int) -> str:
    return f"{count} item" + ("" if count == 1 else "s")


def _document(summary: "TransferSummary") -> dict[str, object]:
    from dataclasses import asdict

    return asdict(summary) | {"failures_file": str(summary.failures_file)}
