"""`--dry-run`: size and time are measured on the streams that exist."""

import shutil
import wave
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_extraction import WHOLE

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset, open_dataset
from vaflow.errors import FingerprintError
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.estimate import estimate
from vaflow.extract.pipeline import extract

CONFIG = ExtractConfig(visual=("clip-tiny",), audio=("vggish-tiny",), device="cpu", workers=1)


@pytest.mark.parametrize(
    "name", [pytest.param("carphone.mp4", marks=pytest.mark.slow), "obama.mp4"], ids=["without audio", "with audio"]
)
def test_estimated_size_equals_the_cache_size(clips: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(clips / name, tmp_path / "data" / name)
    with wave.open(str(tmp_path / "data" / "voice.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 8000))
    dataset = open_dataset(tmp_path / "data", "videos")
    result = estimate(dataset, tmp_path / "cache", CONFIG, Shard())
    extract(dataset, tmp_path / "cache", CONFIG)
    cache = open_cache(tmp_path / "cache")
    streams = cache.info()["streams"].values()
    written = sum(stream["bytes"] for stream in streams if stream["kind"] != "text") / 1e6
    assert result["megabytes"] == pytest.approx(written, rel=0.3, abs=0.05)
    assert result["frames_to_encode"] == len(cache.read("clip-tiny", Path(name).stem).time), "the audio file has none"


def test_estimated_time_is_measured_with_the_encoders(two_clips: Path, tmp_path: Path) -> None:
    result = estimate(open_dataset(two_clips, "videos"), tmp_path / "cache", CONFIG, Shard())
    assert 0 < result["minutes"] < 10
    assert "time_not_measured" not in result
    assert not (tmp_path / "cache").exists()


def test_missing_weights_explain_a_missing_time_estimate(
    two_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = ExtractConfig(audio=(), device="cpu")
    result = estimate(open_dataset(two_clips, "videos"), tmp_path / "cache", config, Shard())
    assert result["minutes"] is None
    assert "clip-vit-b16" in result["time_not_measured"]


def test_items_that_lack_a_stream_are_counted(seven_clips: Dataset, seven_clips_cache: Cache, tmp_path: Path) -> None:
    cache = open_cache(shutil.copytree(seven_clips_cache.path, tmp_path / "cache"), writable=True)
    cache.drop("clip-tiny", seven_clips.clips[0].id)
    whole = estimate(seven_clips, cache.path, WHOLE, Shard())
    assert (whole["items"], whole["items_already_there"]) == (1, 6)
    assert whole["frames_to_encode"] > whole["windows_to_encode"] == 0, "the audio stream has all clips"
    pixels = estimate(seven_clips, cache.path, replace(WHOLE, pixels=True), Shard())
    assert (pixels["items"], pixels["items_already_there"]) == (7, 0)


def test_settings_that_do_not_fit_the_cache_are_rejected(seven_clips: Dataset, seven_clips_cache: Cache) -> None:
    with pytest.raises(FingerprintError, match=r"sampling\.window: cache has 10\.0, now 5\.0"):
        estimate(seven_clips, seven_clips_cache.path, replace(WHOLE, window=5.0), Shard())
