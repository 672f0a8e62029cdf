"""Filter banks equal the Hugging Face extractor and do not depend on the block size."""

import numpy as np
import pytest
from transformers import ASTFeatureExtractor

from vaflow.encoders.ast import AUDIOSET_MEAN, AUDIOSET_STD
from vaflow.encoders.logmel import FRAME, HOP, MEL_BINS, RATE, FilterBank, frame_count, frame_times


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    tone = 0.2 * np.sin(2 * np.pi * (200 + 80 * np.sin(time)) * time)
    return (tone + 0.02 * rng.standard_normal(time.size)).astype(np.float32)


def banks(samples: np.ndarray, cuts: list[int] | None = None) -> np.ndarray:
    bank = FilterBank()
    blocks = np.split(samples, cuts or [])
    return np.concatenate([bank.push(block) for block in blocks])


def hugging_face(samples: np.ndarray, normalised: bool = True) -> np.ndarray:
    extractor = ASTFeatureExtractor(do_normalize=normalised)
    return extractor(samples, sampling_rate=RATE, return_tensors="np")["input_values"][0]


def normalise(mel: np.ndarray, length: int = 1024) -> np.ndarray:
    padded = np.zeros((length, MEL_BINS), np.float32)
    padded[: len(mel)] = mel[:length]
    return (padded - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)


def test_one_window_equals_the_hugging_face_extractor() -> None:
    samples = noise(10)
    mel = banks(samples)
    assert mel.shape == (998, MEL_BINS)
    assert mel.dtype == np.float32
    np.testing.assert_allclose(normalise(mel), hugging_face(samples), atol=1e-5)


def test_slices_of_a_long_clip_equal_the_extractor_on_the_same_span() -> None:
    samples = noise(23)
    mel = banks(samples)
    for start in (0, 3, 6, 9, 12):
        span = samples[start * RATE : (start + 10) * RATE]
        np.testing.assert_allclose(
            normalise(mel[start * 100 : start * 100 + 998]),
            hugging_face(span),
            atol=1e-5,
            err_msg=f"start {start} s",
        )


@pytest.mark.parametrize("seconds", [0.025, 0.6, 4.321])
def test_short_audio_is_padded_like_the_extractor(seconds: float) -> None:
    samples = noise(seconds)
    np.testing.assert_allclose(normalise(banks(samples)), hugging_face(samples), atol=1e-5)


def test_results_do_not_depend_on_the_block_size() -> None:
    samples = noise(7.77)
    whole = banks(samples)
    rng = np.random.default_rng(1)
    cuttings = [
        list(range(1, 4000, 7)),
        list(range(160, samples.size, 160)),
        sorted(rng.integers(0, samples.size, 40).tolist()),
        [samples.size - 1],
    ]
    for cuts in cuttings:
        np.testing.assert_array_equal(banks(samples, cuts), whole)


def test_frames_are_emitted_as_soon_as_they_are_complete() -> None:
    bank, samples = FilterBank(), noise(1)
    assert bank.push(samples[: FRAME - 1]).shape == (0, MEL_BINS)
    assert bank.push(samples[FRAME - 1 : FRAME]).shape == (1, MEL_BINS)
    assert bank.push(samples[FRAME : FRAME + 2 * HOP]).shape == (2, MEL_BINS)


def test_frame_count_equals_the_number_of_emitted_frames() -> None:
    for size in (0, 1, FRAME - 1, FRAME, FRAME + HOP - 1, FRAME + HOP, 16_000):
        assert frame_count(size) == len(banks(noise(2)[:size]))


def test_a_click_changes_only_the_frames_that_cover_it() -> None:
    quiet = 1e-4 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    clicked = quiet.copy()
    clicked[8000] += 0.9
    changed = np.flatnonzero(np.abs(banks(clicked) - banks(quiet)).max(axis=1) > 1e-3)
    covering = [i for i in range(998) if HOP * i <= 8000 < HOP * i + FRAME]
    # The window function is zero at a frame's first sample, so an impulse there may not change the frame.
    assert set(covering[:-1]) <= set(changed.tolist()) <= set(covering)
    assert abs(frame_times(100)[changed].mean() - 8000 / RATE) < HOP / RATE


def test_frame_times_are_frame_centres() -> None:
    np.testing.assert_allclose(frame_times(4), [0.0125, 0.0225, 0.0325, 0.0425], rtol=0, atol=1e-15)


def test_silence_has_finite_features() -> None:
    assert np.isfinite(banks(np.zeros(RATE, np.float32))).all()


def test_stereo_is_rejected() -> None:
    with pytest.raises(ValueError, match="mono"):
        FilterBank().push(np.zeros((2, 1000), np.float32))
