"""`vaflow cache info|verify|repair`; the group's other commands have files of their own.

`vaflow cache convert` and `vaflow cache merge`: caches made of caches.

`vaflow cache prompts`: the words that the prompt head compares faces with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import (
    Command,
    JsonFlag,
    Quiet,
    Verbose,
    file_size,
    print_json,
    set_up,
    show_bars,
    summary_json,
    table,
    weight_pairs,
)
from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    from vaflow.cache import Cache
    from vaflow.cache.verify import Problem

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a cache; check, mend, copy, join it.")

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="The folder of the cache.", show_default=False)]


@app.command(cls=Command)
def info(cache: CachePath, json: JsonFlag = False, verbose: Verbose = False, quiet: Quiet = False) -> int:
    """What is in a cache: its clips per split, and its streams with what made them.

    Example: vaflow cache info cache --json
    """
    from vaflow.cache import open_cache

    set_up(verbose, quiet)
    facts = open_cache(cache).info()
    if json:
        print_json(facts)
    else:
        typer.echo(_info_text(facts, verbose))
    return 0


def _info_text(facts: dict[str, Any], verbose: bool) -> str:
    splits = ", ".join(f"{name} {count}" for name, count in facts["splits"].items())
    lines = [
        f"{facts['path']}: {facts['store']}, schema version {facts['schema_version']}",
        f"{facts['items']} clips" + (f" ({splits})" if splits else ""),
        "",
    ]
    header = ("stream", "kind", "dim", "dtype", "items", "bytes", "fingerprint", "encoder")
    rows = [
        (
            name,
            stream["kind"],
            stream["dim"],
            stream["dtype"],
            stream["items"],
            file_size(stream["bytes"]),
            stream["fingerprint"] if verbose else stream["fingerprint"][:8],
            _short(stream["encoder"]),
        )
        for name, stream in facts["streams"].items()
    ]
    lines.append(table(rows, header) if rows else "no streams yet")
    damaged = {name: stream["damaged"] for name, stream in facts["streams"].items() if stream["damaged"]}
    lines += [f"{name}: {count} damaged records, see `vaflow cache verify`" for name, count in damaged.items()]
    return "\n".join(lines)


def _short(encoder: object) -> str:
    if isinstance(encoder, dict):
        encoder = encoder.get("name", encoder)
    return "-" if encoder is None else str(encoder)


@app.command(cls=Command)
def verify(cache: CachePath, json: JsonFlag = False, verbose: Verbose = False, quiet: Quiet = False) -> int:
    """Read everything and compare it with its checksums and the schema; exit code 1 when anything is wrong.

    Example: vaflow cache verify cache
    """
    from vaflow.cache import open_cache
    from vaflow.cache.verify import leftovers, record_files
    from vaflow.cache.verify import verify as check

    set_up(verbose, quiet)
    opened = open_cache(cache)
    with _bar("verify", len(record_files(opened)), quiet) as step:
        problems = check(opened, step)
    notes = [opened.layout.shown(path) for path in leftovers(opened)]
    if json:
        print_json({**_findings(opened, problems), "leftovers": notes})
        return 1 if problems else 0
    _list(problems)
    if notes and not quiet:
        typer.echo(f"{_count(len(notes), 'leftover')} of killed or running writers; nobody reads them", err=True)
    if verbose:
        for note in notes:
            typer.echo(f"  {note}", err=True)
    if problems:
        typer.echo(f"{_count(len(problems), 'problem')}. Mend with: vaflow cache repair {cache}", err=True)
        return 1
    if not quiet:
        typer.echo(f"{_count(len(record_files(opened)), 'item')}, all as committed")
    return 0


@app.command(cls=Command)
def repair(cache: CachePath, json: JsonFlag = False, verbose: Verbose = False, quiet: Quiet = False) -> int:
    """Drop what is damaged, so that the next `vaflow extract` makes only that again.

    Example: vaflow cache repair cache
    """
    from vaflow.cache.verify import GRACE, leftovers, open_for_repair, record_files
    from vaflow.cache.verify import repair as mend

    set_up(verbose, quiet)
    opened = open_for_repair(cache)
    stale = [opened.layout.shown(path) for path in leftovers(opened, GRACE)]
    with _bar("repair", len(record_files(opened)), quiet) as step:
        problems = mend(opened, step)
    if json:
        print_json({**_findings(opened, problems), "removed_leftovers": stale})
        return 0
    _list(problems)
    if not quiet:
        removed = f"{_count(len(stale), 'leftover')} of killed writers removed"
        typer.echo(f"{_count(len(problems), 'problem')} mended, {removed}")
    if problems:
        typer.echo("Run `vaflow extract` again: only what was dropped is made anew", err=True)
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _findings(cache: "Cache", problems: "list[Problem]") -> dict[str, Any]:
    from dataclasses import asdict

    from vaflow.cache.verify import record_files

    return {"cache": cache.place, "items": len(record_files(cache)), "problems": [asdict(p) for p in problems]}


def _list(problems: "list[Problem]") -> None:
    for problem in problems:
        typer.echo(str(problem))


@contextmanager
def _bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[], None] | None]:
    if not show_bars(quiet):
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="item") as bar:

        def step() -> None:
            bar.update()

        yield step


if TYPE_CHECKING:
    from vaflow.cache.copy import TransferSummary

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
    from vaflow.cache.copy import convert as run

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
    return summary_json(summary)


if TYPE_CHECKING:
    from vaflow.extract.prompts import AddedPrompts, ListedSet


def prompts(
    cache: CachePath,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of a prompt set to embed.", show_default=False)
    ] = None,
    visual: Annotated[
        str | None, typer.Option(metavar="NAME", help="For which encoder.", show_default="all with a text tower")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Local weights instead of the hub. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda[:N].")] = "cpu",
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """List the prompt sets of a cache; with --prompts, embed another one. No clip is read.

    The file's stem names the set; `vaflow train CACHE --set prompts=NAME` uses it. -v prints the words.

    Example: vaflow cache prompts cache --prompts plain.toml
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.extract.prompts import add_prompts, list_prompts

    done = None
    if prompts is not None:
        opened = open_cache(cache, writable=True)
        done = add_prompts(opened, prompts, visual, weight_pairs(weights or []), device=device)
        opened.refresh_index()
    elif visual is not None or weights:
        raise UsageError(explain("Nothing is to be embedded", expected="--prompts FILE", got="--visual or --weights"))
    found = list_prompts(open_cache(cache))
    if json:
        print_json({"cache": str(cache), "sets": [_prompts_document(one) for one in found]} | _done(done))
    elif not quiet:
        typer.echo(_describe(found, done, cache, verbose))
    return 0


def _prompts_document(one: "ListedSet") -> dict[str, object]:
    from dataclasses import asdict

    return asdict(one)


def _done(done: "AddedPrompts | None") -> dict[str, object]:
    from dataclasses import asdict

    return {} if done is None else {"added": asdict(done)}


def _describe(found: "list[ListedSet]", done: "AddedPrompts | None", cache: Path, verbose: bool) -> str:
    lines = []
    if done is not None:
        lines += [f"{done.name!r} embedded: {stream}" for stream in done.new]
        lines += [f"{done.name!r} embedded in the place of other words: {stream}" for stream in done.replaced]
        lines += [f"{done.name!r} was there already: {stream}" for stream in done.unchanged]
        lines += [f"Train with it: vaflow train {cache} --out RUN --set prompts={done.name}", ""]
    rows = [(one.stream, one.name, len(one.templates), one.created) for one in found]
    lines.append(table(rows, ("stream", "set", "templates", "made")) if rows else "no prompt sets")
    if verbose:
        for one in found:
            lines += ["", f"{one.stream}, {one.name}:", *(f"  {words}" for words in one.templates + one.descriptions)]
    return "\n".join(lines)
