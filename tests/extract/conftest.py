"""Encoders and trees shared by the tests of stage one, because building them is slow."""

from pathlib import Path

import pytest
import torch
from affwild2_tree import Tree, build_affwild2

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
