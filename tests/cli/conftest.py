"""Fixtures shared by the command-line tests."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def data(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one real clip, labelled frame by frame, in split train."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    (root / "obama.mp4").symlink_to((clips / "obama.mp4").resolve())
    rows = [f"{k},{k % 40 / 80:.3f},{k % 25 / 50 - 0.3:.3f}" for k in range(105)]
    (root / "obama.csv").write_text("\n".join(["frame,valence,arousal", *rows]) + "\n")
    (root / "splits.csv").write_text("name,split\nobama,train\n")
    return root
