"""One person through a clip: which of the faces found at each instant is theirs, decided online.

The rule, for faces found at samples some half a second apart:

1. *Start*: the largest face with a score of at least 0.6.
2. *Follow*: of the faces that could be the person's (centre within a reach of the last place, size at most 1.8 times
   larger or smaller), the one most like it: overlap minus distance minus size change. So a larger face that passes
   does not take over while the person's own face is there, and a face of another size never does.
3. *Lose*: where no face qualifies, there is none: the sample is invalid. The last place is kept, and the reach grows
   with the time since (from 0.8 to at most 2 face sizes), so that the person is found again near by.
4. *Begin again*: when nothing qualified for more than 3 s (a cut, or the person left), rule 1 applies again.

State is one face and one time, so memory is bounded and the result depends on the past only.
"""

from collections.abc import Sequence

import numpy as np

from vaflow.extract.faces.detection import Face, overlap

TRACKER_VERSION = 1

START_SCORE = 0.6
MAX_SIZE_CHANGE = 1.8
REACH = 0.8  # face sizes that the centre may move between two sightings ...
REACH_PER_SECOND = 0.4  # ... growing with the time between them ...
MAX_REACH = 2.0  # ... up to this
PATIENCE = 3.0  # seconds without the person after which anyone may be taken for them


class PersonTracker:
    """Follows one person. Feed it the faces of each sampled frame in order of time."""

    def __init__(self) -> None:
        self._face: Face | None = None
        self._seen = -np.inf

    def update(self, faces: Sequence[Face], time: float) -> Face | None:
        """The person's face among those found at `time` (seconds), or None where it is not among them."""
        found = self._follow(faces, time)
        if found is None and (self._face is None or time - self._seen > PATIENCE):
            found = max((face for face in faces if face.score >= START_SCORE), key=lambda face: face.size, default=None)
        if found is not None:
            self._face, self._seen = found, time
        return found

    def _follow(self, faces: Sequence[Face], time: float) -> Face | None:
        last = self._face
        if last is None:
            return None
        reach = min(REACH + REACH_PER_SECOND * max(time - self._seen, 0.0), MAX_REACH)
        possible = [f for f in faces if distance(last, f) <= reach and size_change(last, f) <= MAX_SIZE_CHANGE]
        return max(possible, key=lambda face: likeness(last, face), default=None)


def distance(one: Face, other: Face) -> float:
    """Between the centres of two faces, in sizes of the first."""
    return float(np.linalg.norm(one.centre - other.centre) / max(one.size, 1.0))


def size_change(one: Face, other: Face) -> float:
    """How many times larger the larger of the two is, >= 1."""
    small, large = sorted((max(one.size, 1.0), max(other.size, 1.0)))
    return large / small


def likeness(one: Face, other: Face) -> float:
    """Higher is more alike: overlap of the boxes, less the distance, less the logarithm of the size change."""
    return overlap(one.box, other.box) - distance(one, other) - float(np.log(size_change(one, other)))
