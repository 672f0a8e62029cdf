"""A real cache with pixels and tiny encoders: two training clips, one validation clip."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_ready import SETTINGS, Loaded

from vaflow.cache import Cache, open_cache
from vaflow.datasets import open_dataset
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract

CLIPS = {"obama.mp4": "train", "face_noface.mov": "train", "carphone.mp4": "val"}
FRAMES = 200  # at least as many rows of annotation as any of them has frames
EXTRACTION = ExtractConfig(
    visual=("clip-tiny",), audio=("ast-tiny",), window=4.0, stride=2.0, frames=4, audio_steps=8, pixels=True, workers=1
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A directory of clips with generated annotations."""
    root = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(CLIPS):
        (root / name).symlink_to((clips / name).resolve())
        with (root / name).with_suffix(".csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["frame", "valence", "arousal"])
            angle = np.arange(FRAMES) / 30 + number
            rows.writerows(zip(range(FRAMES), np.sin(angle) / 2, np.cos(2 * angle) / 2, strict=True))
    splits = [f"{Path(name).stem},{split}" for name, split in CLIPS.items()]
    (root / "splits.csv").write_text("\n".join(["name,split", *splits]) + "\n")
    return root


@pytest.fixture(scope="session")
def pixels_cache(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Cache:
    """The cache written by `vaflow extract --pixels`; read-only for tests."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    summary = extract(open_dataset(videos, "videos"), path, EXTRACTION)
    assert not summary.failures
    return open_cache(path)


@pytest.fixture(scope="session")
def loaded(pixels_cache: Cache) -> Loaded:
    """Training settings without randomness; read-only for tests."""
    return fresh_copy(pixels_cache)


@pytest.fixture
def changeable(pixels_cache: Cache) -> Loaded:
    """As `loaded`, for tests that change the backbones."""
    return fresh_copy(pixels_cache)


def fresh_copy(cache: Cache) -> Loaded:
    return Loaded(cache, replace(SETTINGS, dropout=0.0))
