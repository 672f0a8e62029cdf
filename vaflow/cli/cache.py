"""`vaflow cache info|verify|repair`; the group's other commands have files of their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars, table

if TYPE_CHECKING:
    from vaflow.cache import Cache
    from vaflow.cache.verify import Problem

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a cache; check, mend, copy, join it.")

CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="The folder of the cache.", show_default=False)]


@app.command()
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
            _size(stream["bytes"]),
            stream["fingerprint"] if verbose else stream["fingerprint"][:8],
            _short(stream["encoder"]),
        )
        for name, stream in facts["streams"].items()
    ]
    lines.append(table(rows, header) if rows else "no streams yet")
    damaged = {name: stream["damaged"] for name, stream in facts["streams"].items() if stream["damaged"]}
    lines += [f"{name}: {count} damaged records, see `vaflow cache verify`" for name, count in damaged.items()]
    return "\n".join(lines)


def _size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.{1 if power else 0}f} {units[power]}"


def _short(encoder: object) -> str:
    if isinstance(encoder, dict):
        encoder = encoder.get("name", encoder)
    return "-" if encoder is None else str(encoder)


@app.command()
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


@app.command()
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
