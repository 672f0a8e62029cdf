"""Speech activity: from levels, from samples block by block, and as an extraction stores it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vaflow.cache import open_cache
from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip
from vaflow.extract.audio import SpeechMeter, speech_frames
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with

RATE = 16_000


def test_speech_is_clearly_louder_than_the_background() -> None:
    levels = np.full(300, -50.0)
    levels[100:200] = -30
    speech = speech_frames(levels)
    assert speech[100:200].all()
    assert not speech[:79].any() and not speech[221:].any(), "0.2 s around loud frames count as speech"
    assert not speech_frames(np.full(300, -30.0)).any(), "a constant level is background"
    assert not speech_frames(np.full(300, -90.0)).any()


@pytest.mark.parametrize("size", [RATE, 1000, 161])
def test_blocks_of_any_size_give_the_same_speech(size: int) -> None:
    rng = np.random.default_rng(0)
    samples = (rng.normal(size=3 * RATE) * np.repeat([0.001, 0.1, 0.001], RATE)).astype(np.float32)
    meter = SpeechMeter()
    for start in range(0, len(samples), size):
        meter.push(samples[start : start + size])
    speech = meter.finish()
    assert len(speech) == 300
    assert speech[100:200].all() and not speech[:75].any() and not speech[225:].any()


def test_an_extraction_stores_speech_beside_the_log_mel(clips: Path, tmp_path: Path) -> None:
    video = clips / "obama.mp4"
    dataset = Dataset(clips, "videos", (Clip("obama", None, "obama", video, video),))
    config = ExtractConfig(visual=(), audio=(), device="cpu", workers=1)
    extract_with(dataset, tmp_path / "cache", config, [], [], torch.device("cpu"))
    logmel = open_cache(tmp_path / "cache").read("logmel", "obama")
    assert logmel.speech.shape == logmel.valid.shape
    assert 0.5 < logmel.speech.mean() < 1, "he speaks most of the time"
    assert logmel.meta["speech"] == "energy"
