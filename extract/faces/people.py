"""The people of a clip: every face of every sampled frame, joined to tracks and people.

Crops of all faces are kept, as the JPEG files that are encoded and stored, until the end of the clip shows who is who:
in memory up to `MEMORY_BYTES`, beyond that in a temporary file. So the video is decoded once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from tempfile import SpooledTemporaryFile

import numpy as np
from numpy.typing import NDArray

from vaflow.extract.faces.crops import (
    Quality,
    align,
    decode_jpeg,
    encode_jpeg,
    face_quality,
    mouth_motion,
    resemblance,
)
from vaflow.extract.faces.detection import Face, overlap
from vaflow.extract.faces.identity import FaceNetwork, Vectors
from vaflow.extract.faces.tracking import SUSPICIOUS, CutDetector, FaceTracker, similar

Image = NDArray[np.uint8]

MEMORY_BYTES = 64 * 2**20
MAX_FACES = 16  # of one frame: the largest
CHECK_SECONDS = 30.0  # time between two comparisons of a track's appearance
# Correlation of two aligned crops of one track, above which they are one person without asking the network. Crops of
# two people reach .7 in our clips; consecutive ones of one person have a median of .8 to .99.
ALIKE = 0.9
CROWDED = 1.2  # face sizes from a track's last face within which another face may be taken for it
MIN_OVERLAP = 0.1  # of a face with the one before in its track
UNCERTAIN = (0.75, 1.25)  # of the limit: distances of two tracks at which more faces of both are compared
LOOKS = 2  # faces of each such track, from equal parts of it
NOTABLE_SHARE = 0.1  # of the clear faces of person 1, from which on another person counts
NEARLY_EQUAL = 0.9  # share of the most seconds with which a larger face is the main person
SPLIT_FACTOR = 1.15  # a track is divided at a distance this much above the limit that joins tracks


@dataclass(frozen=True)
class Sighting:
    """One face in one sampled frame.

    Attributes:
        frame: 0-based number of the video frame; time: its presentation time in seconds.
        track: number of its track, from 0; person: number of its person, from 1; 0 before people are known.
        mouth: motion of the mouth since the track's sighting before, in gray levels; 0 for the first.
        place: where its JPEG lies: offset and size.
    """

    frame: int
    time: float
    face: Face
    quality: Quality
    track: int
    mouth: float
    place: tuple[int, int]
    person: int = 0


class ClipFaces:
    """Collects the faces of a clip, frame by frame. Use as a context manager.

    Args:
        network: tells people apart; None: tracks are never joined.
    """

    def __init__(self, network: FaceNetwork | None) -> None:
        self._network = network
        self._cut_detector, self._tracker = CutDetector(), FaceTracker()
        self._file = SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - closed by __exit__
        self._end = 0
        self._tracks: list[list[Sighting]] = []
        self._times: list[float] = []
        self._doubtful: set[tuple[int, int]] = set()  # track, place: the person before may be another one
        self._last: dict[int, Image] = {}  # track -> luminance of its last crop
        self._cuts: list[float] = []

    def __enter__(self) -> "ClipFaces":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, frame: int, time: float, image: Image, faces: Sequence[Face]) -> None:
        """The next sampled frame [H, W, 3] with its faces."""
        import cv2

        cut = self._cut_detector.update(image)
        if cut >= 1:
            self._cuts.append(time)
        self._times.append(time)
        faces = sorted(faces, key=lambda face: -face.size)[:MAX_FACES]
        for face, track in zip(faces, self._tracker.update(faces, time, cut=cut >= 1), strict=True):
            if track is None:
                continue
            crop = align(image, face)
            gray = np.asarray(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), np.uint8)
            jpeg = encode_jpeg(crop)
            self._file.seek(self._end)
            self._file.write(jpeg)
            if track == len(self._tracks):
                self._tracks.append([])
            motion = 0.0
            if self._tracks[track]:
                before, last = self._last[track], self._tracks[track][-1]
                motion = mouth_motion(gray, before)
                if (
                    cut >= SUSPICIOUS
                    or overlap(last.face.box, face.box) < MIN_OVERLAP
                    or any(other is not face and similar(last.face, other, CROWDED) for other in faces)
                ) and resemblance(gray, before) < ALIKE:
                    self._doubtful.add((track, len(self._tracks[track])))
            self._last[track] = gray
            place = (self._end, len(jpeg))
            self._tracks[track].append(Sighting(frame, time, face, face_quality(face, gray), track, motion, place))
            self._end += len(jpeg)

    def people(self) -> "People":
        """Everyone in the clip. Call once, after the last frame."""
        tracks, apart, vectors = self._compared()
        persons = link(vectors, apart, self._network.limit) if self._network else list(range(len(tracks)))
        step = float(np.median(np.diff(self._times))) if len(self._times) > 1 else 0.0
        merged: dict[int, list[Sighting]] = {}
        for number, (track, person) in enumerate(zip(tracks, persons, strict=True)):
            merged.setdefault(person, []).extend(replace(sighting, track=number) for sighting in track)
        return People(
            [
                [replace(s, person=number) for s in sorted(sightings, key=lambda s: s.frame)]
                for number, sightings in enumerate(_by_presence(merged.values()), start=1)
            ],
            tuple(self._cuts),
            step,
            self._jpeg,
        )

    def _jpeg(self, sighting: Sighting) -> bytes:
        start, size = sighting.place
        self._file.seek(start)
        return self._file.read(size)

    # -- appearance ------------------------------------------------------------------------------------------------

    def _compared(self) -> tuple[list[list[Sighting]], NDArray[np.bool_], list[Vectors]]:
        """The tracks, divided where the person changes; which of them share a frame; vectors of those that may be one.

        The network sees only what is in doubt: two faces around each doubtful place of a track, and the best face of
        each track that could be joined to another one.
        """
        if self._network is None:
            return self._tracks, np.zeros((0, 0), bool), []
        tracks, known = [], []  # known: frame -> vector, of each track
        for number, track in enumerate(self._tracks):
            seen = {place: self._vector(track[place]) for place in self._checkpoints(number)}
            for start, end in pairwise([0, *self._divisions(track, seen), len(track)]):
                tracks.append(track[start:end])
                known.append({track[place].frame: v for place, v in seen.items() if start <= place < end})
        frames = [{s.frame for s in track} for track in tracks]
        apart = np.array([[bool(a & b) for b in frames] for a in frames], bool).reshape(len(tracks), len(tracks))
        for number in np.flatnonzero(~apart.all(axis=1)).tolist():
            self._look(tracks[number], known[number], 1)
        for number in self._uncertain(known, apart):
            self._look(tracks[number], known[number], LOOKS)
        empty = np.zeros((0, self._network.dim), np.float32)
        return tracks, apart, [np.stack([one[f] for f in sorted(one)]) if one else empty for one in known]

    def _look(self, track: list[Sighting], known: dict[int, Vectors], count: int) -> None:
        """Add the vectors of the best clear faces of `count` equal parts of a track, where none is known."""
        clear = [sighting for sighting in track if sighting.quality.is_clear]
        for part in np.array_split(np.arange(len(clear)), count):
            faces = [clear[place] for place in part]
            if faces and not any(sighting.frame in known for sighting in faces):
                best = max(faces, key=lambda sighting: sighting.quality.distinctness)
                known[best.frame] = self._vector(best)

    def _uncertain(self, known: list[dict[int, Vectors]], apart: NDArray[np.bool_]) -> list[int]:
        """Tracks that are about as far from another one as the limit that joins them."""
        assert self._network is not None
        means = [np.mean(list(one.values()), axis=0) if one else None for one in known]
        least, most = (share * self._network.limit for share in UNCERTAIN)

        def close(a: int, b: int) -> bool:
            one, other = means[a], means[b]
            if one is None or other is None or apart[a, b]:
                return False
            return bool(least <= np.linalg.norm(one - other) <= most)

        return [a for a in range(len(known)) if any(close(a, b) for b in range(len(known)) if a != b)]

    def _checkpoints(self, number: int) -> list[int]:
        """Places in a track, among its clear sightings, at which its appearance is compared."""
        track = self._tracks[number]
        clear = [place for place, sighting in enumerate(track) if sighting.quality.is_clear]
        if not clear:
            return []
        chosen, last, first = set(), track[clear[0]].time, clear[0]
        step = min((b - a for a, b in pairwise(self._times) if b > a), default=0.0)
        for before, after in pairwise(clear):
            time = track[after].time
            gone = max(b.time - a.time for a, b in pairwise(track[before : after + 1])) > 2.5 * step
            if gone or any((number, place) in self._doubtful for place in range(before + 1, after + 1)):
                chosen |= {before, after}
                first, last = after, time
            elif time - last >= CHECK_SECONDS:
                chosen |= {first, after}
                first, last = after, time
        return sorted(chosen)

    def _divisions(self, track: list[Sighting], known: dict[int, Vectors]) -> list[int]:
        """Places at which another person begins; `known` (place -> vector) gains what is looked at on the way."""
        assert self._network is not None
        limit = SPLIT_FACTOR * self._network.limit
        divisions = []
        for before, after in pairwise(sorted(known)):
            low, high = before, after
            if np.linalg.norm(known[low] - known[high]) <= limit:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                vector = self._vector(track[middle])
                nearer_low = np.linalg.norm(vector - known[before]) < np.linalg.norm(vector - known[after])
                low, high = (middle, high) if nearer_low else (low, middle)
            divisions.append(high)
        return divisions

    def _vector(self, sighting: Sighting) -> Vectors:
        assert self._network is not None
        return self._network.embed([decode_jpeg(self._jpeg(sighting))])[0]


def link(vectors: Sequence[Vectors], apart: NDArray[np.bool_], limit: float) -> list[int]:
    """Join tracks to people: average linkage of the tracks' mean vectors, closest pair first, up to `limit`.

    Args:
        vectors: of each track, [N, dim]; a track without any is a person of its own.
        apart: [T, T]; True for tracks that appear in one frame and so cannot be one person.
        limit: mean distance up to which two groups of tracks are one person.

    Returns:
        For each track, the number of its person, from 0.
    """
    groups = [[track] for track in range(len(vectors))]
    distance = np.full((len(vectors), len(vectors)), np.inf)
    means = [one.mean(axis=0) if len(one) else None for one in vectors]
    for a, one in enumerate(means):
        for b, other in enumerate(means[:a]):
            if one is not None and other is not None and not apart[a, b]:
                distance[a, b] = distance[b, a] = float(np.linalg.norm(one - other))
    blocked = apart.copy()
    while len(groups) > 1:
        a, b = divmod(int(np.argmin(distance)), len(groups))
        if distance[a, b] > limit:
            break
        weight, other = (sum(len(vectors[track]) for track in groups[i]) for i in (a, b))
        blocked[a] |= blocked[b]
        blocked[:, a] = blocked[a]
        mean = (weight * distance[a] + other * distance[b]) / (weight + other)  # infinite where one of the two is
        mean[blocked[a]] = mean[a] = np.inf
        distance[a] = distance[:, a] = mean
        groups[a] += groups[b]
        groups.pop(b)
        distance = np.delete(np.delete(distance, b, 0), b, 1)
        blocked = np.delete(np.delete(blocked, b, 0), b, 1)
    people = [0] * len(vectors)
    for person, group in enumerate(groups):
        for track in group:
            people[track] = person
    return people


def _by_presence(people: Iterable[list[Sighting]]) -> list[list[Sighting]]:
    """People by their number of clear sightings; the first of those with nearly the most has the largest face."""

    ordered = sorted(people, key=lambda s: (-_clear(s), -len(s), s[0].frame))
    if not ordered:
        return []
    most = (_clear(ordered[0]), len(ordered[0]))
    rivals = [
        s for s in ordered if _clear(s) >= NEARLY_EQUAL * most[0] and (most[0] or len(s) >= NEARLY_EQUAL * most[1])
    ]
    main = max(rivals, key=lambda s: float(np.median([sighting.face.size for sighting in s])))
    return [main, *(s for s in ordered if s is not main)]


def _clear(sightings: list[Sighting]) -> int:
    return sum(sighting.quality.is_clear for sighting in sightings)


@dataclass(frozen=True)
class People:
    """Everyone in a clip.

    Attributes:
        sightings: of each person, in order of time; person 1 has the most seconds of clear face.
        cuts: times of the shot boundaries, in seconds.
        step: seconds between two sampled frames.
        jpeg: the crop of a sighting.
    """

    sightings: list[list[Sighting]]
    cuts: tuple[float, ...]
    step: float
    jpeg: Callable[[Sighting], bytes]

    @property
    def seconds(self) -> list[float]:
        """Seconds that each person is in the picture."""
        return [len(sightings) * self.step for sightings in self.sightings]

    @property
    def notable(self) -> int:
        """Number of people with at least `NOTABLE_SHARE` of the clear faces of person 1; they are the first ones."""
        clear = [_clear(sightings) for sightings in self.sightings]
        counts = clear if any(clear) else [len(sightings) for sightings in self.sightings]
        return sum(one >= NOTABLE_SHARE * counts[0] for one in counts)

    def rows(self) -> list[Sighting]:
        """Everyone's sightings in the order of the rows of a `faces` stream: by time, then person."""
        return sorted((s for person in self.sightings for s in person), key=lambda s: (s.frame, s.person))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The arrays of a `faces` stream: one row per face."""
        rows = self.rows()
        columns = {
            "size": [s.quality.size for s in rows],
            "sharpness": [s.quality.sharpness for s in rows],
            "yaw": [s.quality.yaw for s in rows],
            "score": [s.quality.score for s in rows],
            "mouth": [s.mouth for s in rows],
        }
        return {
            "time": np.array([s.time for s in rows], np.float64),
            "frame": np.array([s.frame for s in rows], np.int64),
            "box": np.array([s.face.box for s in rows], np.float32).reshape(-1, 4),
            "landmarks": np.array([s.face.landmarks for s in rows], np.float32).reshape(-1, 5, 2),
            "track": np.array([s.track for s in rows], np.int64),
            "person": np.array([s.person for s in rows], np.int64),
            **{name: np.array(values, np.float32) for name, values in columns.items()},
            "cut": np.array(self.cuts, np.float64),
        }


def no_faces() -> dict[str, NDArray[np.generic]]:
    """The arrays of a `faces` stream of a clip in which nothing was detected."""
    return People([], (), 0.0, lambda _: b"").arrays()
