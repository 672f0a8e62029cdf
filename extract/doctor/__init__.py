"""Check a data set before extraction: measure every clip, and compare clips with each other and with a cache.

Headers, packets, labels and names of crops are read. Frames are decoded if a container has no times, and a few of each
clip without crops to look for people and cuts. Audio is decoded up to the first audible sample, and whole files are
compared only if their sizes and samples are equal. The report has facts, findings, and sums per split.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.cache import Cache
from vaflow.datasets import read_annotation
from vaflow.datasets.clip import SEVERITIES, SPLITS, Clip, Dataset, Note, Severity
from vaflow.datasets.labels import require_times
from vaflow.errors import DataError, MediaError, command
from vaflow.extract.decoding_pool import Failed, each
from vaflow.extract.doctor.facts import (
    CropFacts,
    LabelFacts,
    LabelStats,
    MediaFacts,
    PeopleFacts,
    audio_facts,
    crop_facts,
    label_facts,
    look_at_people,
    media_facts,
    merge_stats,
    still_facts,
)
from vaflow.extract.doctor.findings import (
    COSTS,
    clip_findings,
    crop_findings,
    dataset_findings,
    duplicate_findings,
    label_findings,
    media_findings,
    people_findings,
)
from vaflow.extract.plan import absent_clips
from vaflow.extract.source_files import content_digest
from vaflow.timeline import Grid

NO_SPLIT = "none"
SAMPLE = 1 << 16  # bytes read at the head, the middle and the tail of files that have the same size
_NO_TIMES = np.empty(0, np.float64)
_LEFT_OUT = "Extraction skips the clip"


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
            kinds.append(Kind(severity, code, notes, items, remedies, COSTS.get(code, "")))
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
            {"severity": kind.severity, "code": kind.code, "count": len(kind.notes), "items": list(kind.items)}
            | {"remedies": list(kind.remedies), "cost": kind.cost}
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


def check_dataset(
    dataset: Dataset,
    *,
    window: float = Grid.window,
    progress: Callable[[int], object] | None = None,
    cache: Cache | None = None,
    people: bool = False,
) -> Report:
    """Check every clip, and the data set as a whole.

    Args:
        window: seconds; clips shorter than that are noted.
        progress: called with 1 after every clip, such as a bar's `update`.
        cache: extracted from this data set; items that the data set no longer has are reported.
        people: decode a few frames of clips without crops, to report several people and cuts.

    Returns:
        The report. Broken clips are findings, never exceptions.
    """
    have_crops = any(clip.crops for clip in dataset.clips)
    measure = partial(check_clip, window=window, others_have_crops=have_crops)
    results: dict[int, Checked] = {}
    for number, result in each(measure, dataset.clips):
        if isinstance(result, Failed):  # FFmpeg crashed or stalled in the process that read the file
            note = Note("error", "unreadable", dataset.clips[number].id, result.message, _LEFT_OUT)
            result = Checked(dataset.clips[number], None, None, None, (note,))
        results[number] = result
        if progress is not None:
            progress(1)
    checked = [results[number] for number in sorted(results)]
    clips, labels = dataset.clips, {c.clip.id: c.labels for c in checked if c.labels is not None}
    varied = {name for name, facts in labels.items() if facts.annotated and not facts.constant}
    videos = same_content(clip.video for clip in clips if clip.video is not None)
    label_files = same_content(clip.labels for clip in clips if clip.labels is not None)
    findings = [*dataset.notes, *(note for c in checked for note in c.findings)]
    findings += dataset_findings(clips, labels) + duplicate_findings(clips, videos, label_files, varied)
    if people:
        with_video = [(c.clip, c.media.duration) for c in checked if c.media and c.clip.video and not c.clip.crops]
        facts = look_at_people(with_video, cache)
        findings += people_findings(facts, [clip for clip, _ in with_video], dataset.root)
        checked = [replace(c, people=facts.get(c.clip.id)) for c in checked]
    if cache is not None:
        findings += absent_findings(dataset, cache)
    findings.sort(key=lambda note: (SEVERITIES.index(note.severity), note.code, note.item))
    return Report(dataset.root, dataset.layout, tuple(checked), tuple(findings))


def check_clip(clip: Clip, *, window: float = Grid.window, others_have_crops: bool = False) -> Checked:
    """Measure one clip; its problems become findings."""
    notes = clip_findings(clip, others_have_crops)
    media, times, media_notes = _read_media(clip, window)
    notes += media_notes
    labels: LabelFacts | None = None
    crops: CropFacts | None = None
    for person in (0, *(number for number, _ in clip.person_labels)):
        try:
            if (annotation := read_annotation(clip, person)) is not None:
                if clip.video is None and clip.frames is None and media is not None:
                    require_times(clip.id, annotation)
                facts = label_facts(annotation, times)
                notes += label_findings(clip, facts, media)
                labels = labels or facts  # of the clip itself, or else of its first person with a table
        except DataError as error:
            remedy = f"{_LEFT_OUT} with --person all" if person else _LEFT_OUT
            notes.append(Note("error", "bad-labels", clip.id, str(error), remedy))
    try:
        if clip.crops:
            crops = crop_facts(clip.crops, times)
            notes += crop_findings(clip, crops, media)
    except OSError as error:
        remedy = "Check that you may read the folder"
        notes.append(Note("error", "unreadable-crops", clip.id, str(error), remedy))
    return Checked(clip, media, labels, crops, tuple(notes))


def _read_media(clip: Clip, window: float) -> tuple[MediaFacts | None, NDArray[np.float64], list[Note]]:
    """Return facts, frame times [N] in seconds, and findings of a video, an image folder or an audio file."""
    notes, missing = [], 0
    try:
        if clip.frames is not None:
            media, times, missing = still_facts(clip)
        elif clip.video is not None:
            media, times = media_facts(clip.video, clip.audio if clip.audio != clip.video else None)
        elif clip.audio is not None:
            media, times = audio_facts(clip.audio)
            remedy = "Its frames are marked as frames without a face"
            notes.append(Note("note", "audio-only", clip.id, "Audio without video", remedy))
        else:
            parts = " and ".join(name for name, part in (("labels", clip.labels), ("crops", clip.crops)) if part)
            message = f"No video{f' for the {parts}' if parts else ''}, so the times of its frames are unknown"
            remedy = f"Put the video {clip.group}.mp4 below the root, or remove the trial"
            return None, _NO_TIMES, [Note("error", "no-video", clip.id, message, remedy)]
    except (MediaError, OSError) as error:
        return None, _NO_TIMES, [Note("error", "unreadable", clip.id, str(error), _LEFT_OUT)]
    if missing:
        message = f"{missing} of {media.frames} frames ({missing / media.frames:.1%}) have no image"
        remedy = "They are marked as frames without a face; an image's number is its frame"
        notes.append(Note("note", "frames-missing", clip.id, message, remedy))
    return media, times, [*media_findings(clip, media, window), *notes]


def absent_findings(dataset: Dataset, cache: Cache) -> list[Note]:
    """Clips of a cache that the data set does not contain; a renamed video is recognized by its content."""
    by_size: dict[int, list[Clip]] = defaultdict(list)
    for clip in dataset.clips:
        if clip.video is not None and clip.video.is_file():
            by_size[_size(clip.video)].append(clip)
    notes = []
    for item, streams in absent_clips(cache, {clip.id for clip in dataset.clips}).items():
        video = cache.record(streams[0], item).source.get("video") or {}
        alike = by_size[video.get("size", -1)]
        twins = [clip.id for clip in alike if clip.video and content_digest(clip.video) == video.get("blake2b")]
        message = f"In the cache {cache.place}, but not in the data set"
        if twins:
            message += f"; the same video is now {', '.join(twins)}"
        remedy = f"Remove it from the cache: {command('cache', 'drop', cache.place, '--absent', dataset.root)}"
        notes.append(Note("warning", "absent-item", item, message, remedy))
    return notes


def same_content(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Return groups of two or more paths with equal contents, each sorted; without empty and unreadable files.

    Most files differ in size, and nearly all others in three samples; only the rest is read completely.
    """
    groups: list[tuple[Path, ...]] = [tuple(sorted(set(paths)))]
    keys: tuple[Callable[[Path], Hashable], ...] = (_size, _sample, content_digest)
    for key in keys:
        parts: dict[Hashable, list[Path]] = defaultdict(list)
        for number, group in enumerate(groups):
            for path in group:
                with suppress(OSError):  # reported as a finding of its clip
                    if value := key(path):
                        parts[number, value].append(path)
        groups = [tuple(part) for part in parts.values() if len(part) > 1]
    return sorted(groups)


def _size(path: Path) -> int:
    return path.stat().st_size


def _sample(path: Path) -> str:
    size = path.stat().st_size
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        for start in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
