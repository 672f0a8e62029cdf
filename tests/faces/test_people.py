"""Selection rules for people, and joining of tracks, on drawn faces."""

from collections.abc import Sequence

import cv2
import numpy as np
import pytest

from vaflow.errors import MediaError, UsageError
from vaflow.extract.config import ExtractConfig
from vaflow.extract.faces.choice import choose_person
from vaflow.extract.faces.crops import TEMPLATE, yaw
from vaflow.extract.faces.detection import Face
from vaflow.extract.faces.identity import FaceNetwork
from vaflow.extract.faces.people import ClipFaces, People, link
from vaflow.extract.faces.tracking import PATIENCE, CutDetector, FaceTracker
from vaflow.extract.streams import faces_identity, tracker_identity

STEP = 0.5


def face(x: float, y: float = 200.0, size: float = 100.0, score: float = 0.9) -> Face:
    half = size / 2
    return Face((x - half, y - half, x + half, y + half), score, TEMPLATE * size + (x - half, y - half))


class Blind:
    """A network with equal embeddings for everyone."""

    dim, limit = 2, 0.5

    def embed(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        return np.zeros((len(crops), 2), np.float32)


def clip(
    samples: Sequence[Sequence[Face]], open_mouths: Sequence[set[float]] = (), network: FaceNetwork | None = None
) -> People:
    """People of frames in which each face is drawn in noise; the mouths at the given places are drawn black."""
    noise = np.random.default_rng(0).integers(60, 200, (400, 800, 3)).astype(np.uint8)
    with ClipFaces(network) as faces:
        for number, faces_in_frame in enumerate(samples):
            image = noise.copy()
            for one in faces_in_frame:
                if number < len(open_mouths) and one.centre[0] in open_mouths[number]:
                    left, right = one.landmarks[3:].astype(int)
                    cv2.rectangle(image, tuple((left - 12).tolist()), tuple((right + 12).tolist()), (0, 0, 0), -1)
            faces.add(number, number * STEP, image, faces_in_frame)
        return faces.people()


def chosen_x(people: People, rule: str) -> float:
    """Mean x of the chosen person's faces."""
    return float(np.mean([s.face.centre[0] for s in people.sightings[choose_person(people.arrays(), rule) - 1]]))


def test_main_is_the_person_visible_longest() -> None:
    passer_by = face(600, size=180)
    people = clip([[face(150), passer_by] if 4 <= k < 8 else [face(150)] for k in range(20)])
    assert chosen_x(people, "main") == 150


def test_main_prefers_the_larger_of_equally_visible_people() -> None:
    assert chosen_x(clip([[face(150, size=90), face(600, size=130)]] * 10), "main") == 600


def test_sides_are_assigned_to_the_two_people_visible_together_longest() -> None:
    people = clip([[face(150), face(600)]] * 10)
    assert chosen_x(people, "left") == 150
    assert chosen_x(people, "right") == 600


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_person_has_no_side(side: str) -> None:
    with pytest.raises(MediaError, match=f"on the {side} cannot be told apart: the clip never shows two"):
        choose_person(clip([[face(150)]] * 10).arrays(), side)


def test_a_clip_without_faces_has_no_side() -> None:
    with pytest.raises(MediaError, match="never shows two people"):
        choose_person(clip([[]] * 10).arrays(), "left")


def test_people_who_change_sides_have_no_side() -> None:
    steps = np.linspace(150, 600, 12)
    people = clip([[face(float(x), y=100), face(float(750 - x), y=300)] for x in steps])
    assert len(people.sightings) == 2
    with pytest.raises(MediaError, match="change sides"):
        choose_person(people.arrays(), "right")


def test_people_are_selected_by_number() -> None:
    people = clip([[face(150, size=90), face(600, size=130)]] * 10)
    assert chosen_x(people, "id:2") == 150
    with pytest.raises(MediaError, match="is not a person of this clip"):
        choose_person(people.arrays(), "id:3")


@pytest.mark.parametrize("network", [None, Blind()])
def test_no_person_is_selected_in_frames_without_faces(network: FaceNetwork | None) -> None:
    assert choose_person(clip([[]] * 4, network=network).arrays(), "main") == 0


def test_faces_in_one_frame_are_different_people() -> None:
    away = [[face(150), face(600)]] * 4 + [[]] * 10 + [[face(150), face(600)]] * 4
    people = clip(away, network=Blind())
    assert len(people.sightings) == 2
    assert all(len({s.face.centre[0] for s in person if s.time < 2}) == 1 for person in people.sightings)


def test_speaking_selects_the_person_whose_mouth_moves_during_speech() -> None:
    """The left mouth moves in the first half, which is silent; the right one in the second half."""
    mouths = [({150.0} if k < 10 else {600.0}) if k % 2 else set() for k in range(20)]
    people = clip([[face(150, size=130), face(600, size=130)]] * 20, mouths)
    person = choose_person(people.arrays(), "speaking", lambda time: time >= 5)
    assert people.sightings[person - 1][0].face.centre[0] == 600


def test_speaking_requires_audio() -> None:
    with pytest.raises(MediaError, match="requires audio"):
        choose_person(clip([[face(150)]] * 4).arrays(), "speaking", None)


def test_every_face_is_stored_with_its_person() -> None:
    arrays = clip([[face(150), face(600, size=130)]] * 6).arrays()
    assert arrays["time"].tolist() == np.repeat(np.arange(6) * STEP, 2).tolist()
    assert sorted(arrays["person"].tolist()) == [1] * 6 + [2] * 6
    assert arrays["box"].shape == (12, 4)
    assert arrays["landmarks"].shape == (12, 5, 2)


# --- tracks


def test_a_track_ends_at_a_cut() -> None:
    tracker = FaceTracker()
    assert tracker.update([face(200)], 0.0) == [0]
    assert tracker.update([face(200)], 0.5) == [0]
    assert tracker.update([face(200)], 1.0, cut=True) == [1]


def test_a_track_ends_after_an_absence() -> None:
    tracker = FaceTracker()
    tracker.update([face(200)], 0.0)
    assert tracker.update([face(200)], PATIENCE + 0.1) == [1]


def test_two_faces_keep_their_tracks() -> None:
    tracker = FaceTracker()
    assert tracker.update([face(200), face(500)], 0.0) == [0, 1]
    assert tracker.update([face(505), face(205)], 0.5) == [1, 0]
    assert tracker.update([face(208), face(800, score=0.55)], 1.0) == [0, None], "too uncertain to begin a track"


def test_a_cut_requires_changed_pixels_and_colors() -> None:
    rng = np.random.default_rng(1)
    colors = rng.integers(0, 150, (9, 16, 3)), rng.integers(100, 255, (9, 16, 3))
    first, second = (np.kron(color, np.ones((20, 20, 1))).astype(np.uint8) for color in colors)
    cuts = CutDetector()
    assert cuts.update(first) == 0
    assert cuts.update(np.roll(first, 3, axis=1)) < 1, "a pan is no cut"
    assert cuts.update((first * 0.8).astype(np.uint8)) < 1, "dimmed light is no cut"
    cuts.update(first)
    assert cuts.update(second) >= 1


# --- joining


def at(x: float, count: int = 3) -> np.ndarray:
    return np.full((count, 2), x, np.float32) + np.arange(count, dtype=np.float32)[:, None] / 100


def test_similar_tracks_are_joined_to_one_person() -> None:
    apart = np.eye(4, dtype=bool)
    people = link([at(0), at(1), at(0.02), at(1.02)], apart, 0.5)
    assert people[0] == people[2] != people[1] == people[3]


def test_simultaneous_tracks_are_never_one_person() -> None:
    apart = np.eye(3, dtype=bool)
    apart[0, 1] = apart[1, 0] = True
    people = link([at(0), at(0.01), at(0.02)], apart, 0.5)
    assert people[0] != people[1]
    assert people[2] in people[:2]


def test_a_track_without_embeddings_is_not_joined() -> None:
    assert len(set(link([at(0), at(0, 0), at(0)], np.eye(3, dtype=bool), 0.5))) == 2


# --- quality, settings


def test_yaw_follows_the_nose() -> None:
    frontal = face(200)
    turned = Face(frontal.box, 0.9, frontal.landmarks + np.array([[0, 0], [0, 0], [8, 0], [0, 0], [0, 0]]))
    assert abs(yaw(frontal)) < 1
    assert 20 < yaw(turned) < 60


def test_largest_keeps_the_identity_of_older_streams() -> None:
    assert faces_identity()["tracker"] == 1
    assert "person" not in faces_identity()
    assert tracker_identity("main", "none")["person"] == "main"


@pytest.mark.parametrize("person", ["everyone", "id:0", "id:", "Left"])
def test_an_unknown_person_is_rejected(person: str) -> None:
    with pytest.raises(UsageError, match="--person must be"):
        ExtractConfig(person=person)
