"""The page of `vaflow check --html`: one file with figures and images; nothing is fetched and all text is escaped."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from markupsafe import Markup

from vaflow.datasets.clip import SEVERITIES, Note
from vaflow.extract.doctor.figures import coverage_bars, distribution, label_map
from vaflow.extract.doctor.report import Checked, Report, Summary, describe
from vaflow.extract.doctor.thumbnails import Thumbnail
from vaflow.pages import render

PICTURED = 24  # clips with images
LISTED = 500  # clips in the table
NAMED = 200  # findings of a kind

Pictures = Mapping[str, Sequence[Thumbnail]]  # by clip


def html_page(report: Report, pictures: Pictures) -> str:
    """The whole page.

    Args:
        report: the result of a check.
        pictures: images of the clips that `pictured` chose.
    """
    splits, total, about = report.splits(), report.total(), _by_item(report)
    worst = {name: min((SEVERITIES.index(note.severity) for note in notes), default=9) for name, notes in about.items()}
    ordered = sorted(report.checked, key=lambda c: (worst[c.clip.id], c.clip.id))
    stats = {name: summary.stats for name, summary in splits.items() if summary.stats.count.sum()}
    return render(
        "check.html",
        name=report.root.name,
        root=report.root,
        layout=report.layout,
        counts=[(report.count(severity), severity) for severity in SEVERITIES],
        total=_summary("all", total),
        kinds=report.kinds(),
        named=NAMED,
        splits=[_summary(name, summary) for name, summary in splits.items()],
        labelled=list(stats),
        maps=[
            (name, int(each.regions.sum()), Markup(label_map(each, f"Labels of {name} over valence and arousal")))
            for name, each in stats.items()
            if each.regions.sum()
        ],
        plots=[Markup(distribution(stats, k, name)) for k, name in enumerate(("valence", "arousal"))] if stats else [],
        cards=[_card(c, about[c.clip.id], pictures.get(c.clip.id, ())) for c in pictured(report)],
        clips=[_clip(checked, about[checked.clip.id]) for checked in ordered[:LISTED]],
        checked=len(ordered),
    )


def pictured(report: Report, limit: int = PICTURED) -> list[Checked]:
    """Clips to show: one of every kind of finding in turn, errors first, then the second of every kind, and so on."""
    by_id = {checked.clip.id: checked for checked in report.checked}
    ranks = zip_longest(*([item for item in kind.items if item in by_id] for kind in report.kinds()))
    names = dict.fromkeys(name for rank in ranks for name in rank if name is not None)
    return [by_id[name] for name in list(names)[:limit]]


def _summary(name: str, summary: Summary) -> dict[str, Any]:
    covered = summary.crop_frames - summary.crops_missing
    return {
        "name": name,
        "clips": summary.clips,
        "usable": summary.usable,
        "videos": summary.groups,
        "hours": f"{summary.seconds / 3600:.2f}",
        "frames": f"{summary.frames:,}",
        "annotated": _percent(summary.annotated, summary.label_frames),
        "cropped": _percent(covered, summary.crop_frames),
        "spreads": _spreads(describe(summary.stats)),
    }


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _spreads(described: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Mean and standard deviation of valence and of arousal."""
    rows = [described.get(name) for name in ("valence", "arousal")]
    return [f"{row['mean']:.2f} ± {row['std']:.2f}" if row else "-" for row in rows]


def _by_item(report: Report) -> dict[str, list[Note]]:
    """Findings of every clip, worst first; a leak belongs to every clip of its source video."""
    about: dict[str, list[Note]] = {checked.clip.id: [] for checked in report.checked}
    group: dict[str, list[str]] = {}
    for checked in report.checked:
        group.setdefault(checked.clip.group, []).append(checked.clip.id)
    for note in report.findings:
        for name in group.get(note.item, ()) if note.code == "leak" else (note.item,):
            if name in about:
                about[name].append(note)
    return about


def _card(checked: Checked, about: Sequence[Note], pictures: Sequence[Thumbnail]) -> dict[str, Any]:
    return {
        "id": checked.clip.id,
        "split": checked.clip.split or "no split",
        "media": checked.media,
        "bars": Markup(coverage_bars(checked)),
        "pictures": [(each.caption, b64encode(each.jpeg).decode("ascii")) for each in pictures],
        "notes": about,
    }


def _clip(checked: Checked, about: Sequence[Note]) -> dict[str, Any]:
    labels, media, crops = checked.labels, checked.media, checked.crops
    counts = {severity: sum(note.severity == severity for note in about) for severity in SEVERITIES}
    covered = media.frames - crops.missing if media and crops else 0
    return {
        "id": checked.clip.id,
        "split": checked.clip.split or "-",
        "length": f"{media.duration:.1f} s" if media else "unreadable",
        "counts": [(severity, count) for severity, count in counts.items() if count],
        "bars": Markup(coverage_bars(checked)),
        "annotated": _percent(labels.annotated, labels.frames) if labels else "-",
        "cropped": _percent(covered, media.frames) if media and crops else "-",
        "spreads": _spreads(describe(labels.stats) if labels else {}),
    }
