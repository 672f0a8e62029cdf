"""What is in a data set and what is wrong with it, before hours are spent on it.

Headers, packets, labels and names of crops are read. Pictures are decoded only where a container keeps no times, sound
up to the first that can be heard, and whole files are compared only where size and samples are alike.

Files of the same content under other names, found without reading a whole data set.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import SEVERITIES, Clip, Dataset, Note
from vaflow.datasets.formats import read_annotation
from vaflow.errors import DataError, MediaError
from vaflow.extract.doctor.facts import (
    CropFacts,
    LabelFacts,
    MediaFacts,
    crop_facts,
    label_facts,
    media_facts,
    still_facts,
)
from vaflow.extract.doctor.findings import (
    clip_findings,
    crop_findings,
    dataset_findings,
    duplicate_findings,
    label_findings,
    media_findings,
)
from vaflow.extract.doctor.report import Checked, Report
from vaflow.extract.messages import Failed
from vaflow.extract.pool import each
from vaflow.extract.sources import content_digest
from vaflow.timeline import Grid

SAMPLE = 1 << 16  # bytes read at the head, the middle and the tail of files that have the same size


def same_content(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Groups of two or more different paths with equal bytes, each sorted; empty and unreadable files are in none.

    Most files are told apart by their size alone, nearly all others by three samples; only what is still alike is read
    whole.
    """
    groups: list[tuple[Path, ...]] = [tuple(sorted(set(paths)))]
    for tell in (_size, _sample, content_digest):
        groups = [part for group in groups for part in _parts(group, tell)]
    return sorted(groups)


def _parts(group: Sequence[Path], tell: Callable[[Path], Hashable]) -> list[tuple[Path, ...]]:
    found: dict[Hashable, list[Path]] = defaultdict(list)
    for path in group:
        try:
            mark = tell(path)
        except OSError:  # the clip that it belongs to has a finding of its own
            continue
        if mark:
            found[mark].append(path)
    return [tuple(part) for part in found.values() if len(part) > 1]


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


_NO_TIMES = np.empty(0, np.float64)


def check_dataset(
    dataset: Dataset,
    *,
    window: float = Grid.window,
    workers: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Look at every clip and at the data set as a whole.

    Args:
        dataset: what `open_dataset` found.
        window: seconds; clips shorter than that are noted.
        workers: processes; 0 chooses by machine.
        progress: called with 1 after every clip, such as a bar's `update`.

    Returns:
        The report. Broken clips are findings, never exceptions.
    """
    have_crops = any(clip.crops for clip in dataset.clips)
    look = partial(check_clip, window=window, others_have_crops=have_crops)
    found: dict[int, Checked] = {}
    for number, result in each(look, dataset.clips, workers=workers):
        found[number] = _lost(dataset.clips[number], result) if isinstance(result, Failed) else result
        if progress is not None:
            progress(1)
    checked = [found[number] for number in sorted(found)]
    findings = [*dataset.notes, *_findings_together(dataset.clips, checked), *(n for c in checked for n in c.findings)]
    findings.sort(key=lambda note: (SEVERITIES.index(note.severity), note.code, note.item))
    return Report(dataset.root, dataset.layout, tuple(checked), tuple(findings))


def _lost(clip: Clip, failed: Failed) -> Checked:
    """A clip that its process died of, or that hung: FFmpeg, not this program, reads the file."""
    note = Note("error", "unreadable", clip.id, failed.message, "Extraction will leave the clip out")
    return Checked(clip, None, None, None, (note,))


def _findings_together(clips: Sequence[Clip], checked: Sequence[Checked]) -> list[Note]:
    labels = {c.clip.id: c.labels for c in checked if c.labels is not None}
    videos = same_content(clip.video for clip in clips if clip.video is not None)
    annotations = same_content(clip.labels for clip in clips if clip.labels is not None)
    varied = {name for name, facts in labels.items() if facts.annotated and not facts.constant}
    return [*dataset_findings(clips, labels), *duplicate_findings(clips, videos, annotations, varied)]


def check_clip(clip: Clip, *, window: float = Grid.window, others_have_crops: bool = False) -> Checked:
    """Look at one clip; whatever is wrong with it becomes a finding."""
    notes = clip_findings(clip, others_have_crops)
    media, times, broken = _read_media(clip, window)
    labels, more = _read_labels(clip, media, times)
    crops, most = _read_crops(clip, media, times)
    return Checked(clip, media, labels, crops, (*notes, *broken, *more, *most))


def _read_media(clip: Clip, window: float) -> tuple[MediaFacts | None, NDArray[np.float64], list[Note]]:
    if clip.frames is not None:
        return _read_stills(clip, window)
    if clip.video is None:
        what = " and ".join(name for name, there in (("labels", clip.labels), ("crops", clip.crops)) if there)
        message = f"There is no video{f' to the {what}' if what else ''}: nothing tells when frames were shown"
        remedy = f"Put the video {clip.group}.mp4 below the root, or leave the trial out"
        return None, _NO_TIMES, [Note("error", "no-video", clip.id, message, remedy)]
    try:
        media, times = media_facts(clip.video, clip.audio if clip.audio != clip.video else None)
    except (MediaError, OSError) as error:
        return None, _NO_TIMES, [Note("error", "unreadable", clip.id, str(error), "Extraction will leave the clip out")]
    return media, times, media_findings(clip, media, window)


def _read_stills(clip: Clip, window: float) -> tuple[MediaFacts | None, NDArray[np.float64], list[Note]]:
    try:
        media, times, missing = still_facts(clip)
    except (MediaError, OSError) as error:
        return None, _NO_TIMES, [Note("error", "unreadable", clip.id, str(error), "Extraction will leave the clip out")]
    notes = media_findings(clip, media, window)
    if missing:
        message = f"{missing} of {media.frames} frames ({missing / media.frames:.1%}) have no picture"
        remedy = "They are marked as frames without a face; pictures are found by their number"
        notes.append(Note("note", "frames-missing", clip.id, message, remedy))
    return media, times, notes


def _read_labels(
    clip: Clip, media: MediaFacts | None, times: NDArray[np.float64]
) -> tuple[LabelFacts | None, list[Note]]:
    try:
        annotation = read_annotation(clip)
    except DataError as error:
        return None, [Note("error", "bad-labels", clip.id, str(error), "Extraction will leave the clip out")]
    if annotation is None:
        return None, []
    facts = label_facts(annotation, times)
    return facts, label_findings(clip, facts, media)


def _read_crops(
    clip: Clip, media: MediaFacts | None, times: NDArray[np.float64]
) -> tuple[CropFacts | None, list[Note]]:
    if not clip.crops:
        return None, []
    try:
        facts = crop_facts(clip.crops, times)
    except OSError as error:
        return None, [Note("error", "unreadable-crops", clip.id, str(error), "Check that you may read the folder")]
    return facts, crop_findings(clip, facts, media)
