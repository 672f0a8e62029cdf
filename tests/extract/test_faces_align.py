"""Alignment maps landmarks to the template, never mirrors, and does not alias."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaflow.errors import MediaError
from vaflow.extract.faces.crops import TEMPLATE, align, decode_jpeg, encode_jpeg, similarity
from vaflow.extract.faces.detection import Face, decode_grid, overlap, suppress
from vaflow.extract.streams import faces_identity


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Reference: Umeyama 1991, by singular values, with the sign that forbids reflections."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(b.T @ a / len(a))
    sign = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / (a**2).sum(1).mean()
    return np.column_stack([scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_similarity_equals_umeyama(seed: int) -> None:
    source, target = np.random.default_rng(seed).uniform(0, 100, (2, 5, 2))
    ours = similarity(source, target)
    np.testing.assert_allclose(ours, umeyama(source, target), atol=1e-6)
    assert np.linalg.det(ours[:, :2]) > 0


def test_mirrored_points_do_not_mirror_the_image() -> None:
    mirrored = TEMPLATE * [-1, 1]
    assert np.linalg.det(similarity(mirrored, TEMPLATE)[:, :2]) >= 0


def face_at(points: np.ndarray) -> Face:
    low, high = points.min(0), points.max(0)
    return Face((float(low[0]), float(low[1]), float(high[0]), float(high[1])), 0.9, points)


@pytest.mark.parametrize("scale", [40.0, 224.0, 900.0])
@pytest.mark.parametrize("degrees", [0, 25, -60])
def test_landmarks_are_mapped_onto_the_template(scale: float, degrees: int) -> None:
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (TEMPLATE - 0.5) * scale @ rotation.T + [700, 600]
    image = np.zeros((1200, 1400, 3), np.uint8)
    y, x = np.mgrid[:1200, :1400]
    radius = max(scale * 0.02, 1.0)
    for channel, point in ((0, points[0]), (1, points[1]), (2, points[2])):  # both eyes and the nose, a colour each
        image[..., channel] = 255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * radius**2))
    crop = align(image, face_at(points), 224).astype(float)
    rows, columns = np.mgrid[:224, :224]
    for channel in range(3):
        weight = crop[..., channel] / crop[..., channel].sum()
        centre = np.array([(columns * weight).sum(), (rows * weight).sum()])
        np.testing.assert_allclose(centre + 0.5, TEMPLATE[channel] * 224, atol=0.75)


def test_a_large_face_is_averaged_not_sampled() -> None:
    """A one-pixel checkerboard, shrunk eight times, is even grey."""
    image = np.indices((2000, 2000)).sum(axis=0) % 2 * 255
    image = np.repeat(image[..., None], 3, axis=2).astype(np.uint8)
    points = TEMPLATE * 1792 + 100
    crop = align(image, face_at(points), 224)
    assert crop.std() < 8
    assert crop.mean() == pytest.approx(127.5, abs=3)


def test_beyond_the_image_is_black() -> None:
    image = np.full((300, 300, 3), 200, np.uint8)
    crop = align(image, face_at(TEMPLATE * 200 - 100), 112)
    assert crop.shape == (112, 112, 3)
    assert not crop[0].any()
    assert (crop[-1, -1] == 200).all()


def test_coincident_landmarks_fall_back_to_the_box() -> None:
    image = np.zeros((400, 400, 3), np.uint8)
    image[150:250, 150:250] = 255
    face = Face((100.0, 100.0, 300.0, 300.0), 0.9, np.full((5, 2), 200.0))
    crop = align(image, face, 224)
    assert 0 < crop.mean() < 255


def test_overlap_and_suppression_against_pixels() -> None:
    random = np.random.default_rng(0)
    corners = random.integers(0, 40, (30, 2))
    boxes = np.hstack([corners, corners + random.integers(1, 30, (30, 2))]).astype(float)
    scores = random.uniform(size=30)

    def painted(box: np.ndarray) -> np.ndarray:
        canvas = np.zeros((80, 80), bool)
        x0, y0, x1, y1 = box.astype(int)
        canvas[y0:y1, x0:x1] = True
        return canvas

    masks = [painted(box) for box in boxes]
    expected: list[int] = []
    for i in np.argsort(-scores):
        share = [(masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum() for j in expected]
        np.testing.assert_allclose([overlap(boxes[i], boxes[j]) for j in expected], share)
        if all(value <= 0.3 for value in share):
            expected.append(int(i))
    assert suppress(boxes, scores, 0.3) == expected


def test_the_detector_grid_is_decoded_as_documented() -> None:
    """One cell encodes a face of 40 x 24 pixels around (50, 30) of the input, half the image size."""
    heat = np.zeros((16, 24), np.float32)
    heat[7, 12] = 0.8
    size, offset, marks = (np.zeros((k, 16, 24), np.float32) for k in (2, 2, 10))
    size[:, 7, 12] = np.log([40 / 4, 24 / 4])
    offset[:, 7, 12] = [30 / 4 - 7.5, 50 / 4 - 12.5]
    marks[:, 7, 12] = np.array([[0.4, 0.3], [0.4, 0.7], [0.6, 0.5], [0.8, 0.35], [0.8, 0.65]]).ravel()  # y, x
    (face,) = decode_grid(heat, size, offset, marks, scale=0.5)
    np.testing.assert_allclose(face.box, np.array([38, 10, 62, 50]) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(face.landmarks[2], np.array([38 + 12, 10 + 24]) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(face.landmarks[0], np.array([38 + 7.2, 10 + 16]) / 0.5, rtol=1e-5)
    assert face.score == pytest.approx(0.8)


def test_jpeg_encoding_is_deterministic_and_keeps_colour() -> None:
    y, x = np.mgrid[:64, :64]
    image = np.stack([x * 4, y * 4, 255 - x * 2 - y * 2], axis=-1).astype(np.uint8)
    image[::2, ::2] = [255, 0, 0]  # colour that halved resolution would wash out
    data = encode_jpeg(image)
    assert data == encode_jpeg(image.copy())
    assert np.abs(decode_jpeg(data).astype(int) - image.astype(int)).mean() < 4


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_stored_bytes_that_are_not_an_image_are_an_error(data: bytes) -> None:
    with pytest.raises(MediaError, match="stored image"):
        decode_jpeg(data)


def test_identity_depends_on_the_size_of_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    before = faces_identity()
    assert before == faces_identity() and len(before["model"]) == 32
    monkeypatch.setattr("vaflow.extract.streams.MAX_SIZE", 320)
    assert faces_identity() != before
