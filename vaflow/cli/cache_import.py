"""`vaflow cache import`, `targets`, `prompts` and `people`: streams of other programs, prompts, other people."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import (
    Output,
    echo,
    print_json,
    report_failures,
    summary_json,
    table,
    warn_of_labels,
    weight_pairs,
)
from vaflow.cli.options import CachePath, Device, NewCache, Store, Weights, option, variant
from vaflow.errors import UsageError, command, count, examples, explain, visible

if TYPE_CHECKING:
    from vaflow.extract.streams import AddedPrompts, ListedSet

LISTED = 10  # items that a message names
log = logging.getLogger(__name__)
LABEL_PROBLEMS = {
    "labels-outlast": "The labels continue after the features",
    "row-count": "The number of label rows does not fit the rows of the features; if labels count video frames, give "
    "their rate (--label-rate HZ)",
    "two-clocks": "The label columns frame and time contradict each other, and frame is used (--columns ignore=frame "
    "uses time)",
}

Stream = Annotated[str, option("NAME", "Name of the features in the cache.")]
Kind = Annotated[str, option("KIND", "visual or audio.")]
Folder = Annotated[
    Path,
    option("DIR", "<item>.npy [T, D] with <item>.time.npy [T] (seconds), or <item>.csv with a column time.", "--from"),
]
Rate = Annotated[float | None, option("HZ", "Rows per second, for items without times in their files.")]
Labels = Annotated[
    Path | None,
    option("DIR", "<item>.csv with time or frame, and valence and/or arousal, or ABAW's <item>.txt; splits.csv."),
]
NewStore = Annotated[str | None, variant(Store, show_default="zarr")]
Dtype = Annotated[str, option("TYPE", "float16 or float32, of stored features.")]
ColumnNames = Annotated[
    list[str] | None, option("ROLE=NAME", "Column for time, frame, start, end, valence, arousal, ignore; repeatable.")
]
LabelRate = Annotated[float | None, option("HZ", "Rows per second of labels that count frames.")]
NormalizeBy = Annotated[
    str | None, option("COLUMN", "z-scores within each group of this column of splits.csv, or each item.")
]

TargetStream = Annotated[str, variant(Stream, help="Name of the targets in the cache.")]
TargetTask = Annotated[str, option("TASK", "classes (one of several) or binary (each or not).")]
TargetFolder = Annotated[
    Path, variant(Folder, help="<item>.csv or .txt, with time, frame (0-based) or a row per frame; -1: not annotated.")
]
ClassNames = Annotated[str | None, option("NAMES", "Names of the classes, with commas; the files' own.")]

Prompts = Annotated[Path | None, option("FILE", "Prompt set to embed, a TOML file.")]
TextEncoder = Annotated[str | None, option("NAME", "Encoder of the prompts.", default="all with a text tower")]


def import_(
    output: Output,
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
) -> int:
    """Import features made elsewhere into a cache, created if missing. Run it again to resume or to update.

    Rows with NaN are marked as missing. With `frame`, labels count the rows of the features from 0. splits.csv has the
    columns name, split, and optionally group (source video or speaker).

    Example: vaflow cache import my.cache --stream egemaps --kind audio --from egemaps/ --rate 10 --labels labels/
    """
    from tqdm import tqdm

    from vaflow.cache.remote import shown_place
    from vaflow.extract.importing import ImportConfig, import_features
    from vaflow.extract.importing.feature_files import Columns

    config = ImportConfig(stream, kind, rate, dtype, Columns.parse(columns or []), label_rate, normalize_by)
    with tqdm(unit="item", desc="import", disable=not output.bars) as bar:
        summary = import_features(cache, folder, config, labels=labels, store=store, progress=bar.update)
    warn_of_labels(summary.label_problems, LABEL_PROBLEMS)
    if summary.absent:
        verb = "has" if len(summary.absent) == 1 else "have"
        items = f"{count(len(summary.absent), 'item')} of stream {stream!r} {verb} no feature file in {folder}"
        log.warning("%s: %s", items, examples(summary.absent, LISTED))
        drop = command("cache", "drop", shown_place(cache), *summary.absent[:LISTED])
        log.warning("To remove items from every stream of the cache: %s", drop)
    if output.json:
        print_json({"stream": stream} | summary_json(summary))
    elif not output.quiet:
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
    output: Output,
    cache: CachePath,
    stream: TargetStream,
    task: TargetTask,
    folder: TargetFolder,
    names: ClassNames = None,
) -> int:
    """Import further annotation of a cache's clips; `vaflow train --set extra_targets=NAME` trains on it, too.

    Reads the ABAW challenges' files as they are. Run it again to update.

    Example: vaflow cache targets affwild2.cache --stream expr --task classes --from EXPR_Set/Train_Set
    """
    from vaflow.cache import open_cache
    from vaflow.extract.importing.labels import import_targets

    listed = [name.strip() for name in names.split(",")] if names else []
    done = import_targets(open_cache(cache, writable=True), stream, task, folder, listed)
    if output.json:
        facts = {"stream": stream, "names": list(done.names), "written": done.written, "done": done.done}
        print_json(facts | {"rows": done.rows, "unused": done.unused})
    elif not output.quiet:
        same = f", {done.done} up to date" if done.done else ""
        echo(f"Clips written: {done.written}{same}; {done.rows} annotated rows of {', '.join(done.names)}.")
        if done.unused:
            unused = visible(examples(done.unused))
            echo(f"{count(len(done.unused), 'file')} of clips that the cache does not have: {unused}", err=True)
    return 0


def prompts(
    output: Output,
    cache: CachePath,
    prompts: Prompts = None,
    visual: TextEncoder = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> int:
    """List the prompt sets of a cache; with --prompts, embed another one. Reads no media.

    The set is named after the file; `vaflow train CACHE --set prompts=NAME` uses it. -v prints the prompts as TOML.

    Example: vaflow cache prompts cache --prompts plain.toml
    """
    from vaflow.cache import open_cache
    from vaflow.cache.remote import shown_place
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
    if output.json:
        document: dict[str, Any] = {"cache": shown_place(cache), "sets": [asdict(one) for one in listed]}
        print_json(document if added is None else document | {"added": asdict(added)})
    elif not output.quiet:
        typer.echo(_prompts_text(listed, added, cache, output.verbose))  # not wrapped: with -v it is TOML
    return 0


def _prompts_text(listed: "list[ListedSet]", added: "AddedPrompts | None", cache: Path, verbose: bool) -> str:
    """What was embedded, and the table of sets; with `verbose`, as comments above the sets as files for --prompts."""
    from vaflow.cache.remote import shown_place
    from vaflow.encoders.prompts import as_toml

    lines = []
    if added is not None:
        lines += [f"{added.name!r} embedded: {stream}" for stream in added.new]
        lines += [f"{added.name!r} embedded, replacing other prompts: {stream}" for stream in added.replaced]
        lines += [f"{added.name!r} is up to date: {stream}" for stream in added.unchanged]
        train = command("train", shown_place(cache), "--out", "RUN", "--set", f"prompts={added.name}")
        lines += [f"Train with it: {train}", ""]
    rows = [(one.stream, one.name, len(one.templates), one.created) for one in listed]
    lines += (table(rows, ("stream", "set", "templates", "created")) if rows else "no prompt sets").splitlines()
    if verbose:
        lines = [f"# {line}".rstrip() for line in lines]
        for one in listed:
            lines += ["", f"# {one.stream}, {one.name}", *as_toml(one.templates, one.descriptions).splitlines()]
    return "\n".join(visible(line) for line in lines)


Person = Annotated[
    str | None, option("WHO", "main, all, left, right, id:K or speaking.", default="the choice of CACHE")
]
PersonTable = Annotated[
    Path | None,
    option("FILE", "CSV with the columns clip,person: the person of single clips, or none to leave a clip out."),
]
Workers = Annotated[int, option("N", "Reading processes (0: by number of CPU cores).", min=0)]
PeopleStore = Annotated[str | None, variant(Store, show_default="that of CACHE")]


def people(
    output: Output,
    cache: CachePath,
    out: NewCache,
    person: Person = None,
    choices: PersonTable = None,
    weights: Weights = None,
    device: Device = "auto",
    workers: Workers = 0,
    store: PeopleStore = None,
) -> int:
    """Copy a cache with another choice of people. The videos are not needed. Run it again to resume.

    Features of people that CACHE does not hold are encoded from its stored crops; everything else is copied.

    Example: vaflow cache people main.cache left.cache --person left
    """
    from vaflow.extract.faces.choice import Choices, read_choices

    chosen = Choices(person, read_choices(choices) if choices is not None else {})
    options: dict[str, Any] = {"weights": weight_pairs(weights or []), "device": device, "workers": workers}
    from vaflow.cache import open_cache
    from vaflow.cache.remote import shown_place
    from vaflow.extract.people_from_cache import choose_people

    encoded, copied = choose_people(open_cache(cache), out, chosen, options, store=store, show_progress=output.bars)
    clips = encoded.extracted + encoded.done
    if output.json:
        print_json({**summary_json(copied), "clips": clips, "encoded": encoded.encoded})
    elif not output.quiet:
        parts = f"{count(encoded.extracted, 'clip')} encoded from stored crops, {encoded.done} copied or up to date"
        echo(visible(f"{shown_place(out)}: {parts}"))
    return report_failures(copied, clips)
