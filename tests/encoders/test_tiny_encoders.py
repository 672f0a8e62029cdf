"""The tiny encoders: reproducible, with the full classes and inputs, and linearly decodable features."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import ASTModel

from vaflow.encoders import build_encoder
from vaflow.encoders.ast import window_frames
from vaflow.encoders.logmel import RATE, FilterBank
from vaflow.encoders.tiny import uniform

# These digests guarantee that caches made on other machines stay compatible.
DIGESTS = {"clip-tiny": "2ec28907c0dbef311af4a9b0dbc62f1c", "ast-tiny": "364681e06fc04e7dc9a1b9a0e9f34c19"}


def build(name: str) -> Any:
    """Return an encoder typed as Any."""
    return build_encoder(name)


@pytest.fixture(scope="module", params=DIGESTS)
def encoder(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def test_weights_are_the_same_on_every_machine(encoder: Any) -> None:
    assert encoder.identity["weights"] == DIGESTS[encoder.name]


def test_weights_do_not_depend_on_torchs_random_state(encoder: Any) -> None:
    torch.manual_seed(123)
    assert build(encoder.name).identity == encoder.identity


def test_generated_uniform_numbers_are_exact_centred_and_independent() -> None:
    numbers = uniform("a", (200_000,), 1.0)
    step = np.float64(np.float32(np.sqrt(3.0))) / 2**24
    np.testing.assert_array_equal(numbers / step, np.round(numbers / step))
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert np.abs(numbers).max() < np.sqrt(3)
    np.testing.assert_array_equal(numbers, uniform("a", (200_000,), 1.0))
    assert abs(np.corrcoef(numbers, uniform("b", (200_000,), 1.0))[0, 1]) < 0.01


def test_tiny_encoders_use_the_full_classes_and_inputs() -> None:
    clip, ast = build("clip-tiny"), build("ast-tiny")
    assert isinstance(clip._model, open_clip.CLIP)
    assert (clip.image_size, clip.module.patch_size) == (224, (16, 16))
    assert isinstance(ast.module, ASTModel)
    config = ast.module.config
    assert (config.max_length, config.num_mel_bins, config.patch_size) == (1024, 128, 16)
    assert (config.time_stride, config.frequency_stride) == (10, 10)
    assert (ast.geometry.frequency_tokens, ast.geometry.tokens.count, window_frames(10)) == (12, 101, 998)


def test_features_do_not_depend_on_other_images_in_the_batch() -> None:
    clip = build("clip-tiny")
    rng = np.random.default_rng(0)
    first, second = (torch.from_numpy(rng.integers(0, 256, (4, 224, 224, 3), np.uint8)) for _ in range(2))
    second[2] = first[2]
    assert torch.equal(clip.encode(first)[2], clip.encode(second)[2])


# --- linearly decodable features


def ccc(prediction: np.ndarray, target: np.ndarray) -> float:
    covariance = np.mean((prediction - prediction.mean()) * (target - target.mean()))
    return float(2 * covariance / (prediction.var() + target.var() + (prediction.mean() - target.mean()) ** 2))


def read_out(train: np.ndarray, target: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression on unscaled features: scaling would hide features too small to train on."""
    mean = train.mean(axis=0)
    inputs = np.concatenate([train - mean, np.ones((len(train), 1))], axis=1)
    weights = np.linalg.solve(inputs.T @ inputs + np.eye(inputs.shape[1]), inputs.T @ target)
    return np.concatenate([test - mean, np.ones((len(test), 1))], axis=1) @ weights


def draw_face(person: np.random.Generator, smile: float, jitter: np.random.Generator) -> np.ndarray:
    """[112, 112, 3]: the same person differs only by the curve of the mouth and a little by place."""
    skin, wall, hair = (tuple(int(c) for c in person.integers(40, 230, 3)) for _ in range(3))
    size = person.uniform(0.85, 1.1) * 36
    x, y = 56 + person.uniform(-3, 3) + jitter.uniform(-1, 1), 56 + person.uniform(-3, 3) + jitter.uniform(-1, 1)
    image = Image.new("RGB", (112, 112), wall)
    pen = ImageDraw.Draw(image)
    pen.ellipse([x - 1.15 * size, y - 1.5 * size, x + 1.15 * size, y + 0.9 * size], hair)
    pen.ellipse([x - size, y - 1.2 * size, x + size, y + 1.25 * size], skin)
    for side in (-1, 1):
        eye = x + side * 0.42 * size
        pen.ellipse([eye - 6, y - 0.3 * size - 4, eye + 6, y - 0.3 * size + 4], (240, 240, 240))
        pen.ellipse([eye - 3, y - 0.3 * size - 3, eye + 3, y - 0.3 * size + 3], (20, 20, 20))
    across = np.linspace(-1, 1, 15)
    mouth = [(x + 0.5 * size * u, y + 0.6 * size + 10 * smile * (0.5 - u**2)) for u in across]
    pen.line(mouth, (130, 30, 40), width=4)
    return np.asarray(image)


def faces(first: int, people: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    jitter = np.random.default_rng(first)
    smiles = jitter.uniform(-1, 1, (people, each))
    clip = build("clip-tiny")
    features = [
        clip.encode(
            torch.from_numpy(
                np.stack([clip.prepare(draw_face(np.random.default_rng(first + p), s, jitter)) for s in smiles[p]])
            )
        ).numpy()
        for p in range(people)
    ]
    return np.concatenate(features), smiles.ravel()


@pytest.mark.slow  # the demonstration does not reach its score without it
def test_mouth_curvature_is_linearly_decodable_for_unseen_people() -> None:
    train, target = faces(100, people=24, each=12)
    test, truth = faces(900, people=12, each=8)
    assert ccc(read_out(train, target, test), truth) > 0.6
    spread = np.sqrt(train.var(axis=0).mean() / np.mean(train**2))
    assert spread > 0.2, "the standard deviation of features must be comparable to their magnitude"


def voices(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten-second harmonic sounds whose pitch and loudness change every half second, on random room noise."""
    ast, rng = build("ast-tiny"), np.random.default_rng(seed)
    features, facts = [], []
    for _ in range(count):
        octave, level = rng.uniform(0, 1, (2, 20))
        pitch = np.repeat(110 * 2**octave, RATE // 2)
        loudness = np.repeat(10 ** (-2 + level), RATE // 2)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        tone = sum(np.sin(k * phase) / k for k in range(1, 20))
        samples = loudness * tone + 10 ** rng.uniform(-4, -3) * rng.standard_normal(phase.size)
        mel = torch.from_numpy(FilterBank().push(samples.astype(np.float32)))[None]
        features.append(ast.encode(mel, window=10, steps=20)[0].numpy())
        facts.append(np.stack([octave, level], axis=-1))
    return np.concatenate(features), np.concatenate(facts)


@pytest.mark.slow  # the demonstration does not reach its score without it
def test_pitch_and_loudness_are_linearly_decodable_for_new_audio() -> None:
    train, target = voices(1, count=14)
    test, truth = voices(2, count=5)
    prediction = read_out(train, target, test)
    scores = [ccc(prediction[:, k], truth[:, k]) for k in range(2)]
    assert scores[1] > 0.8, f"loudness {scores[1]:.2f}"
    assert scores[0] > 0.5, f"pitch {scores[0]:.2f}"
