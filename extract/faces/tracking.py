"""Tracking of one person through a clip, online: which detected face is theirs at each sample.

Rules, for samples about half a second apart:

1. *Start*: the largest face with a score of at least 0.6.
2. *Follow*: of the candidates (centre within reach of the last position, size at most 1.8 times larger or smaller),
   the most similar face: overlap minus distance minus size change. A larger face that passes does not take over while
   the person's face is visible, and a face of another size never does.
3. *Lose*: without a candidate, the sample is invalid. The last position is kept, and the reach grows with time (from
   0.8 to at most 2 face sizes), so that the person is found again nearby.
4. *Restart*: without a candidate for more than 3 s (a cut, or the person left), rule 1 applies again.

The state is one face and one time, so memory is bounded and results depend on the past only.

Cuts between samples end a track. They follow from the change of a small thumbnail and of its color histogram: a person
who moves changes the thumbnail and leaves the histogram; a lamp that is switched on changes the histogram of every cell
alike; a cut changes both. A missed cut is caught by the rules above and by the comparison of appearance; a false one
only ends a track.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.extract.faces.detection import Face, overlap
from vaflow.extract.faces.identity import Image

CUTS_VERSION = 1
THUMBNAIL = (32, 18)  # pixels of the thumbnail, width and height
BINS = 8  # per color channel
MIN_CHANGE = 0.10  # mean absolute difference of the thumbnails, 0 to 1, less the change of the mean brightness
MIN_HISTOGRAM_CHANGE = 0.25  # half of the sum of absolute differences of the histograms, 0 to 1
SUSPICIOUS = 0.5  # share of both limits from which on a track's appearance is compared across the two frames
TRACKER_VERSION = 1  # of `PersonTracker`
ALL_FACES_VERSION = 2  # of `FaceTracker`
START_SCORE = 0.6
MAX_SIZE_CHANGE = 1.8
REACH = 0.8  # face sizes that the centre may move between two samples ...
REACH_PER_SECOND = 0.4  # ... growing with the time between them ...
MAX_REACH = 2.0  # ... up to this
PATIENCE = 3.0  # seconds without a candidate after which tracking restarts


class CutDetector:
    """Compares each sampled frame with the one before: a cut ends every track.

    A person who moves changes a small thumbnail and leaves its color histogram; a lamp that is switched on changes the
    histogram of every cell alike; a cut changes both. A missed cut is caught by the rules of the trackers and by the
    comparison of appearance; a false one only ends a track.
    """

    def __init__(self) -> None:
        self._thumbnail: NDArray[np.floating[Any]] | None = None
        self._histogram: NDArray[np.floating[Any]] | None = None

    def update(self, rgb: Image) -> float:
        """How much a cut before this frame [H, W, 3] is indicated: 1 and above is a cut; 0 for the first frame."""
        import cv2

        small = np.asarray(cv2.resize(rgb, THUMBNAIL, interpolation=cv2.INTER_AREA), np.uint8)
        cells = (small // (256 // BINS)).reshape(-1, 3).astype(np.int64) @ np.array([BINS * BINS, BINS, 1])
        histogram = np.bincount(cells, minlength=BINS**3) / cells.size
        # Neighboring bins share their pixels, so that a slight change of light moves little.
        cube = histogram.reshape(BINS, BINS, BINS)
        for axis in range(3):
            cube = (np.roll(cube, 1, axis) + 2 * cube + np.roll(cube, -1, axis)) / 4
        before, histogram_before = self._thumbnail, self._histogram
        thumbnail = small.astype(np.float32) / 255
        self._thumbnail, self._histogram = thumbnail, cube
        if before is None or histogram_before is None:
            return 0.0
        brightness = thumbnail.mean() - before.mean()
        change = float(np.abs(thumbnail - before - brightness).mean())
        histogram_change = float(np.abs(cube - histogram_before).sum() / 2)
        return min(change / MIN_CHANGE, histogram_change / MIN_HISTOGRAM_CHANGE)


class PersonTracker:
    """Tracks one person, online. Call `update` with the faces of each sampled frame, in order of time.

    Rules, for samples about half a second apart:

    1. *Start*: the largest face with a score of at least 0.6.
    2. *Follow*: of the candidates (centre within reach of the last position, size at most 1.8 times larger or smaller),
       the most similar face: overlap minus distance minus size change. A larger face that passes does not take over
       while the person's face is visible, and a face of another size never does.
    3. *Lose*: without a candidate, the sample is invalid. The last position is kept, and the reach grows with time
       (from 0.8 to at most 2 face sizes), so that the person is recognised again nearby.
    4. *Restart*: without a candidate for more than 3 s (a cut, or the person left), rule 1 applies again.

    The state is one face and one time, so memory is bounded and results depend on the past only.
    """

    def __init__(self) -> None:
        self._face: Face | None = None
        self._seen = -np.inf

    def update(self, faces: Sequence[Face], time: float) -> Face | None:
        """The person's face among those detected at `time` (seconds), or None."""
        tracked = self._follow(faces, time)
        if tracked is None and (self._face is None or time - self._seen > PATIENCE):
            certain = (face for face in faces if face.score >= START_SCORE)
            tracked = max(certain, key=lambda face: face.size, default=None)
        if tracked is not None:
            self._face, self._seen = tracked, time
        return tracked

    def _follow(self, faces: Sequence[Face], time: float) -> Face | None:
        last = self._face
        if last is None:
            return None
        reach = reach_after(time - self._seen)
        candidates = [face for face in faces if similar(last, face, reach)]
        return max(candidates, key=lambda face: likeness(last, face), default=None)


class FaceTracker:
    """Follows every face: continues tracks by place and size, and ends all of them at a cut.

    Feed it the faces of each sampled frame in order of time. A track that shows no face for `PATIENCE` seconds ends.
    """

    def __init__(self) -> None:
        self._active: dict[int, tuple[Face, float]] = {}  # track -> last face and its time
        self._count = 0

    def update(self, faces: Sequence[Face], time: float, *, cut: bool = False) -> list[int | None]:
        """The track of each face found at `time` (seconds); None for one too uncertain to begin a track.

        Args:
            cut: a shot boundary lies before this frame.
        """
        if cut:
            self._active.clear()
        self._active = {
            track: last_seen for track, last_seen in self._active.items() if time - last_seen[1] <= PATIENCE
        }
        pairs = [
            (likeness(last, face), track, index)
            for track, (last, last_seen) in self._active.items()
            for index, face in enumerate(faces)
            if similar(last, face, reach_after(time - last_seen))
        ]
        tracks: list[int | None] = [None] * len(faces)
        for _, track, index in sorted(pairs, reverse=True):
            if tracks[index] is None and track not in tracks:
                tracks[index] = track
        for index, face in enumerate(faces):
            if tracks[index] is None and face.score >= START_SCORE:
                tracks[index], self._count = self._count, self._count + 1
            if (track_id := tracks[index]) is not None:
                self._active[track_id] = (face, time)
        return tracks


def reach_after(seconds: float) -> float:
    """Face sizes that the centre of a face may have moved in that time."""
    return min(REACH + REACH_PER_SECOND * max(seconds, 0.0), MAX_REACH)


def similar(one: Face, other: Face, reach: float) -> bool:
    """Whether two faces may be of one person: their centres are within `reach`, and they are about as large."""
    return distance(one, other) <= reach and size_change(one, other) <= MAX_SIZE_CHANGE


def distance(one: Face, other: Face) -> float:
    """Distance of the centres of two faces, in sizes of the first."""
    return float(np.linalg.norm(one.centre - other.centre) / max(one.size, 1.0))


def size_change(one: Face, other: Face) -> float:
    """Ratio of the larger size to the smaller one, >= 1."""
    small, large = sorted((max(one.size, 1.0), max(other.size, 1.0)))
    return large / small


def likeness(one: Face, other: Face) -> float:
    """Similarity of two faces: overlap of the boxes, minus the distance, minus the logarithm of the size change."""
    return overlap(one.box, other.box) - distance(one, other) - float(np.log(size_change(one, other)))
