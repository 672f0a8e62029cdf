"""`vaflow cache import`, `targets` and `prompts`: streams from other programs' files, and prompt embeddings."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import (
    echo,
    print_json,
    report_failures,
    set_up,
    show_bars,
    summary_json,
    table,
    warn_of_labels,
    weight_pairs,
)
from vaflow.cli.options import CachePath, Device, JsonFlag, Quiet, Store, Verbose, Weights, variant
from vaflow.errors import UsageError, command, count, explain, visible

if TYPE_CHECKING:
    from vaflow.extract.streams import AddedPrompts, ListedSet

LABEL_PROBLEMS = {
    "labels-outlast": "The labels continue after the features",
    "row-count": "The number of label rows does not fit the rows of the features; if labels count video frames, give "
    "their rate (--label-rate HZ)",
    "two-clocks": "The label columns frame and time contradict each other, and frame is used (--columns ignore=frame "
    "uses time)",
}

Stream = Annotated[str, typer.Option(metavar="NAME", help="Name of the features in the cache.", show_default=False)]
Kind = Annotated[str, typer.Option(metavar="KIND", help="visual or audio.", show_default=False)]
Folder = Annotated[
    Path,
    typer.Option(
        "--from",
        metavar="DIR",
        help="<item>.npy [T, D] with <item>.time.npy [T] (seconds), or <item>.csv with a column time.",
        show_default=False,
    ),
]
Rate = Annotated[
    float | None, typer.Option(metavar="HZ", help="Rows per second, for items without times in their files.")
]
Labels = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="<item>.csv with time or frame, and valence and/or arousal, or ABAW's <item>.txt; splits.csv.",
    ),
]
NewStore = Annotated[str | None, variant(Store, show_default="zarr")]
Dtype = Annotated[str, typer.Option(metavar="TYPE", help="float16 or float32, of stored features.")]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option(metavar="ROLE=NAME", help="Column for time, frame, start, end, valence, arousal, ignore; repeatable."),
]
LabelRate = Annotated[float | None, typer.Option(metavar="HZ", help="Rows per second of labels that count frames.")]
NormalizeBy = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="z-scores within each group of this column of splits.csv, or each item."),
]

TargetStream = Annotated[str, variant(Stream, help="Name of the targets in the cache.")]
TargetTask = Annotated[
    str, typer.Option(metavar="TASK", help="classes (one of several) or binary (each or not).", show_default=False)
]
TargetFolder = Annotated[
    Path,
    variant(Folder, help="<item>.csv or .txt, with time, frame (0-based) or a row per frame; -1: not annotated."),
]
ClassNames = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Names of the classes, with commas; the files' own.")
]

Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Prompt set to embed, a TOML file.", show_default=False)
]
TextEncoder = Annotated[
    str | None, typer.Option(metavar="NAME", help="Encoder of the prompts.", show_default="all with a text tower")
]


def import_(
    cache: CachePath,
    stream: Stream,
    kind: Kind,
    folder: Folder,
    rate: Rate = None,
    labels: Labels = None,
    store: NewStore = None,
    dtype: Dtype = "float16",
    columns: ColumnNames = None,
    label_rate: LabelRate = None,
    normalize_by: NormalizeBy = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Import features made elsewhere into a cache, created if missing. Run it again to resume or to update.

    Rows with NaN are marked as missing. With `frame`, labels count the rows of the features from 0. splits.csv has the
    columns name, split, and optionally group (source video or speaker).

    Example: vaflow cache import my.cache --stream egemaps --kind audio --from egemaps/ --rate 10 --labels labels/
    """
    set_up(verbose, quiet)
    from tqdm import tqdm

    from vaflow.extract.importing.feature_files import Columns
    from vaflow.extract.importing.features import ImportConfig, import_features

    config = ImportConfig(stream, kind, rate, dtype, Columns.parse(columns or []), label_rate, normalize_by)
    with tqdm(unit="item", desc="import", disable=not show_bars(quiet)) as bar:
        summary = import_features(cache, folder, config, labels=labels, store=store, progress=bar.update)
    warn_of_labels(summary.label_problems, LABEL_PROBLEMS)
    if json:
        print_json({"stream": stream} | summary_json(summary))
    elif not quiet:
        items = count(summary.items, "item")
        lines = (
            (True, f"Imported {summary.imported} of {items} into stream {stream!r}, {summary.rows} rows."),
            (summary.done, f"Up to date: {summary.done}."),
            (summary.changed, f"Replaced, because their files have changed: {summary.changed}."),
            (summary.masked, f"Rows with NaN or infinity, marked as missing: {summary.masked}."),
            (True, f"Labels: {summary.annotated} of {items}, {summary.label_rows} rows."),
        )
        echo("\n".join(line for shown, line in lines if shown))
    return report_failures(summary, summary.imported or summary.done or summary.labelled, "item")


def targets(
    cache: CachePath,
    stream: TargetStream,
    task: TargetTask,
    folder: TargetFolder,
    names: ClassNames = None,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Import further annotation of a cache's clips; `vaflow train --set extra_targets=NAME` trains on it, too.

    Reads the ABAW challenges' files as they are. Run it again to update.

    Example: vaflow cache targets affwild2.cache --stream expr --task classes --from EXPR_Set/Train_Set
    """
    set_up(verbose, quiet)
    from vaflow.cache import open_cache
    from vaflow.extract.importing.labels import import_targets

    listed = [name.strip() for name in names.split(",")] if names else []
    done = import_targets(open_cache(cache, writable=True), stream, task, folder, listed)
    if json:
        facts = {"stream": stream, "names": list(done.names), "written": done.written, "done": done.done}
        print_json(facts | {"rows": done.rows})
    elif not quiet:
        same = f", {done.done} up to date" if done.done else ""
        echo(f"Clips written: {done.written}{same}; {done.rows} annotated rows of {', '.join(done.names)}.")
    return 0


def prompts(
    cache: CachePath,
    prompts: Prompts = None,
    visual: TextEncoder = None,
    weights: Weights = None,
    device: Device = "cpu",
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
    from vaflow.extract.streams import add_prompts, list_prompts

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
        typer.echo(_prompts_text(listed, added, cache, verbose))  # not wrapped: with -v it is TOML
    return 0


def _prompts_text(listed: "list[ListedSet]", added: "AddedPrompts | None", cache: Path, verbose: bool) -> str:
    """What was embedded, and the table of sets; with `verbose`, as comments above the sets as files for --prompts."""
    from vaflow.encoders.prompts import as_toml

    lines = []
    if added is not None:
        lines += [f"{added.name!r} embedded: {stream}" for stream in added.new]
        lines += [f"{added.name!r} embedded, replacing other prompts: {stream}" for stream in added.replaced]
        lines += [f"{added.name!r} is up to date: {stream}" for stream in added.unchanged]
        lines += [f"Train with it: {command('train', cache, '--out', 'RUN', '--set', f'prompts={added.name}')}", ""]
    rows = [(one.stream, one.name, len(one.templates), one.created) for one in listed]
    lines += (table(rows, ("stream", "set", "templates", "created")) if rows else "no prompt sets").splitlines()
    if verbose:
        lines = [f"# {line}".rstrip() for line in lines]
        for one in listed:
            lines += ["", f"# {one.stream}, {one.name}", *as_toml(one.templates, one.descriptions).splitlines()]
    return "\n".join(visible(line) for line in lines)
