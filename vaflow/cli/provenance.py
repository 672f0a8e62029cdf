"""`vaflow provenance`: what predictions were made from."""

from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from vaflow.cli.common import echo, print_json, set_up, table
from vaflow.cli.options import JsonFlag, MovedCache, Quiet, RunOrEnsemble, Verbose

DIGITS = 12  # of digests; --json and -v print them whole


Item = Annotated[str | None, typer.Argument(metavar="[ITEM]", help="One clip.", show_default="all")]
DataRoot = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Data set whose files are read again and compared.", show_default=False),
]
Predictions = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Output of `vaflow predict` or `vaflow submit`.", show_default="the run's own"),
]


def provenance(
    run: RunOrEnsemble,
    item: Item = None,
    root: DataRoot = None,
    cache: MovedCache = None,
    predictions: Predictions = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Print what a prediction was made from (run, weights, cache, records, source files) and what has changed since.

    Example: vaflow provenance runs/full trial_12 --root /data/affwild2

    Example: vaflow provenance runs/full test_7 --predictions submission.txt

    Example: vaflow provenance runs/full --json
    """
    set_up(verbose, quiet)
    from vaflow.provenance import find_provenance

    document = find_provenance(run, item, cache=cache, root=root, predictions=predictions)
    if json:
        print_json(document)
    elif not quiet:
        lines = run_lines(document, whole=verbose)
        echo("\n".join(lines))
        if item is not None:
            for entry in document["predictions"]:
                echo("\n".join(prediction_lines(entry, whole=verbose)))
        else:
            echo(f"\n{predictions_table(document['predictions'])}")
    return 0


@wraps(provenance, assigned=["__annotations__"])
def trace(**arguments: Any) -> int:
    """Old name of `vaflow provenance`; works in this version only.

    Example: vaflow trace runs/full
    """
    echo("warning: `vaflow trace` is now `vaflow provenance`; the old name will be removed.", err=True)
    return provenance(**arguments)


def run_lines(document: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """The run or ensemble, its weights, its cache and its streams."""
    cache = document["cache"]
    if "runs" in document["run"]:
        yield f"ensemble  {document['run']['path']}"
    for run in document["run"].get("runs", [document["run"]]):
        share = "".join(f", {value:.3f} of {name}" for name, value in run.get("weight", {}).items())
        settings = _short(run["settings_digest"], whole)
        yield f"run       {run['path']} (vaflow {run['vaflow']}), settings {settings}{share}"
        for name, digest in run["weights"].items():
            yield f"weights   {name} {_short(digest, whole)}"
    yield f"cache     {cache['path']} ({cache.get('store', cache['state'])})"
    for stream in document["streams"]:
        facts = [f"prompt set {stream['set']!r}"] if "set" in stream else []
        facts += [f"fingerprint {_short(stream['fingerprint'], whole)}"] if "fingerprint" in stream else []
        weights = stream.get("identity", {}).get("weights")
        facts += [f"weights {_short(weights, whole)}"] if isinstance(weights, str) else []
        yield f"stream    {stream['name']}: {', '.join(facts) or '-'}: {stream['state']}"


def predictions_table(entries: list[dict[str, Any]]) -> str:
    """A row per prediction, with the states of its records and source files."""

    def states(parts: Any) -> str:
        return ", ".join(dict.fromkeys(part["state"] for part in parts)) or "-"

    rows = [
        (e["item"], Path(e["folder"]).name, e["state"], states(e["records"].values()), states(e["sources"]))
        for e in entries
    ]
    return table(rows, ("clip", "predictions", "state", "features", "source files")) if rows else "no predictions"


def prediction_lines(entry: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """One prediction: what has changed, its records and its source files."""
    yield ""
    made = f", made {entry['made']} by vaflow {entry['vaflow']}" if "made" in entry else ""
    yield f"{entry['csv']}{made}: {entry['state']}"
    for part in ("csv", "weights", "settings"):
        if entry.get(f"{part}_state", "same") != "same":
            yield f"  {part}: {entry[f'{part}_state']} since"
    rows = [
        (stream, facts["attempt"], facts["created"], facts["vaflow"] or "-", facts["state"])
        for stream, facts in entry["records"].items()
    ]
    if rows:
        yield table(rows, ("stream", "attempt", "made", "vaflow", "state"))
    parts = [(one["part"], *_identity(one["identity"], whole), one["state"]) for one in entry["sources"]]
    if parts:
        yield ""
        yield table(parts, ("source", "name", "content", "state"))


def _identity(identity: Any, whole: bool) -> tuple[str, str]:
    """Name and content identity of a source file."""
    if not isinstance(identity, dict):
        return "-", str(identity)
    digest = identity.get("blake2b") or identity.get("listing")
    if isinstance(digest, str):
        size = f"{identity['size']} bytes" if "size" in identity else f"{identity.get('count')} files"
        return str(identity.get("name", "-")), f"{size}, {_short(digest, whole)}"
    names = [str(one.get("name")) for one in identity.values() if isinstance(one, dict)]
    return ", ".join(names) or "-", f"{len(identity)} files"


def _short(digest: str, whole: bool) -> str:
    return digest if whole else digest[:DIGITS]
