"""People and shot boundaries of videos before an extraction, from a few short parts of each clip.

Extraction looks at two frames of every second. A check compares at most 52 frames of a clip and detects faces in eight:
it sees short clips whole, and of long ones what is usual. A cache that was extracted from the clip has counted all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from vaflow.cache import Cache
from vaflow.cache.schema import FACES
from vaflow.datasets.clip import Clip
from vaflow.errors import MediaError
from vaflow.extract.container import decode, opened
from vaflow.extract.faces.alignment import MIN_SCORE, MIN_SIZE, quarter_turn
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.tracking import CutDetector
from vaflow.extract.messages import Failed
from vaflow.extract.pool import each
from vaflow.extract.video import to_rgb
from vaflow.item_names import person_item

PARTS = 4  # evenly over the clip
PART_SECONDS = 6.0
STEP = 0.5  # seconds between two frames that are compared
DETECTED = (0, 4)  # of the frames of a part: those in which faces are detected
MAX_DECODED = 600  # frames of a part, with those between the keyframe before and its beginning
MAX_CLIPS = 100
_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class PeopleFacts:
    """People and cuts of a clip.

    Attributes:
        people: most faces in one frame; of a cache, people with at least a tenth of the clear faces of the first.
        cuts: shot boundaries.
        frames: frames that were compared; 0: all sampled frames of an extraction.
        turned: degrees clockwise by which most faces are turned.
    """

    people: int
    cuts: int
    frames: int
    turned: int = 0


def look_at_people(
    clips: Sequence[tuple[Clip, float]], extracted: Cache | None = None, *, workers: int = 0
) -> dict[str, PeopleFacts]:
    """Clip id -> its people and cuts, of at most `MAX_CLIPS` clips that are not in a cache, evenly chosen.

    Args:
        clips: with their durations in seconds; those with crops or without video are left out.
        extracted: a cache, whose stream of faces is taken where it has one.
        workers: processes; 0: by the machine's cores.
    """
    known, rest = {}, []
    for clip, duration in clips:
        if clip.crops or clip.video is None:
            continue
        facts = None if extracted is None else _extracted_facts(extracted, clip.id)
        if facts is None:
            rest.append((clip.id, clip.video, duration))
        else:
            known[clip.id] = facts
    chosen = rest[:: -(-len(rest) // MAX_CLIPS)] if rest else []
    for number, looked in each(_look, chosen, workers=workers):
        if isinstance(looked, PeopleFacts):
            known[chosen[number][0]] = looked
    return known


def _extracted_facts(extracted: Cache, clip: str) -> PeopleFacts | None:
    if FACES not in extracted.streams():
        return None
    item = next((name for name in (clip, person_item(clip, 1)) if extracted.has(FACES, name)), None)
    meta = {} if item is None else extracted.record(FACES, item).meta
    people, cuts = meta.get("notable", meta.get("people")), meta.get("cuts")
    if item is None or not isinstance(people, int) or not isinstance(cuts, int):
        return None
    return PeopleFacts(people, cuts, 0, quarter_turn(extracted.read(FACES, item, ["landmarks"]).landmarks))


def _look(arguments: tuple[str, Path, float]) -> PeopleFacts | Failed | None:
    _, path, duration = arguments
    people = cuts = frames = 0
    landmarks = []
    try:
        for part in range(PARTS):
            cut, start = CutDetector(), part * duration / PARTS
            # The first frame of the next part belongs to this one as well: a cut may lie between them.
            end = start + min(PART_SECONDS, duration / PARTS) + STEP / 2
            for number, image in enumerate(_part(path, start, end)):
                cuts += cut.update(image) >= 1
                frames += 1
                if number in DETECTED:
                    faces = _detector().detect(image)
                    landmarks += [face.landmarks for face in faces]
                    people = max(people, sum(f.score >= MIN_SCORE and f.size >= MIN_SIZE for f in faces))
    except (MediaError, OSError, FFmpegError):
        return None  # the clip has a finding about it
    turned = quarter_turn(np.array(landmarks)) if landmarks else 0
    return PeopleFacts(people, cuts, frames, turned)


def _part(path: Path, start: float, end: float) -> Iterator[NDArray[np.uint8]]:
    """Frames of the clip from `start` to `end` seconds."""
    with opened(path) as media:  # opened again each time: a decoder must not seek once it runs
        stream = media.need_video()
        media.container.seek(round((start + media.start) * _MICROSECONDS))
        due = start
        for number, frame in enumerate(decode(media, stream)):
            time = -np.inf if frame.time is None else frame.time - media.start
            if time > end or number == MAX_DECODED:
                return
            if time >= due - 1e-6:
                due += STEP
                yield to_rgb(frame, media.pixel_aspect)


@cache
def _detector() -> CenterFace:
    return CenterFace()
