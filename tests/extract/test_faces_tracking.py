"""Tracking of one person among drawn faces with known identities."""

from collections.abc import Sequence

import numpy as np
import pytest

from vaflow.extract.faces.detection import Face
from vaflow.extract.faces.tracking import PATIENCE, PersonTracker, likeness

STEP = 0.5


def face(x: float, y: float = 200.0, size: float = 100.0, score: float = 0.9) -> Face:
    half = size / 2
    return Face((x - half, y - half, x + half, y + half), score, np.zeros((5, 2)))


def follow(samples: Sequence[Sequence[Face]], step: float = STEP) -> list[int | None]:
    """Index of the tracked face of each sample, or None."""
    tracker = PersonTracker()
    taken = []
    for number, faces in enumerate(samples):
        tracked = tracker.update(faces, number * step)
        taken.append(None if tracked is None else [id(f) for f in faces].index(id(tracked)))
    return taken


def test_tracking_starts_with_the_largest_confident_face() -> None:
    assert follow([[face(100, size=60), face(300, size=90), face(500, size=300, score=0.55)]]) == [1]
    assert follow([[face(100, score=0.55)]]) == [None]


def test_weak_detections_continue_a_confident_track() -> None:
    assert follow([[face(100)], [face(105, score=0.51)]]) == [0, 0]


@pytest.mark.parametrize("order", [1, -1])
def test_tracking_stays_with_its_person_among_others(order: int) -> None:
    random = np.random.default_rng(0)
    samples = []
    for number in range(40):
        target = face(200 + 15 * np.sin(number / 3) + random.normal(0, 4), size=100 + random.normal(0, 5))
        other = face(420 + 20 * np.cos(number / 2), size=98)
        samples.append([target, other][::order])
    first = 0 if samples[0][0].size > samples[0][1].size else 1
    assert follow(samples) == [first] * 40


@pytest.mark.parametrize("passer", [90.0, 160.0, 250.0])
def test_a_passing_face_does_not_take_over(passer: float) -> None:
    """Another face of equal or larger size crosses the person."""
    samples = [[face(300)], *([face(x, size=passer), face(300)] for x in range(0, 620, 40)), [face(300)]]
    assert follow(samples) == [0, *[1] * 16, 0]


def test_a_larger_face_in_front_leaves_a_gap_not_a_wrong_person() -> None:
    hidden = [[face(300, size=250)]] * 3
    assert follow([[face(300)], *hidden, [face(310)]]) == [0, None, None, None, 0]


def test_tracking_follows_motion_and_scale() -> None:
    samples = [[face(100 + 40 * n, size=80 * 1.1**n)] for n in range(12)]
    assert follow(samples) == [0] * 12


def test_a_lost_face_is_recovered_nearby_within_the_patience() -> None:
    gap = [[face(600, size=120)]] * 4  # another person, far away and larger
    assert follow([[face(100)], *gap, [face(600, size=120), face(190)]]) == [0, None, None, None, None, 1]


def test_after_some_seconds_the_largest_face_is_taken() -> None:
    empty = int(PATIENCE / STEP)
    taken = follow([[face(100)], *[[face(600, size=70), face(900, size=120)]] * (empty + 2)])
    assert taken == [0, *[None] * empty, 1, 1]


def test_tracking_without_faces_returns_none() -> None:
    assert follow([[], []]) == [None, None]


def test_tracking_depends_on_past_frames_only() -> None:
    random = np.random.default_rng(1)
    samples = [[face(random.uniform(0, 600), size=random.uniform(50, 150)) for _ in range(3)] for _ in range(30)]
    whole = follow(samples)
    assert all(follow(samples[:n]) == whole[:n] for n in (1, 7, 20))


def test_similarity_ranks_position_before_size() -> None:
    target = face(100)
    assert likeness(target, face(102)) > likeness(target, face(130)) > likeness(target, face(190))
    assert likeness(target, face(100)) > likeness(target, face(100, size=140))
