"""`vaflow cache prompts`: list the prompt sets of a cache; embed another one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.cache import CachePath
from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, table, weight_pairs
from vaflow.errors import UsageError, explain, visible

if TYPE_CHECKING:
    from vaflow.extract.prompts import AddedPrompts, ListedSet


def prompts(
    cache: CachePath,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompt set to embed, a TOML file.", show_default=False)
    ] = None,
    visual: Annotated[
        str | None, typer.Option(metavar="NAME", help="Encoder of the prompts.", show_default="all with a text tower")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Local weights instead of the hub. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "cpu",
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """List the prompt sets of a cache; with --prompts, embed another one. Reads no media.

    The set is named after the file; `vaflow train CACHE --set prompts=NAME` uses it. -v prints the prompts as TOML.

    Example: vaflow cache prompts cache --prompts plain.toml
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.extract.prompts import add_prompts, list_prompts

    added = None
    if prompts is not None:
        opened = open_cache(cache, writable=True)
        added = add_prompts(opened, prompts, visual, weight_pairs(weights or []), device=device)
        opened.refresh_index()
    elif visual is not None or weights:
        problem = "--visual and --weights are options of embedding"
        raise UsageError(explain(problem, expected="--prompts FILE beside them", got="no --prompts"))
    listed = list_prompts(open_cache(cache))
    if json:
        document: dict[str, Any] = {"cache": str(cache), "sets": [asdict(one) for one in listed]}
        print_json(document if added is None else document | {"added": asdict(added)})
    elif not quiet:
        typer.echo(_prompts_text(listed, added, cache, verbose))
    return 0


def _prompts_text(listed: "list[ListedSet]", added: "AddedPrompts | None", cache: Path, verbose: bool) -> str:
    """What was embedded, and the table of sets; with `verbose`, as comments above the sets as files for --prompts."""
    from vaflow.encoders.prompts import as_toml

    lines = []
    if added is not None:
        lines += [f"{added.name!r} embedded: {stream}" for stream in added.new]
        lines += [f"{added.name!r} embedded, replacing other prompts: {stream}" for stream in added.replaced]
        lines += [f"{added.name!r} is up to date: {stream}" for stream in added.unchanged]
        lines += [f"Train with it: vaflow train {cache} --out RUN --set prompts={added.name}", ""]
    rows = [(one.stream, one.name, len(one.templates), one.created) for one in listed]
    lines += (table(rows, ("stream", "set", "templates", "created")) if rows else "no prompt sets").splitlines()
    if verbose:
        lines = [f"# {line}".rstrip() for line in lines]
        for one in listed:
            lines += ["", f"# {one.stream}, {one.name}", *as_toml(one.templates, one.descriptions).splitlines()]
    return "\n".join(visible(line) for line in lines)
