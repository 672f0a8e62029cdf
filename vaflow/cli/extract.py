"""`vaflow extract`: media -> cache."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import (
    HelpAll,
    JsonFlag,
    Quiet,
    Verbose,
    check_directory,
    echo,
    file_size,
    print_json,
    set_up,
    show_bars,
    summary_json,
    table,
    weight_pairs,
    with_settings,
)
from vaflow.errors import UsageError, count, explain
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.ray_cluster import check_engine

if TYPE_CHECKING:
    from vaflow.cache import Cache
    from vaflow.extract.pipeline import Summary

SOME_FAILED = 3
LISTED = 10  # clips that a message names
log = logging.getLogger(__name__)


@with_settings(ExtractConfig)
def extract(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Root directory of the dataset.")],
    *,
    out: Annotated[
        Path,
        typer.Option(metavar="CACHE", help="Cache to write or to add to.", show_default=False, rich_help_panel="Data"),
    ],
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Layout of the dataset: auto, affwild2, afew-va, recola, sewa, muse or videos.",
            rich_help_panel="Data",
        ),
    ] = "auto",
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Extract only the clips that the last run listed as failed.",
            rich_help_panel="Data",
            hidden=True,
        ),
    ] = False,
    rehash: Annotated[
        bool,
        typer.Option(
            "--rehash",
            help="Compare the contents of files with the cache, not only sizes and times.",
            rich_help_panel="Data",
            hidden=True,
        ),
    ] = False,
    options: dict[str, Any] | None = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Local weights of an encoder, instead of the hub's. Repeatable.",
            rich_help_panel="Encoders",
            hidden=True,
        ),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Layers of every transformer: N, N-M, last, mean or all. Training mixes several.",
            rich_help_panel="Encoders",
            hidden=True,
        ),
    ] = "",
    store: Annotated[
        str,
        typer.Option(
            metavar="STORE", help="Store of a new cache: zarr or hdf5.", rich_help_panel="Output", hidden=True
        ),
    ] = "zarr",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print clips, hours, size and time; write nothing.", rich_help_panel="Data"),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Print the time of each stage.", rich_help_panel="Output", hidden=True),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Extract shard I of N of the dataset.", rich_help_panel="Machines", hidden=True
        ),
    ] = "1/1",
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="local, or ray (all nodes of a Ray cluster).",
            rich_help_panel="Machines",
            hidden=True,
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster to join: auto, HOST:PORT or ray://HOST:PORT; local starts one here.",
            rich_help_panel="Machines",
            hidden=True,
        ),
    ] = None,
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
    given = dict(options or {})
    for kind in ("visual", "audio"):
        if kind in given or layers:
            given[kind] = _encoder_names(given.get(kind, getattr(ExtractConfig, kind)), kind, layers)
    config = ExtractConfig(**given, weights=weight_pairs(weights or []))
    part = Shard.parse(shard)
    check_engine(engine, ray_address)
    from vaflow.datasets import log_left_out, open_dataset
    from vaflow.encoders.prompts import load_prompts

    whole = dataset = open_dataset(root, layout)
    log_left_out(dataset)
    _check_out(out, store)
    if config.prompts is not None:
        load_prompts(config.prompts)
    if retry_failed:
        from vaflow.extract.plan import only_failed

        dataset = only_failed(dataset, out)
    if dry_run:
        from vaflow.extract.estimate import estimate

        result = estimate(dataset, out, config, part, show_progress=show_bars(quiet))
        labels = {"items": "clips to extract", "items_already_there": "clips already extracted"}
        labels |= {"items_unreadable": "clips unreadable", "hours": "hours of media", "minutes": "minutes, estimated"}
        rows = [(labels.get(key, key.replace("_", " ")), value) for key, value in result.items()]
        print_json(result) if json else echo(table(rows, ("dry run", "")))
        return 0
    log.info("Loading %s", ", ".join(config.encoders) or "the dataset")
    from vaflow.cache import open_cache
    from vaflow.cache.edit import absent_clips
    from vaflow.cache.schema import CROPS
    from vaflow.extract.pipeline import extract as run

    summary = run(
        dataset,
        out,
        config,
        store=store,
        shard=part,
        rehash=rehash,
        engine=engine,
        ray_address=ray_address,
        show_progress=show_bars(quiet),
    )
    cache = open_cache(out)
    absent = list(absent_clips(cache, {clip.id for clip in whole.clips}))
    if absent:
        names = ", ".join(absent[:LISTED]) + (", ..." if len(absent) > LISTED else "")
        clips = count(len(absent), "clip")
        log.warning("%s of %s not in %s: %s", clips, f"{out} {'is' if len(absent) == 1 else 'are'}", root, names)
        log.warning("To remove clips that are not in the data set: vaflow cache drop %s --absent %s", out, root)
    if json:
        print_json(summary_json(summary) | {"absent": absent})
    elif not quiet:
        echo(_describe(summary, cache))
        if summary.several_people:
            media = None if CROPS in cache.streams() else root
            echo(_several_people(summary.several_people, out, media, config.identity))
    if profile and summary.stages and not json:
        from vaflow.extract.summary import bottleneck

        rows = [(stage, f"{seconds:.1f}") for stage, seconds in summary.stages.items()]
        echo(f"\n{table(rows, ('stage', 'seconds'))}\n{bottleneck(summary.stages)}")
    if not summary.failures:
        return 0
    echo(f"{count(len(summary.failures), 'clip')} failed: {summary.failures_file}", err=True)
    return SOME_FAILED if summary.extracted or summary.done else 1


def _check_out(out: Path, store: str) -> None:
    """Refuse a store that does not exist, and an existing path that cannot be the cache.

    Raises:
        UsageError, SchemaError: as `vaflow.cache.create_cache`.
    """
    from vaflow.cache import create_cache, is_cache
    from vaflow.cache.stores import STORES

    if store not in STORES:
        raise UsageError(explain("Unknown --store", got=store, choices=STORES))
    check_directory(out)
    if out.exists() and (is_cache(out) or not out.is_dir() or any(out.iterdir())):
        create_cache(out, store=store)


def _encoder_names(given: tuple[str, ...], kind: str, layers: str = "") -> tuple[str, ...]:
    """Encoder names of one kind, each once; "none" alone means none of it.

    Raises:
        UsageError: an unknown encoder, or one of the other kind.
    """
    from vaflow.encoders import ENCODERS, encoder_kind
    from vaflow.encoders.layers import with_layers

    names = tuple(dict.fromkeys(given))
    if names == ("none",):
        return ()
    if layers:
        names = tuple(with_layers(name, layers) for name in names)
    if kind == "audio":
        names = tuple(name for name in names if name != "logmel")  # always kept
    for name in names:
        if encoder_kind(name) not in (kind, "any"):
            choices = [n for n in ENCODERS if encoder_kind(n) == kind]
            raise UsageError(explain(f"--{kind} names an encoder of another kind", got=name, choices=choices))
    return names


def _describe(summary: "Summary", cache: "Cache") -> str:
    """The streams of the cache, what this run added, and how fast."""
    rows = [
        (name, stream["kind"], stream["items"], file_size(stream["bytes"]), summary.encoded.get(name, 0))
        for name, stream in cache.info()["streams"].items()
    ]
    lines = [table(rows, ("stream", "kind", "clips", "size", "encoded now")), ""]
    if summary.done:
        lines.append(f"{count(summary.done, 'clip')} already extracted.")
    if summary.changed:
        lines.append(f"{count(summary.changed, 'clip')} extracted again: source files have changed.")
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
    return "\n".join(lines)


def _several_people(clips: int, out: Path, media: Path | None, identity: str) -> str:
    """The line that points to the page of people; `media`: the videos, if the cache has no crops of everyone."""
    from vaflow.extract.faces.identity import NONE, REMEDY, resolve

    command = f"vaflow faces {out}" + (f" --media {media}" if media else "") + " --several"
    verb = "shows" if clips == 1 else "show"
    if resolve(identity) == NONE:
        return f"{count(clips, 'clip')} {verb} several tracks of faces, which only {REMEDY} joins to people: {command}"
    return f"{count(clips, 'clip')} {verb} several people: {command}"
