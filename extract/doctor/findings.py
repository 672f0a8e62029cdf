"""Interpret the facts about clips, one by one and together: findings, each with a remedy. Pure functions.

Notes are what is usual in Aff-Wild2: 3 rows fewer to 2 more than frames, missing crops, sequences of -5, a variable
frame rate, missing or short audio. Errors are items that cannot be used, or that invalidate results.

Costs in CCC come from the 76 annotation files of the validation split of Aff-Wild2 (ABAW, valence-arousal track;
383,814 rows), scored with perfect or synthetic predictions, so that each figure is the cost of one mistake without any
model. `python scripts/label_costs.py FOLDER` computes them for any folder of label files.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import SPLITS, Clip, Note
from vaflow.datasets.labels import USUAL_ROWS
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.errors import command, count, examples
from vaflow.extract.doctor.facts import (
    AUDIO_SLACK,
    OPENED_CROPS,
    CropFacts,
    LabelFacts,
    LabelStats,
    MediaFacts,
    PeopleFacts,
    merge_stats,
)
from vaflow.extract.faces.crops import turn_remedy
from vaflow.extract.faces.identity import AUTO, NONE, REMEDY, resolve

# Perfect predictions against shifted labels: seconds -> CCC lost in valence and in arousal.
SHIFTS = ((0.0, 0.0, 0.0), (0.5, 0.059, 0.112), (1.0, 0.121, 0.212))

_SHIFTED = (
    "On Aff-Wild2 (validation), labels that are 0.5 s off lower the CCC of perfect predictions by .06 (valence) and "
    ".11 (arousal), 1 s off by .12 and .21"
)
_DRIFT = (
    "With times computed as number / rate, labels drift from frames; on Aff-Wild2 (validation), a drift of 1 s lowers "
    "the CCC of perfect predictions by .12 and .21"
)
_NOT_USED = "The clip is neither trained on nor scored"
_MEANS = (
    "On Aff-Wild2 (validation), predicting each video's mean label scores a CCC of .70 (valence) and .55 (arousal): "
    "a model that has seen the video needs no more"
)

COSTS = {  # kind of finding -> its effect on the CCC, where one was measured
    "leak": _MEANS,
    "two-splits": _MEANS,
    "duplicate-across-splits": _MEANS,
    "same-name": _MEANS,
    "duplicate": "The clip counts twice, and k-fold may put it on both sides",
    "row-count": _SHIFTED,
    "labels-outlast": _SHIFTED,
    "two-clocks": _SHIFTED,
    "crops-beyond": _SHIFTED,
    "variable-rate": _DRIFT,
    "rate-claim": _DRIFT,
    "unannotated": (
        "On Aff-Wild2 (validation), a predictor that scores .586 / .447 scores .408 / .316 if -5 is kept as a target"
    ),
    "crops-missing": (
        "Crops read by position instead of number show a later moment than their label after every gap; "
        "frames that are left out of the score are the hardest ones"
    ),
    "unreadable": "Labelled frames of the clip are missing from the score, which is then not comparable",
    "few-videos": (
        "On Aff-Wild2 (76 validation videos), the mean CCC has a standard deviation of .025 over resampled videos"
    ),
    "between-videos": "A model that only tells videos apart scores well; the CCC within videos shows it",
}
FEW_CROPS = 0.5  # share of frames without a crop above which it is a warning
DRIFT_FRAMES = 1.5  # error of index / rate in frames above which the rate is called variable
FASTEST = 240  # frames per second; higher values in headers are clock ticks
RATE_SLACK = 0.01  # share of the duration by which a nominal frame rate may be off
STILL = 1.0  # seconds without a new frame before it is called a gap
RARE = 0.005  # share of annotated frames below which a region counts as rare
FEW_VIDEOS = 30  # in validation; the score of fewer is imprecise
SPREAD = (0.025, 76)  # standard deviation of the mean CCC under a bootstrap over that many videos
Same = Sequence[tuple[Path, ...]]  # groups of files with equal bytes


def shift_loss(seconds: float) -> tuple[float, float]:
    """CCC loss of perfect predictions in valence and arousal at an offset of `seconds`; constant from 1 s on."""
    for (t0, v0, a0), (t1, v1, a1) in pairwise(SHIFTS):
        if seconds <= t1:
            share = (max(seconds, t0) - t0) / (t1 - t0)
            return v0 + share * (v1 - v0), a0 + share * (a1 - a0)
    return SHIFTS[-1][1:]


def media_findings(clip: Clip, facts: MediaFacts, window: float) -> list[Note]:
    """Frame rate, gaps between frames, audio, and clips shorter than a window of `window` seconds."""
    notes = [*_rate_findings(clip, facts), *_audio_findings(clip, facts)]
    if facts.gap > max(STILL, 2 * facts.interval):
        message = f"No new frame for {facts.gap:.2f} s; the usual interval is {facts.interval:.3f} s"
        remedy = "The last frame is repeated; check the file if it should have more"
        notes.append(Note("note", "picture-gap", clip.id, message, remedy))
    if facts.transfer:
        message = f"High dynamic range video ({facts.transfer}), read without tone mapping: colours look flat"
        remedy = "Convert it to BT.709 before extraction if the other clips are not HDR"
        notes.append(Note("warning", "hdr", clip.id, message, remedy))
    if facts.pixel_aspect != "1":
        message = f"Pixels are not square ({facts.pixel_aspect})"
        notes.append(Note("note", "pixel-aspect", clip.id, message, "No action: frames are scaled to square pixels"))
    if facts.duration < window:
        message = f"Duration {facts.duration:.2f} s, shorter than a window of {window:g} s"
        notes.append(Note("note", "short-clip", clip.id, message, "It becomes one padded window"))
    return notes


def _rate_findings(clip: Clip, facts: MediaFacts) -> list[Note]:
    remedy = "No action: presentation times are used throughout"
    nominal = facts.nominal_rate if facts.nominal_rate and facts.nominal_rate <= FASTEST else None
    named = (("nominal", nominal), ("average", facts.average_rate))
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in named if rate) + " frames/s"
    if facts.drift > DRIFT_FRAMES * facts.interval:
        message = f"Variable frame rate: number / rate is off by up to {facts.drift:.2f} s ({rates})"
        return [Note("note", "variable-rate", clip.id, f"{message}; {_loss(facts.drift)}", remedy)]
    if not (nominal and facts.average_rate):
        return []
    off = abs(facts.frames / nominal - facts.frames / facts.average_rate)
    if off <= max(DRIFT_FRAMES * facts.interval, RATE_SLACK * facts.duration):
        return []
    message = f"Wrong nominal frame rate: number / rate is {off:.2f} s off at the end ({rates})"
    return [Note("note", "rate-claim", clip.id, f"{message}; {_loss(off)}", remedy)]


def _loss(seconds: float) -> str:
    valence, arousal = shift_loss(seconds)
    return f"it would lower the CCC by up to {valence:.2f} (valence) and {arousal:.2f} (arousal)"


def _audio_findings(clip: Clip, facts: MediaFacts) -> list[Note]:
    if facts.audio == "none":
        remedy = "The clip is used without audio; check the file if it should have some"
        return [Note("note", "no-audio", clip.id, "The file has no audio stream", remedy)]
    if facts.audio == "unreadable":
        remedy = "The clip is used without audio; copy the file again if it should have some"
        return [Note("warning", "audio-unreadable", clip.id, "The audio stream does not decode", remedy)]
    if facts.audio == "silent":
        remedy = "Silence counts as valid audio; check the file if it should be audible"
        return [Note("note", "audio-silent", clip.id, "The audio is digital silence from start to end", remedy)]
    start, end = facts.audio_span or (0.0, 0.0)
    if clip.video not in (None, clip.audio) and end - facts.duration > AUDIO_SLACK:
        message = f"The separate audio file ends at {end:.2f} s, the video at {facts.duration:.2f} s"
        remedy = "The rest is not used; check that both files are of the same recording"
        return [Note("note", "audio-outlasts", clip.id, message, remedy)]
    if facts.audio == "partial" and facts.audio_span is not None:
        message = f"Audio from {start:.2f} to {end:.2f} s, the video ends at {facts.duration:.2f} s"
        return [Note("note", "audio-partial", clip.id, message, "The rest is marked as missing audio")]
    return []


def label_findings(clip: Clip, facts: LabelFacts, media: MediaFacts | None) -> list[Note]:
    """Rows against frames, sequences without annotation, one dimension only, constant values."""
    notes = [] if media is None else _length_findings(clip, facts, media)
    missing = sum(stop - start for start, stop in facts.unannotated)
    if missing == facts.rows:
        message = f"None of the {facts.rows} rows is annotated"
        notes.append(Note("warning", "nothing-annotated", clip.id, message, _NOT_USED))
    elif missing:
        inner = sum(start > 0 and stop < facts.rows for start, stop in facts.unannotated)
        positions = ["at the start"] * (facts.unannotated[0][0] == 0) + [f"in the middle ({inner})"] * (inner > 0)
        positions += ["at the end"] * (facts.unannotated[-1][1] == facts.rows)
        message = (
            f"{missing} of {facts.rows} rows ({missing / facts.rows:.1%}) are not annotated: "
            f"{', '.join(positions)}, at most {max(b - a for a, b in facts.unannotated)} in a row"
        )
        notes.append(Note("note", "unannotated", clip.id, message, "They are neither trained on nor scored"))
    if facts.half:
        message = f"{facts.half} rows are annotated in one dimension only"
        notes.append(Note("warning", "half-annotated", clip.id, message, "The other dimension is used"))
    if facts.constant and missing < facts.rows:
        verb = "has" if len(facts.constant) == 1 else "have"
        message = f"{' and '.join(facts.constant)} {verb} one value throughout"
        remedy = "The clip is left out of the CCC within videos"
        notes.append(Note("note", "constant-labels", clip.id, message, remedy))
    return notes


def _length_findings(clip: Clip, facts: LabelFacts, media: MediaFacts) -> list[Note]:
    if facts.problem == "labels-outlast":
        message = f"Labels end at {facts.end:.2f} s, the video at {media.duration:.2f} s"
        return [Note("warning", "labels-outlast", clip.id, message, "Check that the labels belong to this video")]
    if facts.problem == "two-clocks":
        message = f"The columns frame and time differ by up to {facts.clock_gap:.2f} s; frame is used"
        return [Note("warning", "two-clocks", clip.id, message, "Leave out the column that does not fit the video")]
    frames = media.frames
    difference = int(facts.end) - frames
    if facts.clock == "time" or difference == 0 or (facts.clock == "frame" and difference < 0):
        return []
    usual = facts.problem != "row-count"
    message = f"{int(facts.end)} rows for {frames} frames ({difference:+d})"
    remedy = (
        "Row k belongs to frame k; rows beyond the last frame continue at the usual interval"
        if usual
        else "Check that labels and video belong together, and that the video is complete"
    )
    return [Note("note" if usual else "warning", "row-count", clip.id, message, remedy)]


def crop_findings(clip: Clip, facts: CropFacts, media: MediaFacts | None) -> list[Note]:
    """Crops that cannot be read, frames without a crop, and crops beyond the last frame."""
    notes = []
    if facts.damaged:
        message = f"Of {min(facts.found, OPENED_CROPS)} crops that were opened, these do not decode: "
        remedy = "They are marked as frames without a face; unpack the archive again"
        notes.append(Note("warning", "crops-damaged", clip.id, message + examples(facts.damaged), remedy))
    if not facts.found:
        remedy = "All its frames are marked as frames without a face; unpack the archive again"
        return [*notes, Note("warning", "crops-empty", clip.id, "The folder of crops is empty", remedy)]
    if media is None:
        return notes
    frames = media.frames
    if facts.missing:
        few = facts.missing > FEW_CROPS * frames
        message = (
            f"{facts.missing} of {frames} frames ({facts.missing / frames:.1%}) have no crop, "
            f"at most {facts.longest} in a row ({facts.longest * media.interval:.1f} s)"
        )
        remedy = "They are marked as frames without a face; a crop's number is its frame"
        notes.append(Note("warning" if few else "note", "crops-missing", clip.id, message, remedy))
    if facts.beyond:
        usual = facts.last <= frames + USUAL_ROWS[1]
        message = f"{facts.beyond} crops are beyond the last frame: numbers up to {facts.last}, {frames} frames"
        remedy = "They are not used" if usual else "Check that crops and video belong together"
        notes.append(Note("note" if usual else "warning", "crops-beyond", clip.id, message, remedy))
    return notes


def clip_findings(clip: Clip, others_have_crops: bool) -> list[Note]:
    """Labels or crops that a clip lacks."""
    notes = []
    if clip.labels is None and not clip.person_labels and clip.split in ("train", "val"):
        message = f"No labels in the split {clip.split!r}"
        notes.append(Note("warning", "no-labels", clip.id, message, _NOT_USED))
    if not clip.crops and clip.video is not None and others_have_crops:
        message = "No folder of crops: faces are detected in the video"
        if clip.side:
            message += f"; {clip.id} is the person on the {clip.side}, and fails where the sides cannot be told apart"
        notes.append(Note("warning", "no-crops", clip.id, message, "Unpack all archives of crops below the root"))
    return notes


def dataset_findings(clips: Sequence[Clip], labels: Mapping[str, LabelFacts]) -> list[Note]:
    """Videos that cross splits, splits without clips or labels, the distribution of labels. `labels`: clip -> facts."""
    notes = [*_shared_source_findings(clips), *_same_features(clips)]
    labelled = [clip for clip in clips if clip.labels or clip.person_labels]
    if not labelled:
        remedy = "The clips can be extracted and predicted; training requires labels"
        return [*notes, Note("note", "no-labels-at-all", "", "No clip has labels", remedy)]
    if lost := [clip.id for clip in labelled if clip.split is None]:
        remedy = "Add them to a split: training and evaluation use splits only"
        notes.append(Note("warning", "labels-without-split", "", f"Labels, but no split: {examples(lost)}", remedy))
    for split in ("train", "val"):
        members = [clip for clip in clips if clip.split == split]
        annotated = [clip for clip in members if clip.id in labels and labels[clip.id].annotated]
        if not members:
            remedy = "Training requires clips in 'train' and in 'val'"
            notes.append(Note("warning", "split-empty", "", f"No clip is in the split {split!r}", remedy))
        elif not annotated:
            message = f"No frame of the split {split!r} has a usable label"
            remedy = "Training requires labels in 'train' and 'val'"
            notes.append(Note("warning", "split-unlabelled", "", message, remedy))
        elif split == "val":
            notes += _validation_findings(annotated, labels)
    return [*notes, *_region_findings(_stats(clips, labels, "train"), _stats(clips, labels, "val"))]


def _validation_findings(annotated: Sequence[Clip], labels: Mapping[str, LabelFacts]) -> list[Note]:
    """Precision of a score on this split, and the score of constant predictions."""
    notes = []
    videos = len({clip.group for clip in annotated})
    if videos < FEW_VIDEOS:
        spread = SPREAD[0] * (SPREAD[1] / videos) ** 0.5
        message = f"{count(videos, 'labelled validation video')}: a mean CCC is uncertain by ± {2 * spread:.2f}"
        remedy = "Compare intervals, as `vaflow evaluate` prints them, or use k-fold (`vaflow folds`)"
        notes.append(Note("note", "few-videos", "", message, remedy))
    scores = constant_scores([labels[clip.id].stats for clip in annotated])
    shown = [f"{s:.2f} ({name})" for name, s in zip(("valence", "arousal"), scores, strict=True) if np.isfinite(s)]
    if len(annotated) > 1 and shown:
        message = f"In 'val', predicting each clip's mean label scores a CCC of {' and '.join(shown)}"
        remedy = "Compare the CCC within videos as well"
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
    """Regions that are rare in training, and regions that occur only in validation."""
    if not train.regions.sum():
        return []
    share = train.regions / train.regions.sum()
    notes = []
    if rare := [f"{REGION_NAMES[k]} ({share[k]:.2%})" for k in range(9) if share[k] < RARE]:
        message = f"{len(rare)} of nine regions have under {RARE:.1%} of the frames of 'train': {'; '.join(rare)}"
        remedy = "The prompt head has hardly an example of them: do not rely on its read-out there"
        notes.append(Note("note", "rare-regions", "", message, remedy))
    unseen = [
        f"{REGION_NAMES[k]} ({val.regions[k]} frames)" for k in range(9) if val.regions[k] and not train.regions[k]
    ]
    if unseen:
        message = f"'val' has labels where 'train' has none: {'; '.join(unseen)}"
        remedy = "A model cannot learn these; check the splits"
        notes.append(Note("note", "unseen-regions", "", message, remedy))
    return notes


def _shared_source_findings(clips: Iterable[Clip]) -> list[Note]:
    """Source videos in several splits, and videos of one name in several splits if names are unique within each."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for clip in clips:
        if clip.split is not None:
            groups[clip.group][clip.split].append(clip.id)
    notes = []
    for group, splits in groups.items():
        if len(splits) > 1:
            where = "; ".join(f"{split}: {', '.join(splits[split])}" for split in SPLITS if split in splits)
            message = f"The source video {group} is in several splits ({where})"
            remedy = "Keep it in one split: a score on training videos is not meaningful"
            notes.append(Note("error", "leak", group, message, remedy))
    named: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.video is not None and clip.split is not None:
            named[clip.video.stem.lower()].append(clip)
    for namesakes in named.values():
        per_split = {clip.split for clip in namesakes}
        if len(per_split) < 2 or len({clip.group for clip in namesakes}) < 2 or len(namesakes) > len(per_split):
            continue
        for clip in namesakes:
            others = ", ".join(f"{other.id} ({other.split})" for other in namesakes if other is not clip)
            message = f"The split is {clip.split}, and another one has a video of the same name: {others}"
            remedy = "If it is the same recording, keep it in one split"
            notes.append(Note("warning", "same-name", clip.id, message, remedy))
    return notes


def _same_features(clips: Iterable[Clip]) -> list[Note]:
    """Clips that may get equal faces and audio: same video, no crops, no other side."""
    together: dict[tuple[Path | None, Path | None], list[Clip]] = defaultdict(list)
    for clip in clips:
        if not clip.crops and (clip.video or clip.frames) is not None:
            together[clip.video, clip.frames].append(clip)
    notes = []
    for sharing in together.values():
        for clip in sharing:
            others = [other for other in sharing if other is not clip and other.audio == clip.audio]
            same = [other.id for other in others if other.side == clip.side]
            if same:
                message = f"The features would be the same as those of {', '.join(same)}: one video, and no crops"
                remedy = "Add the face crops of these trials, or remove all but one"
                notes.append(Note("error", "same-features", clip.id, message, remedy))
            elif others and not clip.side:
                message = f"The main person of the video may be that of {', '.join(other.id for other in others)}"
                remedy = "Add the face crops of these trials"
                notes.append(Note("warning", "same-person", clip.id, message, remedy))
    return notes


def duplicate_findings(clips: Sequence[Clip], videos: Same, label_files: Same, varied: set[str]) -> list[Note]:
    """Clips whose video, or whose annotation, has the same bytes as another clip's.

    Args:
        videos, label_files: files of the same content.
        varied: clips whose labels are not constant: constant ones may be equal by chance.
    """
    notes = []
    for clip, twins in _twins({clip: clip.video for clip in clips}, videos):
        splits = {twin.split for twin in twins} - {None}
        named = ", ".join(f"{twin.id} ({twin.split or 'no split'})" for twin in twins)
        message = f"The video has the same content as that of {named}"
        if clip.split is not None and splits - {clip.split}:
            message = f"{message}, and this one is in {clip.split!r}"
            remedy = "Keep it in one split: a score on training videos is not meaningful"
            notes.append(Note("error", "duplicate-across-splits", clip.id, message, remedy))
        else:
            notes.append(Note("warning", "duplicate", clip.id, message, "Keep one of them"))
    labels = {clip: clip.labels for clip in clips if clip.id in varied}
    for clip, twins in _twins(labels, label_files):
        message = f"The annotation file equals that of {', '.join(twin.id for twin in twins)}"
        remedy = "Check which clip it belongs to"
        notes.append(Note("warning", "same-labels", clip.id, message, remedy))
    return notes


def _twins(files: Mapping[Clip, Path | None], same: Same) -> list[tuple[Clip, list[Clip]]]:
    """Every clip whose file equals a different file of other clips, and those clips."""
    group_of = {path: k for k, group in enumerate(same) for path in group}
    owners: dict[int, list[Clip]] = defaultdict(list)
    for clip, path in files.items():
        if path in group_of:
            owners[group_of[path]].append(clip)
    return [
        (clip, twins)
        for clips in owners.values()
        for clip in clips
        if (twins := [other for other in clips if files[other] != files[clip]])
    ]


def people_findings(facts: dict[str, PeopleFacts], clips: Sequence[Clip], root: Path) -> list[Note]:
    """Notes on clips with several people and with cuts; `clips`: those that could have been looked at."""
    sides = {clip.id: clip.side for clip in clips if clip.side and not clip.crops}
    notes = []
    for item, one in sorted(facts.items()):
        where = f" in {one.frames} frames that were compared" if one.frames else ""
        if one.people > 1:
            chosen = f"the one on the {sides[item]}" if item in sides else "the main one"
            message = f"{one.people} people{' in one frame' if one.frames else ''}; {chosen} is estimated"
            choice = "" if item in sides else "; --person chooses another one, or all"
            remedy = f"See them with `{command('faces', root)}`{choice}"
            notes.append(Note("note", "several-people", item, message, remedy))
        if one.turned:
            message = f"Most faces are turned by {one.turned} degrees: their crops are not aligned"
            notes.append(Note("warning", "turned-faces", item, message, turn_remedy(one.turned)))
        if one.cuts:
            joined = resolve(AUTO) != NONE
            message = f"{count(one.cuts, 'cut')}{where}; people are {'joined' if joined else 'not joined'} across them"
            notes.append(Note("note", "cuts", item, message, "" if joined else f"{REMEDY}, or --identity onnx:FILE"))
    if len(facts) < len(clips):
        message = f"People and cuts were looked for in {len(facts)} of {len(clips)} clips"
        notes.append(Note("note", "people-sampled", "", message, "Extraction counts them in every clip"))
    return notes
