"""Face boxes of a page: those of the person whose features a cache holds."""

from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import FACES, LABELS, StreamInfo
from vaflow.viewer.clip_data import stored_boxes

WIDTH, HEIGHT = 200, 100


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Three samples of a clip: person 1 is in all of them, on the left; person 2 in the first two."""
    cache = create_cache(tmp_path / "cache")
    for name, kind, dim in (("eyes", "visual", 2), (FACES, "faces", 0), (LABELS, "labels", 0)):
        cache.declare(StreamInfo(name, kind, dim, "float32", {"encoder": name}))  # type: ignore[arg-type]
    person, frame = np.array([1, 2, 1, 2, 1]), np.array([0, 0, 5, 5, 10])
    left = np.where(person == 1, 20.0, 120.0)
    faces = {
        "time": frame / 10,
        "frame": frame,
        "box": np.column_stack([left, left * 0 + 10, left + 40, left * 0 + 60]).astype(np.float32),
        "landmarks": np.zeros((5, 5, 2), np.float32),
        "track": person - 1,
        "person": person,
        "cut": np.zeros(0),
        **{name: np.ones(5, np.float32) for name in ("score", "size", "sharpness", "yaw", "mouth")},
    }
    for item, chosen in (("a#1", {"person": 1}), ("a#2", {"person": 2}), ("crops", {})):
        time = np.array([0.0, 0.5, 1.0])
        visual = {"embedding": np.zeros((3, 2), np.float32), "time": time, "valid": np.ones(3, bool)}
        cache.write("eyes", item, visual | {"frame": np.array([0, 5, 10])}, meta=chosen)
        cache.write(FACES, item, faces)
        labels = {"time": time, "value": np.zeros((3, 2), np.float32), "valid": np.ones((3, 2), bool)}
        cache.write(LABELS, item, labels, meta={"width": WIDTH, "height": HEIGHT})
    return cache


def test_boxes_belong_to_the_person_of_the_item(cache: Cache) -> None:
    first, second = stored_boxes(cache, "a#1"), stored_boxes(cache, "a#2")
    assert first is not None and second is not None
    np.testing.assert_allclose(first[:, 0], [0, 0.5, 1])
    np.testing.assert_allclose(first[:, 1:], [[0.1, 0.1, 0.3, 0.6]] * 3)
    np.testing.assert_allclose(second[:2, 1:], [[0.6, 0.1, 0.8, 0.6]] * 2)
    assert np.isnan(second[2, 1:]).all()


def test_an_item_with_an_unknown_person_has_no_boxes(cache: Cache) -> None:
    assert stored_boxes(cache, "crops") is None
    assert stored_boxes(cache, "missing") is None
