"""What the facts about a clip mean: findings for a person, each with what can be done. Pure functions.

Normal for Aff-Wild2, hence a note: 3 rows fewer to 2 more than frames, missing crops, stretches of -5, a variable
frame rate, sound that is missing or short. Errors are what cannot be used or makes results worthless.
"""

from collections.abc import Sequence

from vaflow.datasets.clip import Clip
from vaflow.datasets.dataset import Note
from vaflow.datasets.files import examples
from vaflow.extract.doctor.costs import shift_loss
from vaflow.extract.doctor.facts import OPENED_CROPS, CropFacts, MediaFacts
from vaflow.extract.doctor.label_facts import LabelFacts

USUAL_ROWS = (-3, 2)  # annotation rows minus frames, as in Aff-Wild2
FEW_CROPS = 0.5  # below this share of frames with a crop, a clip is worth looking at
DRIFT_FRAMES = 1.5  # frames that index / rate may be off before the rate is called variable
LATE_LABELS = 1.0  # seconds that time-stamped labels may go on after the picture
FASTEST = 240  # frames per second; what claims more is a clock's ticks, no frame rate
RATE_SLACK = 0.01  # share of its duration by which a claimed frame rate may misjudge a clip
STILL = 1.0  # seconds for which one picture stands before it is called a gap


def media_findings(clip: Clip, facts: MediaFacts, window: float) -> list[Note]:
    """Frame rate, pictures that stand still, sound, clips shorter than a window of `window` seconds."""
    notes = [*_rate_findings(clip, facts), *_sound_findings(clip, facts)]
    if facts.gap > max(STILL, 2 * facts.interval):
        message = f"For {facts.gap:.2f} s there is no new picture; the usual interval is {facts.interval:.3f} s"
        remedy = "The last picture is used meanwhile; check the file if it should have more"
        notes.append(Note("note", "picture-gap", clip.id, message, remedy))
    if facts.duration < window:
        message = f"{facts.duration:.2f} s long, shorter than a window of {window:g} s"
        notes.append(Note("note", "short-clip", clip.id, message, "It is one padded window"))
    return notes


def _rate_findings(clip: Clip, facts: MediaFacts) -> list[Note]:
    remedy = "Nothing to do here: presentation times are used throughout"
    nominal = facts.nominal_rate if facts.nominal_rate and facts.nominal_rate <= FASTEST else None
    named = (("nominal", nominal), ("average", facts.average_rate))
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in named if rate) + " frames/s"
    if facts.drift > DRIFT_FRAMES * facts.interval:
        message = f"Variable frame rate: number / rate misses frame times by up to {facts.drift:.2f} s ({rates})"
        return [Note("note", "variable-rate", clip.id, f"{message}; {_loss(facts.drift)}", remedy)]
    if not (nominal and facts.average_rate):
        return []
    off = abs(facts.frames / nominal - facts.frames / facts.average_rate)
    if off <= max(DRIFT_FRAMES * facts.interval, RATE_SLACK * facts.duration):
        return []
    message = f"The claimed frame rate is wrong: at the end number / rate is {off:.2f} s off ({rates})"
    return [Note("note", "rate-claim", clip.id, f"{message}; {_loss(off)}", remedy)]


def _loss(seconds: float) -> str:
    valence, arousal = shift_loss(seconds)
    return f"that alone would take up to {valence:.2f} (valence) and {arousal:.2f} (arousal) from the CCC"


def _sound_findings(clip: Clip, facts: MediaFacts) -> list[Note]:
    if facts.audio == "none":
        remedy = "The clip is used without sound; check the file if there should be some"
        return [Note("note", "no-audio", clip.id, "The file has no audio stream", remedy)]
    if facts.audio == "unreadable":
        remedy = "The clip is used without sound; copy the file again if there should be some"
        return [Note("warning", "audio-unreadable", clip.id, "There is an audio stream that does not decode", remedy)]
    if facts.audio == "silent":
        remedy = "Silence counts as sound; check the file if something should be heard"
        return [Note("note", "audio-silent", clip.id, "The sound is digital silence from start to end", remedy)]
    if facts.audio == "partial" and facts.audio_span is not None:
        start, end = facts.audio_span
        message = f"Sound from {start:.2f} to {end:.2f} s, the picture ends at {facts.duration:.2f} s"
        return [Note("note", "audio-partial", clip.id, message, "The rest is marked as missing sound")]
    return []


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
    """Crops that cannot be read, frames without a crop, and crops beyond the last frame."""
    notes = []
    if facts.damaged:
        message = f"Of {min(facts.found, OPENED_CROPS)} crops that were opened, these are no pictures: "
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
            f"up to {facts.longest} in a row ({facts.longest * media.interval:.1f} s)"
        )
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
