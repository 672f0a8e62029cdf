"""`vaflow extract`, `check` and `demo`: a cache from a data set, what is wrong with the data set, synthetic data."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vaflow.cli.common import (
    Output,
    check_directory,
    check_file,
    echo,
    file_size,
    loading,
    print_json,
    report_failures,
    summary_json,
    table,
    warn_of_labels,
    weight_pairs,
    wrap_on_terminal,
)
from vaflow.cli.options import Engine, HelpAll, Layout, RayAddress, Root, Store, Weights, flag, grouped, option
from vaflow.errors import UsageError, command, count, examples, explain, visible
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.files import write_file
from vaflow.process import check_engine

if TYPE_CHECKING:
    from vaflow.cache import Cache
    from vaflow.extract.doctor import Report
    from vaflow.extract.doctor import Summary as CheckSummary
    from vaflow.extract.plan import Summary

LISTED = 10  # clips that a message names
LABEL_PROBLEMS = {
    "labels-outlast": "The labels continue after the end of the clip",
    "row-count": "The number of label rows does not fit the number of frames",
    "two-clocks": "The label columns frame and time contradict each other, and frame is used",
}
log = logging.getLogger(__name__)

Out = Annotated[Path, grouped("Data", option("CACHE", "Cache to write or to add to."), shown=True)]
DataLayout = Annotated[str, grouped("Data", Layout, shown=True)]
RetryFailed = Annotated[
    bool, grouped("Data", flag("Extract only the clips that the last run listed as failed.", "--retry-failed"))
]
Rehash = Annotated[
    bool, grouped("Data", flag("Compare the contents of files with the cache, not only sizes and times.", "--rehash"))
]
EncoderWeights = Annotated[list[str] | None, grouped("Encoders", Weights)]
Layers = Annotated[
    str,
    grouped(
        "Encoders", option("LAYERS", "Layers of every transformer: N, N-M, last, mean or all. Training mixes several.")
    ),
]
NewStore = Annotated[str, grouped("Output", Store)]
DryRun = Annotated[
    bool, grouped("Data", flag("Print clips, hours, size and time; write nothing.", "--dry-run"), shown=True)
]
Profile = Annotated[bool, grouped("Output", flag("Print the time of each stage.", "--profile"))]
ShardOption = Annotated[str, grouped("Machines", option("I/N", "Extract shard I of N of the dataset."))]
MachineEngine = Annotated[str, grouped("Machines", Engine)]
MachineAddress = Annotated[str | None, grouped("Machines", RayAddress)]


def extract(
    output: Output,
    root: Root,
    *,
    out: Out,
    layout: DataLayout = "auto",
    retry_failed: RetryFailed = False,
    rehash: Rehash = False,
    options: dict[str, Any],
    weights: EncoderWeights = None,
    layers: Layers = "",
    store: NewStore = "zarr",
    dry_run: DryRun = False,
    profile: Profile = False,
    shard: ShardOption = "1/1",
    engine: MachineEngine = "local",
    ray_address: MachineAddress = None,
    help_all: HelpAll = False,
) -> int:
    """Encode a dataset once, into a cache of per-frame and per-window embeddings. Run it again to resume.

    Example: vaflow extract /data/affwild2 --out affwild2.cache --visual clip-vit-b16 --audio ast

    Several machines: add --shard 3/8 on the third of eight, or --engine ray (docs/clusters.md).
    """
    # Everything that the user typed is checked before torch is imported, which takes seconds.
    config = ExtractConfig(**_with_encoders(options, layers), weights=weight_pairs(weights or []))
    machines: dict[str, Any] = {"shard": Shard.parse(shard), "engine": engine, "ray_address": ray_address}
    check_engine(engine, ray_address)
    from vaflow.datasets import log_left_out, open_dataset
    from vaflow.datasets.videos import PERSON_LABELS
    from vaflow.extract.faces.choice import ALL

    whole = dataset = open_dataset(root, layout)
    log_left_out(dataset, (PERSON_LABELS,) if config.person == ALL else ())
    _check_files(out, store, config.prompts)
    if config.person == ALL or retry_failed:
        from vaflow.extract.plan import check_items, only_failed

        check_items(whole.clips, config.person, config.face_source)
    if retry_failed:
        dataset = only_failed(dataset, out)
    if dry_run:
        from vaflow.extract.estimate import estimate

        _print_estimate(estimate(dataset, out, config, machines["shard"], show_progress=output.bars), output)
        return 0
    log.info("Loading %s", ", ".join(config.encoders) or "the dataset")
    from vaflow.cache import open_cache
    from vaflow.extract.pipeline import extract as run

    summary = run(dataset, out, config, store=store, rehash=rehash, show_progress=output.bars, **machines)
    cache = open_cache(out)
    absent = _absent_clips(cache, {clip.id for clip in whole.clips}, out, root)
    if summary.label_problems:
        warn_of_labels(summary.label_problems, LABEL_PROBLEMS)
        log.warning("To see by how much: %s", command("check", root))
    if output.json:
        print_json(summary_json(summary) | {"absent": absent})
    elif not output.quiet:
        echo(_describe(summary, cache))
        if summary.several_people:
            echo(_several_people(summary.several_people, cache, out, root, config.identity))
    if profile and summary.stages and not output.json:
        from vaflow.extract.loop import bottleneck

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


def _print_estimate(facts: dict[str, Any], output: Output) -> None:
    """Print the result of `vaflow.extract.estimate.estimate`, as a table or JSON."""
    labels = {"items": "clips to extract", "items_already_there": "clips already extracted"}
    labels |= {"items_unreadable": "clips unreadable", "hours": "hours of media", "minutes": "minutes, estimated"}
    rows = [(labels.get(key, key.replace("_", " ")), value) for key, value in facts.items()]
    print_json(facts) if output.json else echo(table(rows, ("dry run", "")))


def _absent_clips(cache: "Cache", clips: set[str], out: Path, root: Path) -> list[str]:
    """Return the clips of the cache that the dataset lacks; warn about them, with the command that removes them."""
    from vaflow.cache.remote import shown_place
    from vaflow.extract.plan import absent_clips

    absent = list(absent_clips(cache, clips))
    if absent:
        place, verb = shown_place(out), "is" if len(absent) == 1 else "are"
        named, drop = examples(absent, LISTED), command("cache", "drop", place, "--absent", root)
        log.warning("%s of %s %s not in %s: %s", count(len(absent), "clip"), place, verb, root, named)
        log.warning("To remove clips that are not in the dataset: %s", drop)
    return absent


def _with_encoders(options: dict[str, Any], layers: str) -> dict[str, Any]:
    """The options with the names of encoders each once and with `layers`; "none" alone means none of that kind.

    Raises:
        UsageError: an unknown encoder, or one of the other kind.
    """
    from vaflow.encoders import ENCODERS, encoder_kind
    from vaflow.encoders.base import with_layers

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
    from vaflow.cache.remote import shown_place
    from vaflow.cache.schema import CROPS
    from vaflow.extract.faces.identity import NONE, REMEDY, resolve

    media = () if CROPS in cache.streams() else ("--media", root)
    show = command("faces", shown_place(out), *media, "--several")
    verb = "shows" if clips == 1 else "show"
    if resolve(identity) == NONE:
        return f"{count(clips, 'clip')} {verb} several tracks of faces, which only {REMEDY} joins to people: {show}"
    return f"{count(clips, 'clip')} {verb} several people: {show}"


EXAMPLES = 3


CheckPage = Annotated[
    Path | None, option("FILE", "Write a page with figures and images: one file, no network.", "--html")
]
CheckedCache = Annotated[Path | None, option("CACHE", "Report items of this cache that the data set no longer has.")]
LookForPeople = Annotated[
    bool, flag("Look for several people and cuts in a few frames of each clip.", "--people/--no-people")
]


def check(
    output: Output,
    root: Root,
    layout: Layout = "auto",
    html: CheckPage = None,
    cache: CheckedCache = None,
    people: LookForPeople = True,
) -> int:
    """Report a data set's contents and problems, their cost in CCC, and what to do. The data set is only read.

    Exits with 1 if an item cannot be used; warnings and notes do not count. -v lists every finding, -q errors only. The
    page of --html shows the distribution of labels, the coverage of every clip, and images of clips with findings.

    Example: vaflow check ~/data/affwild2 --layout affwild2 --html check.html
    """
    from tqdm import tqdm

    from vaflow.cache import open_cache
    from vaflow.datasets import open_dataset
    from vaflow.extract.doctor import check_dataset, document

    dataset = open_dataset(root, layout)
    if html is not None:
        check_file(html, "--html", parents=False)
    opened = open_cache(cache) if cache is not None else None
    with tqdm(total=len(dataset.clips), unit="clip", desc="check", disable=not output.bars) as bar:
        report = check_dataset(dataset, progress=bar.update, cache=opened, people=people)
    if html is not None:
        from vaflow.extract.doctor.page import all_thumbnails, clips_with_images, html_page

        clips = [(c.clip, c.media.duration if c.media else None) for c in clips_with_images(report)]
        images = tqdm(all_thumbnails(clips), total=len(clips), unit="clip", desc="images", disable=not output.bars)
        write_file(html, html_page(report, dict(images)))
        log.info("Wrote %s", html)
    if output.json:
        print_json(document(report))
    else:
        if not output.quiet:
            echo("\n\n".join(_overview(report)))
        for block in _findings(report, output):
            echo(block)
        if not output.quiet or report.count("error"):
            counts = ", ".join(count(report.count(severity), severity) for severity in ("error", "warning", "note"))
            noun = "1 clip is" if len(report.checked) == 1 else f"{len(report.checked)} clips are"
            usable = f"{report.total().usable} of {noun} usable"
            echo(f"\n{usable}; {counts}.")
    return 1 if report.count("error") else 0


def _overview(report: "Report") -> Iterator[str]:
    """Blocks of text: clips per split, then the labels of the training split (or of all clips) and their regions."""
    from vaflow.encoders.prompts import region_table
    from vaflow.extract.doctor import describe, occupancy

    yield f"{visible(str(report.root))} (layout {report.layout})"
    splits = report.splits()
    rows = [(name, *_summary_row(summary)) for name, summary in splits.items()]
    if len(rows) > 1:
        rows.append(("total", *_summary_row(report.total())))
    header = ("split", "clips", "usable", "sources", "hours", "frames", "label rows", "annotated", "with crop")
    yield table(rows, header)
    name, summary = ("train", splits["train"]) if "train" in splits else ("all clips", report.total())
    labels = [(dimension, *(f"{x:.3f}" for x in row.values())) for dimension, row in describe(summary.stats).items()]
    if labels:
        yield f"Labels of {name}:\n" + table(labels, ("dimension", "mean", "std", "min", "max"))
    shares = occupancy(summary.stats)
    if shares:
        yield f"Labelled frames of {name} per region:\n{region_table(shares)}"


def _summary_row(summary: "CheckSummary") -> tuple[str, ...]:
    covered = summary.crop_frames - summary.crops_missing
    return (
        str(summary.clips),
        str(summary.usable),
        str(summary.groups),
        f"{summary.seconds / 3600:.2f}",
        str(summary.frames),
        str(summary.rows),
        f"{summary.annotated / summary.label_frames:.1%}" if summary.label_frames else "-",
        f"{covered / summary.crop_frames:.1%}" if summary.crop_frames else "-",
    )


def _findings(report: "Report", output: Output) -> Iterator[str]:
    """One block of text for every kind of finding: count, examples, remedies and cost."""
    for kind in report.kinds():
        if output.quiet and kind.severity != "error":
            continue
        shown = kind.notes if output.verbose else kind.notes[:EXAMPLES]
        lines = [f"\n{kind.severity.upper()}  {kind.code}: {len(kind.notes)}"]
        texts = [f"{visible(note.item + ': ' if note.item else '')}{visible(note.message)}" for note in shown]
        if len(kind.notes) > len(shown):
            texts.append(f"... and {len(kind.notes) - len(shown)} more (-v lists all)")
        texts += [f"-> {remedy}" for remedy in dict.fromkeys(note.remedy for note in shown if note.remedy)]
        if kind.cost:
            texts.append(f"cost: {kind.cost}")
        yield "\n".join([*lines, *(wrap_on_terminal(text, 2) for text in texts)])


DemoOut = Annotated[Path, option("DIR", "Folder for the data, cache, run and pictures.")]
DemoSeed = Annotated[int, option("N", "Random seed (synthetic data and training).")]
DemoClips = Annotated[int, option("N", "Labelled clips; two thirds are for training.", min=3)]


def demo(output: Output, out: DemoOut = Path("demo"), seed: DemoSeed = 0, clips: DemoClips = 24) -> int:
    """Run the whole pipeline on synthetic clips in about a minute; no data, no download.

    Writes clips in the layout of Aff-Wild2 (DIR/data), encodes them with small random encoders (DIR/cache), trains the
    full model (DIR/run), scores it on unseen people and draws the predictions (DIR/run/pictures).

    Example: vaflow demo --out demo

    Example: vaflow demo --out large --clips 60
    """
    with loading(output):
        from vaflow.demo import describe, run_demo

    result = run_demo(out, seed=seed, clips=clips, show_progress=output.bars)
    output.result(lambda: result.metrics, lambda: describe(result))
    return 0
