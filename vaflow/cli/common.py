"""What commands share: the common options, where messages go, tables."""

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.errors import UsageError, explain, visible

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only what went wrong.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Cache = Annotated[Path, typer.Argument(metavar="CACHE", help="What `vaflow extract` wrote.", show_default=False)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="What `vaflow train --out` wrote.", show_default=False)]
RunOrEnsemble = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="What `vaflow train` or `vaflow ensemble` wrote to --out.", show_default=False),
]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Score a split even if labelled clips have no features.")
]


def set_up(verbose: bool = False, quiet: bool = False) -> None:
    """Send log lines to standard error at the level asked for."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("vaflow").setLevel(level)


def show_bars(quiet: bool) -> bool:
    """Progress bars are for people: only on a terminal, and not when asked to be quiet."""
    return sys.stderr.isatty() and not quiet


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Aligned columns; numbers to the right. Plain text, so that it can be piped."""
    cells = [list(header), *([visible(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    return bool(text) and text.strip("+-%").replace(".", "", 1).replace(",", "").isdigit()


def weight_pairs(pairs: Iterable[str]) -> dict[str, Path]:
    """`--weights NAME=PATH`, repeated -> name -> path.

    Raises:
        UsageError: not a pair, or nothing at the path.
    """
    weights = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UsageError(explain("--weights is not a pair", expected="NAME=PATH", got=pair))
        if not Path(path).exists():
            raise UsageError(explain(f"The weights for {name} are not there", expected="a file or folder", got=path))
        weights[name] = Path(path)
    return weights


def alias_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """`--alias NAME=OTHER`, repeated -> stream name -> the stream that stands in for it.

    Raises:
        UsageError: not a pair.
    """
    aliases = {}
    for pair in pairs:
        name, equals, other = pair.partition("=")
        if not (name and equals and other):
            raise UsageError(explain("--alias is not a pair", expected="NAME=OTHER, as ast=ast-tiny", got=pair))
        aliases[name] = other
    return aliases
