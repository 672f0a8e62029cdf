"""What the facts about clips mean: findings for a person, each with what can be done. Pure functions.

Normal for Aff-Wild2, hence a note: 3 rows fewer to 2 more than frames, missing crops, stretches of -5, a variable
frame rate, sound that is missing or short. Errors are what cannot be used or makes results worthless.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from vaflow.datasets.clip import SPLITS, Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.files import examples
from vaflow.extract.facts import CropFacts, LabelFacts, MediaFacts

USUAL_ROWS = (-3, 2)  # annotation rows minus frames, as in Aff-Wild2
FEW_CROPS = 0.5  # below this share of frames with a crop, a clip is worth looking at
DRIFT_FRAMES = 1.5  # frames that index / rate may be off before the rate is called variable
LATE_LABELS = 1.0  # seconds that time-stamped labels may go on after the picture


def media_findings(clip: Clip, facts: MediaFacts, window: float) -> list[Note]:
    """Variable frame rate, sound missing or short, clips shorter than a window of `window` seconds."""
    notes = []
    if facts.drift > DRIFT_FRAMES * facts.interval:
        message = f"Variable frame rate: number / rate misses frame times by up to {facts.drift:.2f} s"
        rates = ", ".join(
            f"{name} {rate:.2f}"
            for name, rate in (("nominal", facts.nominal_rate), ("average", facts.average_rate))
            if rate
        )
        remedy = "Nothing to do here: presentation times are used throughout"
        notes.append(Note("note", "variable-rate", clip.id, f"{message} ({rates} frames/s)", remedy))
    if facts.audio == "none":
        remedy = "The clip is used without sound; check the file if there should be some"
        notes.append(Note("note", "no-audio", clip.id, "The file has no audio stream", remedy))
    if facts.audio == "partial" and facts.audio_span is not None:
        start, end = facts.audio_span
        message = f"Sound from {start:.2f} to {end:.2f} s, the picture ends at {facts.duration:.2f} s"
        notes.append(Note("note", "audio-partial", clip.id, message, "The rest is marked as missing sound"))
    if facts.duration < window:
        message = f"{facts.duration:.2f} s long, shorter than a window of {window:g} s"
        notes.append(Note("note", "short-clip", clip.id, message, "It is one padded window"))
    return notes


def label_findings(clip: Clip, facts: LabelFacts, media: MediaFacts | None) -> list[Note]:
    """Rows against frames, stretches without annotation, one dimension only, constant values."""
    notes = [] if media is None else _length_findings(clip, facts, media)
    missing = sum(stop - start for start, stop in facts.runs)
    if missing == facts.rows:
        message = f"None of the {facts.rows} rows is annotated"
        notes.append(
            Note("warning", "nothing-annotated", clip.id, message, "The clip is neither trained on nor scored")
        )
    elif missing:
        message = (
            f"{missing} of {facts.rows} rows ({missing / facts.rows:.1%}) are not annotated: "
            f"{_where(facts.runs, facts.rows)}, the longest stretch {max(b - a for a, b in facts.runs)} rows"
        )
        notes.append(Note("note", "unannotated", clip.id, message, "They are never trained on nor scored"))
    if facts.half:
        message = f"{facts.half} rows are annotated in one dimension only"
        notes.append(Note("warning", "half-annotated", clip.id, message, "The other dimension is used"))
    if facts.constant and missing < facts.rows:
        message = f"{' and '.join(facts.constant)} never changes"
        remedy = "The clip does not count in the CCC within videos"
        notes.append(Note("note", "constant-labels", clip.id, message, remedy))
    return notes


def _length_findings(clip: Clip, facts: LabelFacts, media: MediaFacts) -> list[Note]:
    if facts.clock == "time":
        late = facts.end - media.duration
        if late <= LATE_LABELS:
            return []
        message = f"Labels go on until {facts.end:.2f} s, the picture ends at {media.duration:.2f} s"
        return [Note("warning", "labels-outlast", clip.id, message, "Check that the labels belong to this video")]
    frames = media.frames
    difference = int(facts.end) - frames
    if difference == 0 or (facts.clock == "frame" and difference < 0):
        return []
    usual = USUAL_ROWS[0] <= difference <= USUAL_ROWS[1]
    message = f"{int(facts.end)} rows for {frames} frames ({difference:+d})"
    remedy = (
        "Row k stays with frame k; rows beyond the last frame go on at the usual interval"
        if usual
        else "Check that labels and video belong together, and that the video is whole"
    )
    return [Note("note" if usual else "warning", "row-count", clip.id, message, remedy)]


def _where(runs: Sequence[tuple[int, int]], rows: int) -> str:
    """ "at the start, in the middle (2)"."""
    inner = sum(start > 0 and stop < rows for start, stop in runs)
    places = ["at the start"] * (runs[0][0] == 0) + [f"in the middle ({inner})"] * (inner > 0)
    return ", ".join(places + ["at the end"] * (runs[-1][1] == rows))


def crop_findings(clip: Clip, facts: CropFacts, media: MediaFacts | None) -> list[Note]:
    """Frames without a crop, and crops beyond the last frame."""
    if media is None:
        return []
    frames, notes = media.frames, []
    if facts.missing:
        few = facts.missing > FEW_CROPS * frames
        message = f"{facts.missing} of {frames} frames ({facts.missing / frames:.1%}) have no crop"
        remedy = "They are marked as frames without a face; crops are found by their number, never by their position"
        notes.append(Note("warning" if few else "note", "crops-missing", clip.id, message, remedy))
    if facts.beyond:
        usual = facts.last <= frames + USUAL_ROWS[1]
        message = f"{facts.beyond} crops lie beyond the last frame: up to number {facts.last}, the video has {frames}"
        remedy = "They are not used" if usual else "Check that crops and video belong together"
        notes.append(Note("note" if usual else "warning", "crops-beyond", clip.id, message, remedy))
    return notes


def clip_findings(clip: Clip, others_have_crops: bool) -> list[Note]:
    """What the record of a clip itself says: labels or crops that are not there."""
    notes = []
    if clip.labels is None and clip.split in ("train", "val"):
        message = f"The split is {clip.split!r}, and there are no labels"
        notes.append(Note("warning", "no-labels", clip.id, message, "The clip is neither trained on nor scored"))
    if not clip.crops and clip.video is not None and others_have_crops:
        message = "There is no folder of crops; faces will be looked for in the video"
        if clip.id != clip.group:
            message += f", where {clip.id} may be taken for the other person of {clip.group}"
        notes.append(Note("warning", "no-crops", clip.id, message, "Unpack all archives of crops below the root"))
    return notes


def dataset_findings(clips: Sequence[Clip], annotated: Mapping[str, int]) -> list[Note]:
    """Videos that cross splits, splits without clips or labels. `annotated`: clip -> frames that have a label."""
    notes = _leaks(clips)
    if not any(clip.labels for clip in clips):
        remedy = "The clips can be extracted and predicted on; training needs labels"
        return [*notes, Note("note", "no-labels-at-all", "", "No clip has labels", remedy)]
    lost = [clip.id for clip in clips if clip.labels and clip.split is None]
    if lost:
        remedy = "Put them into a split: training and evaluation use splits only"
        notes.append(Note("warning", "labels-without-split", "", f"Labels, but no split: {examples(lost)}", remedy))
    for split in ("train", "val"):
        own = [clip.id for clip in clips if clip.split == split]
        if not own:
            remedy = "Training needs clips in 'train' and in 'val'"
            notes.append(Note("warning", "split-empty", "", f"No clip is in the split {split!r}", remedy))
        elif not any(annotated.get(name) for name in own):
            message = f"No frame of the split {split!r} has a label that can be used"
            notes.append(Note("warning", "split-unlabelled", "", message, "Training needs labels in 'train' and 'val'"))
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
