"""`vaflow check`: contents and problems of a data set."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaflow.cli.common import check_page, echo, print_json, set_up, show_bars, table, wrap_on_terminal
from vaflow.cli.options import JsonFlag, Layout, Quiet, Root, Verbose
from vaflow.errors import count, visible
from vaflow.files import write_file

if TYPE_CHECKING:
    from vaflow.extract.doctor.check import Report, Summary

EXAMPLES = 3

log = logging.getLogger(__name__)

Page = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page with figures and images: one file, no network."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(metavar="CACHE", help="Report items of this cache that the data set no longer has."),
]
People = Annotated[
    bool,
    typer.Option("--people/--no-people", help="Look for several people and cuts in a few frames of each clip."),
]


def check(
    root: Root,
    layout: Layout = "auto",
    html: Page = None,
    cache: CacheOption = None,
    people: People = True,
    as_json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Report a data set's contents and problems, their cost in CCC, and what to do. The data set is only read.

    Exits with 1 if an item cannot be used; warnings and notes do not count. -v lists every finding, -q errors only. The
    page of --html shows the distribution of labels, the coverage of every clip, and images of clips with findings.

    Example: vaflow check ~/data/affwild2 --layout affwild2 --html check.html
    """
    set_up(verbose, quiet)
    from tqdm import tqdm

    from vaflow.cache import open_cache
    from vaflow.datasets import open_dataset
    from vaflow.extract.doctor.check import check_dataset, document

    dataset = open_dataset(root, layout)
    if html is not None:
        check_page(html, "--html", parents=False)
    opened = open_cache(cache) if cache is not None else None
    with tqdm(total=len(dataset.clips), unit="clip", desc="check", disable=not show_bars(quiet)) as bar:
        report = check_dataset(dataset, progress=bar.update, cache=opened, people=people)
    if html is not None:
        from vaflow.extract.doctor.page import all_thumbnails, clips_with_images, html_page

        clips = [(c.clip, c.media.duration if c.media else None) for c in clips_with_images(report)]
        images = tqdm(all_thumbnails(clips), total=len(clips), unit="clip", desc="images", disable=not show_bars(quiet))
        write_file(html, html_page(report, dict(images)))
        log.info("Wrote %s", html)
    if as_json:
        print_json(document(report))
    else:
        if not quiet:
            echo("\n\n".join(_overview(report)))
        for block in _findings(report, verbose, quiet):
            echo(block)
        if not quiet or report.count("error"):
            counts = ", ".join(count(report.count(severity), severity) for severity in ("error", "warning", "note"))
            noun = "1 clip is" if len(report.checked) == 1 else f"{len(report.checked)} clips are"
            usable = f"{report.total().usable} of {noun} usable"
            echo(f"\n{usable}; {counts}.")
    return 1 if report.count("error") else 0


def _overview(report: "Report") -> Iterator[str]:
    """Blocks of text: clips per split, then the labels of the training split (or of all clips) and their regions."""
    from vaflow.encoders.prompts import region_table
    from vaflow.extract.doctor.check import describe, occupancy

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


def _summary_row(summary: "Summary") -> tuple[str, ...]:
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


def _findings(report: "Report", verbose: bool, quiet: bool) -> Iterator[str]:
    """One block of text for every kind of finding: count, examples, remedies and cost."""
    for kind in report.kinds():
        if quiet and kind.severity != "error":
            continue
        shown = kind.notes if verbose else kind.notes[:EXAMPLES]
        lines = [f"\n{kind.severity.upper()}  {kind.code}: {len(kind.notes)}"]
        texts = [f"{visible(note.item + ': ' if note.item else '')}{visible(note.message)}" for note in shown]
        if len(kind.notes) > len(shown):
            texts.append(f"... and {len(kind.notes) - len(shown)} more (-v lists all)")
        texts += [f"-> {remedy}" for remedy in dict.fromkeys(note.remedy for note in shown if note.remedy)]
        if kind.cost:
            texts.append(f"cost: {kind.cost}")
        yield "\n".join([*lines, *(wrap_on_terminal(text, 2) for text in texts)])
