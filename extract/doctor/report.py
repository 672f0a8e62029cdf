"""The report of a check: facts and findings, sums per split, and the same as one JSON document."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.datasets.clip import SEVERITIES, SPLITS, Clip, Note, Severity
from vaflow.extract.doctor.facts import CropFacts, LabelFacts, LabelStats, MediaFacts, merge_stats
from vaflow.extract.doctor.findings import cost_of
from vaflow.extract.headcount import PeopleFacts

NO_SPLIT = "none"


@dataclass(frozen=True)
class Checked:
    """One clip: facts about its parts, None for a part that is missing or cannot be used; and its findings."""

    clip: Clip
    media: MediaFacts | None
    labels: LabelFacts | None
    crops: CropFacts | None
    findings: tuple[Note, ...]
    people: PeopleFacts | None = None


@dataclass(frozen=True)
class Kind:
    """All findings of one severity and code.

    Attributes:
        notes: the findings, by item.
        items: clips (or source videos) that they are about, each once; empty for the data set as a whole.
        remedies: what to do, each once.
        cost: CCC that it costs if it is overlooked, or "".
    """

    severity: Severity
    code: str
    notes: tuple[Note, ...]
    items: tuple[str, ...]
    remedies: tuple[str, ...]
    cost: str


@dataclass(frozen=True)
class Summary:
    """Sums over clips.

    Attributes:
        clips: number of clips; `usable` can be extracted. `seconds` and `frames` are of readable media.
        groups: source videos.
        rows: of annotation files that can be used; `annotated` of the `label_frames` of their clips have a label.
        crop_frames: frames of clips that have crops; `crops_missing` of them have none.
    """

    clips: int
    usable: int
    groups: int
    seconds: float
    frames: int
    rows: int
    label_frames: int
    annotated: int
    crop_frames: int
    crops_missing: int
    stats: LabelStats


@dataclass(frozen=True)
class Report:
    """The result of a check; findings are sorted by severity, code and item."""

    root: Path
    layout: str
    checked: tuple[Checked, ...]
    findings: tuple[Note, ...]

    def count(self, severity: str) -> int:
        """How many findings are errors, warnings or notes."""
        return sum(note.severity == severity for note in self.findings)

    def kinds(self) -> list[Kind]:
        """The findings by severity and code, in that order."""
        kinds = []
        for (severity, code), group in groupby(self.findings, key=lambda note: (note.severity, note.code)):
            notes = tuple(group)
            items = tuple(dict.fromkeys(note.item for note in notes if note.item))
            remedies = tuple(dict.fromkeys(note.remedy for note in notes if note.remedy))
            kinds.append(Kind(severity, code, notes, items, remedies, cost_of(code)))
        return kinds

    def splits(self) -> dict[str, Summary]:
        """Summaries of the splits that occur, "none" for clips without one."""
        by_split = {name: [c for c in self.checked if c.clip.split == name] for name in (*SPLITS, None)}
        return {name or NO_SPLIT: summarise(checked) for name, checked in by_split.items() if checked}

    def total(self) -> Summary:
        """The summary of all clips."""
        return summarise(self.checked)


def summarise(checked: Sequence[Checked]) -> Summary:
    """The sums over some clips."""
    media = [c.media for c in checked if c.media]
    labels = [c.labels for c in checked if c.labels]
    with_crops = [(c.media, c.crops) for c in checked if c.media and c.crops]
    return Summary(
        clips=len(checked),
        usable=sum(c.media is not None and "bad-labels" not in {note.code for note in c.findings} for c in checked),
        groups=len({c.clip.group for c in checked}),
        seconds=sum(facts.duration for facts in media),
        frames=sum(facts.frames for facts in media),
        rows=sum(facts.rows for facts in labels),
        label_frames=sum(facts.frames for facts in labels),
        annotated=sum(facts.annotated for facts in labels),
        crop_frames=sum(facts.frames for facts, _ in with_crops),
        crops_missing=sum(facts.missing for _, facts in with_crops),
        stats=merge_stats([facts.stats for facts in labels]),
    )


def describe(stats: LabelStats) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, minimum and maximum of each dimension that has labels."""
    described = {}
    for i, name in enumerate(("valence", "arousal")):
        count = int(stats.count[i])
        if count:
            mean = stats.total[i] / count
            spread = max(0.0, stats.squares[i] / count - mean**2) ** 0.5
            described[name] = {"mean": mean, "std": spread, "min": stats.low[i], "max": stats.high[i]}
    return {name: {key: float(value) for key, value in row.items()} for name, row in described.items()}


def occupancy(stats: LabelStats) -> list[float]:
    """Share of annotated frames in each of the nine regions, 3 * valence level + arousal level; [] without any."""
    total = int(stats.regions.sum())
    return (stats.regions / total).tolist() if total else []


def document(report: Report) -> dict[str, Any]:
    """The report as plain JSON."""
    return {
        "root": str(report.root),
        "layout": report.layout,
        "counts": {severity: report.count(severity) for severity in SEVERITIES},
        "splits": {name: _summary_document(summary) for name, summary in report.splits().items()},
        "total": _summary_document(report.total()),
        "kinds": [
            {
                "severity": kind.severity,
                "code": kind.code,
                "count": len(kind.notes),
                "items": list(kind.items),
                "remedies": list(kind.remedies),
                "cost": kind.cost,
            }
            for kind in report.kinds()
        ],
        "findings": [asdict(note) for note in report.findings],
        "items": {c.clip.id: _item_document(c) for c in report.checked},
    }


def _summary_document(summary: Summary) -> dict[str, Any]:
    plain = {name: value for name, value in vars(summary).items() if name != "stats"}
    return {**plain, "labels": describe(summary.stats), "regions": occupancy(summary.stats)}


def _item_document(checked: Checked) -> dict[str, Any]:
    clip, labels = checked.clip, checked.labels
    label_row = None
    if labels is not None:
        names = ("rows", "clock", "end", "half", "constant", "frames", "annotated")
        label_row = {name: getattr(labels, name) for name in names}
        label_row["unannotated_runs"] = [list(span) for span in labels.unannotated]
        label_row["share_annotated"] = labels.annotated / labels.frames if labels.frames else 0.0
        label_row["statistics"] = describe(labels.stats)
    return {
        "split": clip.split,
        "group": clip.group,
        "video": str(clip.video) if clip.video else None,
        "media": _plain(checked.media),
        "labels": label_row,
        "crops": _plain(checked.crops),
        "people": _plain(checked.people),
    }


def _plain(facts: MediaFacts | CropFacts | PeopleFacts | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    plain = {name: value for name, value in asdict(facts).items() if name != "coverage"}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in plain.items()}
