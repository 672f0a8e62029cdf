"""`vaflow trace`: where predictions come from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.common import JsonFlag, Quiet, RunOrEnsemble, Verbose, print_json, set_up, table

DIGITS = 12  # of digests; --json and -v have them whole


def trace(
    run: RunOrEnsemble,
    item: Annotated[str | None, typer.Argument(metavar="[ITEM]", help="One clip.", show_default="all")] = None,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The data set: read its files again, and compare.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="Where the cache is now.", show_default="the run's")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="What `vaflow predict` or `vaflow submit` wrote to --out.",
            show_default="the run's own",
        ),
    ] = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Say what a prediction was made from (run, weights, cache, records, source files), and what has changed since.

    Example: vaflow trace runs/full trial_12 --root /data/affwild2

    Example: vaflow trace runs/full test_7 --predictions submission.txt

    Example: vaflow trace runs/full --json
    """
    set_up(verbose, quiet)
    from vaflow.provenance import trace_run

    found = trace_run(run, item, cache=cache, root=root, predictions=predictions)
    if json:
        print_json(found)
    elif not quiet:
        typer.echo("\n".join(_lines(found, whole=verbose, one=item is not None)))
    return 0


def _lines(found: dict[str, Any], *, whole: bool, one: bool) -> Iterator[str]:
    yield from _run_lines(found, whole)
    if one:
        for entry in found["predictions"]:
            yield from _prediction_lines(entry, whole)
        return
    yield ""
    rows = [
        (entry["item"], Path(entry["folder"]).name, entry["state"], _summary(entry["records"].values()))
        + ((_summary(entry["sources"]),) if entry["sources"] else ("-",))
        for entry in found["predictions"]
    ]
    yield table(rows, ("clip", "predictions", "state", "features", "source files")) if rows else "no predictions"


def _run_lines(found: dict[str, Any], whole: bool) -> Iterator[str]:
    cache = found["cache"]
    if "runs" in found["run"]:
        yield f"ensemble  {found['run']['path']}"
    for run in found["run"].get("runs", [found["run"]]):
        share = "".join(f", {value:.3f} of {name}" for name, value in run.get("weight", {}).items())
        settings = _short(run["settings_digest"], whole)
        yield f"run       {run['path']} (vaflow {run['vaflow']}), settings {settings}{share}"
        for name, digest in run["weights"].items():
            yield f"weights   {name} {_short(digest, whole)}"
    yield f"cache     {cache['path']} ({cache.get('store', cache['state'])})"
    for stream in found["streams"]:
        what = f", prompt set {stream['set']!r}" if "set" in stream else ""
        yield f"stream    {stream['name']}{what}: {_stream(stream, whole)}: {stream['state']}"


def _stream(stream: dict[str, Any], whole: bool) -> str:
    identity = stream.get("identity", {})
    parts = [f"fingerprint {_short(stream['fingerprint'], whole)}"] if "fingerprint" in stream else []
    parts += [f"weights {_short(identity['weights'], whole)}"] if isinstance(identity.get("weights"), str) else []
    return ", ".join(parts) or "-"


def _prediction_lines(entry: dict[str, Any], whole: bool) -> Iterator[str]:
    yield ""
    made = f", made {entry['made']} by vaflow {entry['vaflow']}" if "made" in entry else ""
    yield f"{entry['csv']}{made}: {entry['state']}"
    for part in ("csv", "weights", "settings"):
        if entry.get(f"{part}_state", "same") != "same":
            yield f"  {part}: {entry[f'{part}_state']} since"
    rows = [
        (f"  {stream}", facts["attempt"], facts["created"], facts["vaflow"] or "-", facts["state"])
        for stream, facts in entry["records"].items()
    ]
    if rows:
        yield table(rows, ("  stream", "attempt", "made", "vaflow", "state"))
    parts = [(f"  {one['part']}", *_identity(one["identity"], whole), one["state"]) for one in entry["sources"]]
    if parts:
        yield ""
        yield table(parts, ("  source", "name", "content", "state"))


def _identity(identity: Any, whole: bool) -> tuple[str, str]:
    """A name, and what identifies the content."""
    if not isinstance(identity, dict):
        return "-", str(identity)
    digest = identity.get("blake2b") or identity.get("listing")
    if isinstance(digest, str):
        size = f"{identity['size']} bytes" if "size" in identity else f"{identity.get('count')} files"
        return str(identity.get("name", "-")), f"{size}, {_short(digest, whole)}"
    names = [str(one.get("name")) for one in identity.values() if isinstance(one, dict)]
    return ", ".join(names) or "-", f"{len(identity)} files"


def _summary(parts: Any) -> str:
    """The states that occur, each once."""
    return ", ".join(dict.fromkeys(part["state"] for part in parts)) or "-"


def _short(digest: str, whole: bool) -> str:
    return digest if whole else digest[:DIGITS]
