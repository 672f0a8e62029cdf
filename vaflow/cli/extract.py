"""`vaflow extract`: media -> cache."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import (
    check_directory,
    echo,
    file_size,
    print_json,
    report_failures,
    set_up,
    show_bars,
    summary_json,
    table,
    warn_of_labels,
    weight_pairs,
    with_settings,
)
from vaflow.cli.options import (
    Engine,
    HelpAll,
    JsonFlag,
    Layout,
    Quiet,
    RayAddress,
    Root,
    Store,
    Verbose,
    Weights,
    variant,
)
from vaflow.errors import UsageError, command, count, explain
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.ray_cluster import check_engine

if TYPE_CHECKING:
    from vaflow.cache import Cache
    from vaflow.extract.pipeline import Summary

LISTED = 10  # clips that a message names
LABEL_PROBLEMS = {
    "labels-outlast": "The labels continue after the end of the clip",
    "row-count": "The number of label rows does not fit the number of frames",
    "two-clocks": "The label columns frame and time contradict each other, and frame is used",
}
log = logging.getLogger(__name__)

Out = Annotated[
    Path,
    typer.Option(metavar="CACHE", help="Cache to write or to add to.", show_default=False, rich_help_panel="Data"),
]
DataLayout = Annotated[str, variant(Layout, rich_help_panel="Data")]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Extract only the clips that the last run listed as failed.",
        rich_help_panel="Data",
        hidden=True,
    ),
]
Rehash = Annotated[
    bool,
    typer.Option(
        "--rehash",
        help="Compare the contents of files with the cache, not only sizes and times.",
        rich_help_panel="Data",
        hidden=True,
    ),
]
EncoderWeights = Annotated[list[str] | None, variant(Weights, rich_help_panel="Encoders", hidden=True)]
Layers = Annotated[
    str,
    typer.Option(
        metavar="LAYERS",
        help="Layers of every transformer: N, N-M, last, mean or all. Training mixes several.",
        rich_help_panel="Encoders",
        hidden=True,
    ),
]
NewStore = Annotated[str, variant(Store, rich_help_panel="Output", hidden=True)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print clips, hours, size and time; write nothing.", rich_help_panel="Data"),
]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Print the time of each stage.", rich_help_panel="Output", hidden=True),
]
ShardOption = Annotated[
    str,
    typer.Option(metavar="I/N", help="Extract shard I of N of the dataset.", rich_help_panel="Machines", hidden=True),
]
MachineEngine = Annotated[str, variant(Engine, rich_help_panel="Machines", hidden=True)]
MachineAddress = Annotated[str | None, variant(RayAddress, rich_help_panel="Machines", hidden=True)]


@with_settings(ExtractConfig)
def extract(
    root: Root,
    *,
    out: Out,
    layout: DataLayout = "auto",
    retry_failed: RetryFailed = False,
    rehash: Rehash = False,
    options: dict[str, Any] | None = None,
    weights: EncoderWeights = None,
    layers: Layers = "",
    store: NewStore = "zarr",
    dry_run: DryRun = False,
    profile: Profile = False,
    shard: ShardOption = "1/1",
    engine: MachineEngine = "local",
    ray_address: MachineAddress = None,
    help_all: HelpAll = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Encode a dataset once, into a cache of per-frame and per-window embeddings. Run it again to resume.

    Example: vaflow extract /data/affwild2 --out affwild2.cache --visual clip-vit-b16 --audio ast

    Several machines: add --shard 3/8 on the third of eight, or --engine ray (docs/clusters.md).
    """
    set_up(verbose, quiet)
    # Everything that the user typed is checked before torch is imported, which takes seconds.
    config = ExtractConfig(**_with_encoders(options or {}, layers), weights=weight_pairs(weights or []))
    machines: dict[str, Any] = {"shard": Shard.parse(shard), "engine": engine, "ray_address": ray_address}
    check_engine(engine, ray_address)
    from vaflow.datasets import log_left_out, open_dataset
    from vaflow.datasets.videos import PERSON_LABELS
    from vaflow.extract.faces.choice import ALL

    whole = dataset = open_dataset(root, layout)
    log_left_out(dataset, (PERSON_LABELS,) if config.person == ALL else ())
    _check_files(out, store, config.prompts)
    if retry_failed:
        from vaflow.extract.plan import only_failed

        dataset = only_failed(dataset, out)
    if dry_run:
        from vaflow.extract.estimate import estimate

        _print_estimate(estimate(dataset, out, config, machines["shard"], show_progress=show_bars(quiet)), json)
        return 0
    log.info("Loading %s", ", ".join(config.encoders) or "the dataset")
    from vaflow.cache import open_cache
    from vaflow.extract.pipeline import extract as run

    summary = run(dataset, out, config, store=store, rehash=rehash, show_progress=show_bars(quiet), **machines)
    cache = open_cache(out)
    absent = _absent_clips(cache, {clip.id for clip in whole.clips}, out, root)
    if summary.label_problems:
        warn_of_labels(summary.label_problems, LABEL_PROBLEMS)
        log.warning("To see by how much: %s", command("check", root))
    if json:
        print_json(summary_json(summary) | {"absent": absent})
    elif not quiet:
        echo(_describe(summary, cache))
        if summary.several_people:
            echo(_several_people(summary.several_people, cache, out, root, config.identity))
    if profile and summary.stages and not json:
        from vaflow.extract.summary import bottleneck

        rows = [(stage, f"{seconds:.1f}") for stage, seconds in summary.stages.items()]
        echo(f"\n{table(rows, ('stage', 'seconds'))}\n{bottleneck(summary.stages)}")
    return report_failures(summary, summary.extracted or summary.done)


def _check_files(out: Path, store: str, prompts: Path | None) -> None:
    """Refuse a store that does not exist, an existing path that cannot be the cache, and invalid prompts.

    Raises:
        UsageError, SchemaError: as `vaflow.cache.create_cache` and `vaflow.encoders.prompts.load_prompts`.
    """
    from vaflow.cache import create_cache, is_cache
    from vaflow.cache.stores import STORES
    from vaflow.encoders.prompts import load_prompts

    if store not in STORES:
        raise UsageError(explain("Unknown --store", got=store, choices=STORES))
    check_directory(out)
    if out.exists() and (is_cache(out) or not out.is_dir() or any(out.iterdir())):
        create_cache(out, store=store)
    if prompts is not None:
        load_prompts(prompts)


def _print_estimate(facts: dict[str, Any], json: bool) -> None:
    """Print the result of `vaflow.extract.estimate.estimate`, as a table or JSON."""
    labels = {"items": "clips to extract", "items_already_there": "clips already extracted"}
    labels |= {"items_unreadable": "clips unreadable", "hours": "hours of media", "minutes": "minutes, estimated"}
    rows = [(labels.get(key, key.replace("_", " ")), value) for key, value in facts.items()]
    print_json(facts) if json else echo(table(rows, ("dry run", "")))


def _absent_clips(cache: "Cache", clips: set[str], out: Path, root: Path) -> list[str]:
    """Return the clips of the cache that the dataset lacks; warn about them, with the command that removes them."""
    from vaflow.cache.edit import absent_clips

    absent = list(absent_clips(cache, clips))
    if absent:
        names = ", ".join(absent[:LISTED]) + (", ..." if len(absent) > LISTED else "")
        verb = "is" if len(absent) == 1 else "are"
        log.warning("%s of %s %s not in %s: %s", count(len(absent), "clip"), out, verb, root, names)
        log.warning("To remove clips that are not in the dataset: %s", command("cache", "drop", out, "--absent", root))
    return absent


def _with_encoders(options: dict[str, Any], layers: str) -> dict[str, Any]:
    """The options with the names of encoders each once and with `layers`; "none" alone means none of that kind.

    Raises:
        UsageError: an unknown encoder, or one of the other kind.
    """
    from vaflow.encoders import ENCODERS, encoder_kind
    from vaflow.encoders.layers import with_layers

    checked = dict(options)
    for kind in ("visual", "audio"):
        if kind not in options and not layers:
            continue
        names = tuple(dict.fromkeys(options.get(kind, getattr(ExtractConfig, kind))))
        if names == ("none",):
            names = ()
        if layers:
            names = tuple(with_layers(name, layers) for name in names)
        if kind == "audio":
            names = tuple(name for name in names if name != "logmel")  # always kept
        for name in names:
            if encoder_kind(name) not in (kind, "any"):
                choices = [n for n in ENCODERS if encoder_kind(n) == kind]
                raise UsageError(explain(f"--{kind} names an encoder of another kind", got=name, choices=choices))
        checked[kind] = names
    return checked


def _describe(summary: "Summary", cache: "Cache") -> str:
    """The streams of the cache, what this run added, and how fast."""
    rows = [
        (name, stream["kind"], stream["items"], file_size(stream["bytes"]), summary.encoded.get(name, 0))
        for name, stream in cache.info()["streams"].items()
    ]
    lines = [table(rows, ("stream", "kind", "clips", "size", "encoded now")), ""] if rows else []
    if summary.done:
        lines.append(f"{count(summary.done, 'clip')} already extracted.")
    if summary.changed:
        lines.append(f"{count(summary.changed, 'clip')} extracted again: source files have changed.")
    if summary.outdated:
        lines.append(
            f"{count(summary.outdated, 'clip')} could not be extracted again: the cache holds earlier versions."
        )
    if sum(summary.encoded.values()):
        speed = summary.media_seconds / max(summary.wall_seconds, 1e-9)
        lines.append(
            f"Extracted {count(summary.extracted, 'clip')}, {summary.media_seconds / 60:.1f} min of video, "
            f"in {summary.wall_seconds:.1f} s ({speed:.1f} times real time)."
        )
    elif summary.extracted:
        lines.append(
            f"Extracted {count(summary.extracted, 'clip')} in {summary.wall_seconds:.1f} s; nothing to encode."
        )
    elif not summary.failures:
        lines.append("Nothing to do.")
    elif not summary.done:
        lines.append("No clip was extracted.")
    return "\n".join(lines)


def _several_people(clips: int, cache: "Cache", out: Path, root: Path, identity: str) -> str:
    """The line that points to the page of people, which needs the videos if the cache has no crops of everyone."""
    from vaflow.cache.schema import CROPS
    from vaflow.extract.faces.identity import NONE, REMEDY, resolve

    media = () if CROPS in cache.streams() else ("--media", root)
    show = command("faces", out, *media, "--several")
    verb = "shows" if clips == 1 else "show"
    if resolve(identity) == NONE:
        return f"{count(clips, 'clip')} {verb} several tracks of faces, which only {REMEDY} joins to people: {show}"
    return f"{count(clips, 'clip')} {verb} several people: {show}"
