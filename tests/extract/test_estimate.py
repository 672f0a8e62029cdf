"""`--dry-run`: size and time are measured on the streams that exist."""

import shutil
from pathlib import Path

import pytest

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.estimate import estimate
from vaflow.extract.pipeline import extract

CONFIG = ExtractConfig(visual=("clip-tiny",), audio=("ast-tiny",), device="cpu", workers=1)


@pytest.mark.parametrize(
    "name", [pytest.param("carphone.mp4", marks=pytest.mark.slow), "obama.mp4"], ids=["without audio", "with audio"]
)
def test_estimated_size_equals_the_cache_size(clips: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(clips / name, tmp_path / "data" / name)
    dataset = open_dataset(tmp_path / "data", "videos")
    result = estimate(dataset, tmp_path / "cache", CONFIG, Shard())
    extract(dataset, tmp_path / "cache", CONFIG)
    streams = open_cache(tmp_path / "cache").info()["streams"].values()
    written = sum(stream["bytes"] for stream in streams if stream["kind"] != "text") / 1e6
    assert result["megabytes"] == pytest.approx(written, rel=0.3, abs=0.05)


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
