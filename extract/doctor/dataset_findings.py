"""What the clips of a data set mean together: leaks, splits, duplicates, where the labels lie. Pure functions."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import SPLITS, Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.files import examples
from vaflow.extract.doctor.label_facts import LabelFacts, LabelStats, merge_stats

LEVELS = ("low", "middle", "high")
REGIONS = tuple(f"{valence} valence, {arousal} arousal" for valence in LEVELS for arousal in LEVELS)
RARE = 0.005  # share of annotated frames below which a region's prompt hardly sees an example
FEW_VIDEOS = 30  # in validation; fewer tell little
SPREAD = (0.025, 76)  # standard deviation of the mean CCC under a bootstrap over that many videos

Same = Sequence[tuple[Path, ...]]  # groups of files with equal bytes


def dataset_findings(clips: Sequence[Clip], labels: Mapping[str, LabelFacts]) -> list[Note]:
    """Videos that cross splits, splits without clips or labels, and how labels lie. `labels`: clip -> what is there."""
    notes = [*_leaks(clips), *_same_names(clips)]
    if not any(clip.labels for clip in clips):
        remedy = "The clips can be extracted and predicted on; training needs labels"
        return [*notes, Note("note", "no-labels-at-all", "", "No clip has labels", remedy)]
    lost = [clip.id for clip in clips if clip.labels and clip.split is None]
    if lost:
        remedy = "Put them into a split: training and evaluation use splits only"
        notes.append(Note("warning", "labels-without-split", "", f"Labels, but no split: {examples(lost)}", remedy))
    for split in ("train", "val"):
        notes += _split_findings(split, [clip for clip in clips if clip.split == split], labels)
    return [*notes, *_region_findings(_stats(clips, labels, "train"), _stats(clips, labels, "val"))]


def _split_findings(split: str, own: Sequence[Clip], labels: Mapping[str, LabelFacts]) -> list[Note]:
    if not own:
        remedy = "Training needs clips in 'train' and in 'val'"
        return [Note("warning", "split-empty", "", f"No clip is in the split {split!r}", remedy)]
    annotated = [clip for clip in own if clip.id in labels and labels[clip.id].annotated]
    if not annotated:
        message = f"No frame of the split {split!r} has a label that can be used"
        return [Note("warning", "split-unlabelled", "", message, "Training needs labels in 'train' and 'val'")]
    return _validation_findings(annotated, labels) if split == "val" else []


def _validation_findings(annotated: Sequence[Clip], labels: Mapping[str, LabelFacts]) -> list[Note]:
    """How far a score on this split can be trusted."""
    notes = []
    videos = len({clip.group for clip in annotated})
    if videos < FEW_VIDEOS:
        spread = SPREAD[0] * (SPREAD[1] / videos) ** 0.5
        message = (
            f"Labels of {videos} video{'s' * (videos != 1)} to validate on: expect ± {2 * spread:.2f} on a mean CCC"
        )
        remedy = "Compare by the intervals that `vaflow evaluate` gives; k-fold uses all videos"
        notes.append(Note("note", "few-videos", "", message, remedy))
    scores = constant_scores([labels[clip.id].stats for clip in annotated])
    told = [f"{s:.2f} ({name})" for name, s in zip(("valence", "arousal"), scores, strict=True) if np.isfinite(s)]
    if len(annotated) > 1 and told:
        message = f"In 'val' the right constant for each clip, and nothing else, scores a CCC of {' and '.join(told)}"
        remedy = "Read the CCC within videos beside the CCC over all frames"
        notes.append(Note("note", "between-videos", "", message, remedy))
    return notes


def constant_scores(parts: Sequence[LabelStats]) -> NDArray[np.float64]:
    """CCC [2] of predicting each clip's own mean: 2 B / (B + T) of the variance between clips and the total one.

    NaN where a dimension has no labels or no variance.
    """
    count = np.array([part.count for part in parts], np.float64)
    mean = np.array([part.total for part in parts]) / np.maximum(count, 1)
    n = count.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = (count * mean).sum(0) / n
        between = (count * (mean - middle) ** 2).sum(0) / n
        total = np.sum([part.squares for part in parts], 0) / n - middle**2
        scores: NDArray[np.float64] = np.where(total > 1e-12, 2 * between / (between + total), np.nan)
    return scores


def _stats(clips: Iterable[Clip], labels: Mapping[str, LabelFacts], split: str) -> LabelStats:
    return merge_stats([labels[clip.id].stats for clip in clips if clip.split == split and clip.id in labels])


def _region_findings(train: LabelStats, val: LabelStats) -> list[Note]:
    """Regions of the prompt head that training hardly sees, and those that only validation has."""
    if not train.regions.sum():
        return []
    share = train.regions / train.regions.sum()
    rare = [f"{REGIONS[k]} ({share[k]:.2%})" for k in range(9) if share[k] < RARE]
    notes = []
    if rare:
        message = f"{len(rare)} of nine regions have under {RARE:.1%} of the frames of 'train': {'; '.join(rare)}"
        remedy = "Their prompts see hardly an example: do not lean on the read-out there"
        notes.append(Note("note", "rare-regions", "", message, remedy))
    unseen = [f"{REGIONS[k]} ({val.regions[k]} frames)" for k in range(9) if val.regions[k] and not train.regions[k]]
    if unseen:
        message = f"'val' has labels where 'train' has none: {'; '.join(unseen)}"
        remedy = "A model cannot have learnt these; look whether the splits were meant so"
        notes.append(Note("note", "unseen-regions", "", message, remedy))
    return notes


def _leaks(clips: Iterable[Clip]) -> list[Note]:
    """Groups (source videos) whose clips are in more than one split."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for clip in clips:
        if clip.split is not None:
            groups[clip.group][clip.split].append(clip.id)
    notes = []
    for group, splits in groups.items():
        if len(splits) > 1:
            where = "; ".join(f"{split}: {', '.join(splits[split])}" for split in SPLITS if split in splits)
            message = f"The source video {group} is in several splits ({where})"
            remedy = "Keep one split of it: results on a video that was trained on say nothing"
            notes.append(Note("error", "leak", group, message, remedy))
    return notes


def _same_names(clips: Iterable[Clip]) -> list[Note]:
    """Videos of one name in several splits, where names tell videos apart within each split."""
    named: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.video is not None and clip.split is not None:
            named[clip.video.stem.lower()].append(clip)
    notes = []
    for found in named.values():
        per_split = Counter(clip.split for clip in found)
        groups = {clip.group for clip in found}
        if len(per_split) < 2 or len(groups) < 2 or len(found) > len(per_split):
            continue
        for clip in found:
            others = ", ".join(f"{other.id} ({other.split})" for other in found if other is not clip)
            message = f"Another split ({clip.split} is this one's) has a video of the same name: {others}"
            remedy = "If it is the same recording, keep it in one split"
            notes.append(Note("warning", "same-name", clip.id, message, remedy))
    return notes


def duplicate_findings(clips: Sequence[Clip], videos: Same, label_files: Same, varied: set[str]) -> list[Note]:
    """Clips whose video, or whose annotation, has the same bytes as another clip's.

    Args:
        clips: all of them.
        videos, label_files: files of the same content.
        varied: clips whose labels say something: those that never change may well be alike.
    """
    notes = []
    for clip, twins in _twins({clip: clip.video for clip in clips}, videos):
        splits = {twin.split for twin in twins} - {None}
        told = ", ".join(f"{twin.id} ({twin.split or 'no split'})" for twin in twins)
        message = f"The video has the same content as that of {told}"
        if clip.split is not None and splits - {clip.split}:
            message = f"{message}, and this one is in {clip.split!r}"
            remedy = "Keep one split of it: results on a video that was trained on say nothing"
            notes.append(Note("error", "duplicate-across-splits", clip.id, message, remedy))
        else:
            notes.append(Note("warning", "duplicate", clip.id, message, "Keep one of them"))
    own = {clip: clip.labels for clip in clips if clip.id in varied}
    for clip, twins in _twins(own, label_files):
        message = f"The annotation is byte for byte that of {', '.join(twin.id for twin in twins)}"
        remedy = "Check which of them it belongs to"
        notes.append(Note("warning", "same-labels", clip.id, message, remedy))
    return notes


def _twins(files: Mapping[Clip, Path | None], same: Same) -> list[tuple[Clip, list[Clip]]]:
    """Every clip whose file equals another clip's other file, and those clips."""
    group_of = {path: k for k, group in enumerate(same) for path in group}
    owners: dict[int, list[Clip]] = defaultdict(list)
    for clip, path in files.items():
        if path in group_of:
            owners[group_of[path]].append(clip)
    found = []
    for clips in owners.values():
        for clip in clips:
            twins = [other for other in clips if files[other] != files[clip]]
            if twins:
                found.append((clip, twins))
    return found
