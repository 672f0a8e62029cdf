"""Encoders and trees shared by the tests of stage one, because building them is slow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from affwild2_tree import Tree, build_affwild2
from make_media import AudioTrack, VideoTrack, tones, write_media
from tiny_extraction import WHOLE, run

from vaflow.cache import Cache, open_cache
from vaflow.datasets import Dataset, open_dataset
from vaflow.encoders import build_encoder


@pytest.fixture(scope="session")
def tiny_pair() -> tuple:
    """The seeded CLIP and AST, on the CPU with one thread: workers want the other cores."""
    torch.set_num_threads(1)
    return build_encoder("clip-tiny"), build_encoder("ast-tiny")


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """An Aff-Wild2 tree with every quirk and no damaged file."""
    return build_affwild2(tmp_path_factory.mktemp("affwild2"))


@pytest.fixture(scope="session")
def two_clips(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A folder with two real clips: a talking man, and a face that leaves."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("obama.mp4", "face_noface.mov"):
        (folder / name).symlink_to((clips / name).resolve())
    return folder


@pytest.fixture(scope="session")
def seven_clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven clips of one to eleven seconds, so that batches are filled across them and the last ones are padded."""
    root = tmp_path_factory.mktemp("same")
    for number, seconds in enumerate((11.0, 1.0, 4.6, 2.2, 7.4, 1.6, 3.0)):
        times = tuple(range(0, round(seconds * 1000), 200))
        audio_track = AudioTrack(tones(seconds, 16000) * (number + 1) / 8, 16000)
        write_media(root / f"clip{number}.mp4", VideoTrack(times, noise=30), audio_track)
    return open_dataset(root, "videos")


@pytest.fixture(scope="session")
def seven_clips_cache(seven_clips: Dataset, tiny_pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """What one worker extracts from them; tests only read it."""
    out = tmp_path_factory.mktemp("reference") / "cache"
    assert run(seven_clips, out, tiny_pair, replace(WHOLE, workers=1)).extracted == 7
    return open_cache(out)
