"""`vaflow cache prompts`: the words that the prompt head compares faces with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaflow.cli.cache import CachePath
from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, table, weight_pairs
from vaflow.errors import UsageError, explain

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
        print_json({"cache": str(cache), "sets": [_document(one) for one in found]} | _done(done))
    elif not quiet:
        typer.echo(_describe(found, done, cache, verbose))
    return 0


def _document(one: "ListedSet") -> dict[str, object]:
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
        lines += [f"{done.name!r} was there already: {stream}" for stream in done.there]
        lines += [f"Train with it: vaflow train {cache} --out RUN --set prompts={done.name}", ""]
    rows = [(one.stream, one.name, len(one.templates), one.created) for one in found]
    lines.append(table(rows, ("stream", "set", "templates", "made")) if rows else "no prompt sets")
    if verbose:
        for one in found:
            lines += ["", f"{one.stream}, {one.name}:", *(f"  {words}" for words in one.templates + one.descriptions)]
    return "\n".join(lines)
