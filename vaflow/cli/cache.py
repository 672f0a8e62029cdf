"""`vaflow cache`: show, verify, repair, convert, pack and merge caches; drop clips, change splits."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaflow.cli.common import Output, echo, file_size, print_json, summary_json, table
from vaflow.cli.options import CachePath, NewCache, Store, argument, flag, option, variant
from vaflow.errors import FAILED, SOME_FAILED, CorruptError, UsageError, command, count, examples, explain, visible

if TYPE_CHECKING:
    from tqdm import tqdm

    from vaflow.cache import Cache
    from vaflow.cache.copy import TransferSummary
    from vaflow.cache.maintenance import Problem

SHOWN = 20  # clips that a command lists without --verbose

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show, verify, repair, copy and edit caches.")

DryRun = Annotated[bool, flag("Print the changes without making them.", "--dry-run")]
Clips = Annotated[list[str] | None, argument("ITEM", "Clips to remove.")]
Absent = Annotated[Path | None, option("ROOT", "Remove the clips that this data set does not contain.")]
RootLayout = Annotated[str, option("LAYOUT", "Layout of ROOT, as in `vaflow extract`.")]
SplitTable = Annotated[Path, argument("SPLITS", "CSV file with name,split.")]
Converted = Annotated[Path, option("OTHER", "Cache to write.")]
OtherStore = Annotated[str, option("STORE", "Store of OTHER: zarr or hdf5.")]
Packed = Annotated[Path, argument("OUT", "Packed cache to write.")]
Parts = Annotated[list[Path], argument("CACHE", "Caches to merge.")]
Prefer = Annotated[
    str | None, option("WHICH", "Version to keep of an item that was made from different sources: first or newest.")
]
MergedStore = Annotated[str | None, variant(Store, show_default="that of the first")]
ParquetOut = Annotated[Path, argument("DIR", "New folder of Parquet files.")]


def info(output: Output, cache: CachePath) -> int:
    """Print the clips per split and the streams of a cache, with the encoder of each stream.

    Example: vaflow cache info cache --json
    """
    from vaflow.cache import open_cache

    facts = open_cache(cache).info()
    print_json(facts) if output.json else echo(_info_text(facts, output.verbose))
    return 0


def _info_text(facts: dict[str, Any], verbose: bool) -> str:
    splits = ", ".join(f"{name} {count}" for name, count in facts["splits"].items())
    lines = [
        visible(f"{facts['path']}: {facts['store']}, schema version {facts['schema_version']}"),
        count(facts["items"], "clip") + (f" ({splits})" if splits else ""),
        "",
    ]
    rows = []
    for name, stream in facts["streams"].items():
        encoder = stream["encoder"].get("name") if isinstance(stream["encoder"], dict) else stream["encoder"]
        values = [stream[key] for key in ("kind", "dim", "dtype", "items")]
        fingerprint = stream["fingerprint"] if verbose else stream["fingerprint"][:8]
        rows.append((name, *values, file_size(stream["bytes"]), fingerprint, "-" if encoder is None else encoder))
    header = ("stream", "kind", "dim", "dtype", "items", "bytes", "fingerprint", "encoder")
    lines.append(table(rows, header) if rows else "no streams yet")
    for name, stream in facts["streams"].items():
        if stream["damaged"]:
            lines.append(visible(f"{name}: {count(stream['damaged'], 'damaged record')}, see `vaflow cache verify`"))
    return "\n".join(lines)


def verify(output: Output, cache: CachePath) -> int:
    """Compare every array with its checksum and the schema; exit code 1 if anything is damaged.

    Example: vaflow cache verify cache
    """
    from vaflow.cache import open_cache
    from vaflow.cache.maintenance import leftovers
    from vaflow.cache.maintenance import verify as find_problems
    from vaflow.cache.remote import shown_place

    opened = open_cache(cache)
    with _bar("verify", _count_items(opened), output) as bar:
        problems = find_problems(opened, bar.update)
    notes = [opened.layout.shown(path) for path in leftovers(opened)]
    if output.json:
        print_json({**_problem_report(opened, problems), "leftovers": notes})
        return FAILED if problems else 0
    for problem in problems:
        echo(visible(str(problem)))
    if notes and not output.quiet:
        echo(f"{count(len(notes), 'leftover')} of killed or running writers, which readers skip", err=True)
    for note in notes if output.verbose else ():
        echo(visible(f"  {note}"), err=True)
    if problems:
        packed = opened.store == "packed"
        remedy = "Pack again: " + command("cache", "pack", "CACHE", shown_place(cache))
        remedy = remedy if packed else "Repair with: " + command("cache", "repair", shown_place(cache))
        echo(visible(f"{count(len(problems), 'problem')}. {remedy}"), err=True)
        return FAILED
    if not output.quiet:
        number = _count_items(opened)
        echo("1 item matches its checksums" if number == 1 else f"{number} items match their checksums")
    return 0


def repair(output: Output, cache: CachePath) -> int:
    """Remove damaged items, so that the next `vaflow extract` remakes only those.

    Example: vaflow cache repair cache
    """
    from vaflow.cache.maintenance import GRACE, leftovers, open_for_repair
    from vaflow.cache.maintenance import repair as remove_damage

    opened = open_for_repair(cache)
    stale = [opened.layout.shown(path) for path in leftovers(opened, GRACE)]
    with _bar("repair", _count_items(opened), output) as bar:
        problems = remove_damage(opened, bar.update)
    if output.json:
        print_json({**_problem_report(opened, problems), "removed_leftovers": stale})
        return 0
    for problem in problems:
        echo(visible(str(problem)))
    lost = [problem for problem in problems if problem.path.startswith("streams/")]
    if not output.quiet:
        echo(f"{count(len(problems) - len(lost), 'problem')} repaired, {count(len(stale), 'leftover')} removed")
    if lost:
        files = count(len(lost), "stream file")
        echo(
            f"{files} lost: extract or import again with the same settings; it writes them and keeps the items",
            err=True,
        )
    elif problems:
        echo("Run `vaflow extract` again: it remakes only the removed items", err=True)
    return 0


def _problem_report(cache: "Cache", problems: "list[Problem]") -> dict[str, Any]:
    return {"cache": cache.place, "items": _count_items(cache), "problems": [asdict(p) for p in problems]}


def _count_items(cache: "Cache") -> int:
    """Return the number of committed items; 0 for a packed cache whose list of records is damaged."""
    with suppress(CorruptError):
        return len(cache.record_files())
    return 0


def _bar(title: str, total: int, output: Output) -> "tqdm[Any]":
    """Return a progress bar over items, drawn on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit="item", disable=not output.bars)


def drop(
    output: Output,
    cache: CachePath,
    items: Clips = None,
    absent: Absent = None,
    layout: RootLayout = "auto",
    dry_run: DryRun = False,
) -> int:
    """Remove clips from every stream of a cache: those named, or those that a data set no longer contains.

    Example: vaflow cache drop cache --absent data/ --dry-run
    """
    from vaflow.cache import open_cache
    from vaflow.cache.maintenance import drop_clips

    if bool(items) == (absent is not None):
        got = "both" if items else "neither"
        raise UsageError(explain("Choose the clips to remove", expected="ITEM... or --absent ROOT", got=got))
    opened = open_cache(cache, writable=not dry_run)
    clips = list(items or [])
    if absent is not None:
        from vaflow.datasets import open_dataset
        from vaflow.extract.plan import clips_to_drop

        clips = clips_to_drop(opened, {clip.id for clip in open_dataset(absent, layout).clips}, str(absent))
    dropped = drop_clips(opened, clips, dry_run=dry_run)
    if output.json:
        print_json({"cache": opened.place, "dry_run": dry_run, "dropped": dropped})
    elif not output.quiet:
        _list_clips([f"{item}: {', '.join(streams)}" for item, streams in dropped.items()], output)
        echo(visible(f"{opened.place}: {count(len(dropped), 'clip')} {'to remove' if dry_run else 'removed'}"))
    return 0


def splits(output: Output, cache: CachePath, table: SplitTable, dry_run: DryRun = False) -> int:
    """Assign clips of a cache to splits; labels and embeddings stay as they are. Clips not listed keep their split.

    Example: vaflow cache splits cache splits.csv --dry-run
    """
    from vaflow.cache import open_cache
    from vaflow.cache.maintenance import change_splits
    from vaflow.datasets.files import read_splits

    listed = read_splits(table)
    if "split" not in listed:
        got = ", ".join(listed)
        raise UsageError(explain(f"{table} has no splits", expected="the columns name and split", got=got))
    opened = open_cache(cache, writable=not dry_run)
    with _bar("splits", len(listed["split"]), output) as bar:
        changes = change_splits(opened, listed["split"], dry_run=dry_run, on_clip=bar.update)
    if output.json:
        print_json({"cache": opened.place, "dry_run": dry_run} | asdict(changes))
    elif not output.quiet:
        _list_clips([f"{item}: {old or 'no split'} -> {new}" for item, (old, new) in changes.changed.items()], output)
        counts = [
            f"{count(len(changes.changed), 'clip')} {'to change' if dry_run else 'changed'}",
            f"{changes.unchanged} unchanged",
            f"{len(changes.unlisted)} not listed",
        ]
        echo(visible(f"{opened.place}: {', '.join(counts)}"))
    if changes.unknown and not output.quiet:
        names = count(len(changes.unknown), "name")
        echo(visible(f"{table} lists {names} that the cache does not contain: {examples(changes.unknown)}"), err=True)
    return 0


def _list_clips(lines: list[str], output: Output) -> None:
    for line in lines if output.verbose else lines[:SHOWN]:
        echo(visible(line))
    if len(lines) > SHOWN and not output.verbose:
        echo(f"... and {len(lines) - SHOWN} more (-v lists all)")


def convert(output: Output, cache: CachePath, out: Converted, store: OtherStore) -> int:
    """Copy a cache into another store, without loss. Run again to resume, or to copy items added since.

    Checksums are compared; damaged items are skipped and listed in OTHER/failures.jsonl.

    Example: vaflow cache convert cache --out cache.h5 --store hdf5
    """
    from vaflow.cache import open_cache
    from vaflow.cache.copy import convert as run

    summary = run(open_cache(cache), out, store, show_progress=output.bars)
    return _report(summary, output)


def pack(output: Output, cache: CachePath, out: Packed) -> int:
    """Copy a cache into few large files, for sharing and for object stores. The copy is read-only.

    train, evaluate, predict and `cache info|verify` accept it as any cache; `cache convert` unpacks it.

    Example: vaflow cache pack cache cache.packed
    """
    from vaflow.cache import open_cache
    from vaflow.cache.export import pack as run

    opened = open_cache(cache)
    with _bar("pack", len(opened.record_files()), output) as bar:
        summary = run(opened, out, on_item=bar.update)
    written = f"{count(summary.items, 'item')} in {count(summary.files, 'file')}, {file_size(summary.bytes)}"
    output.result(lambda: asdict(summary), lambda: visible(f"{summary.out}: {written}"))
    return 0


def merge(output: Output, out: NewCache, caches: Parts, prefer: Prefer = None, store: MergedStore = None) -> int:
    """Merge caches that were extracted on different machines with the same settings. Run again to resume.

    An item in several caches is kept once.

    Example: vaflow cache merge whole part1 part2
    """
    from vaflow.cache import open_cache
    from vaflow.cache.copy import merge as run

    opened = [open_cache(path) for path in caches]
    summary = run(out, opened, store=store, prefer=prefer, show_progress=output.bars)
    return _report(summary, output)


def _report(summary: "TransferSummary", output: Output) -> int:
    replaced = f" ({summary.replaced} replaced)" if summary.replaced else ""
    written = f"{count(summary.copied, 'item')} written{replaced}; {summary.there} up to date"
    output.result(lambda: summary_json(summary), lambda: f"{summary.out}: {written}")
    if summary.failures:
        problem = f"{count(len(summary.failures), 'item')} could not be read"
        echo(f"{problem}: {summary.failures_file}", err=True)
        return SOME_FAILED if summary.copied or summary.there else FAILED
    return 0


def export(output: Output, cache: CachePath, out: ParquetOut) -> int:
    """Write a cache as Parquet files that the Hugging Face `datasets` library loads, one configuration per stream.

    Requires pyarrow. Face crops are not exported.

    Example: vaflow cache export cache dataset
    """
    from vaflow.cache import open_cache
    from vaflow.cache.export import export_parquet

    opened = open_cache(cache)
    with _bar("export", _count_items(opened), output) as bar:
        rows = export_parquet(opened, out, bar.update)
    text = f"{table(list(rows.items()), ('stream', 'rows'))}\nWrote {visible(str(out))}"
    output.result(lambda: {"out": str(out), "streams": rows}, lambda: text)
    return 0
