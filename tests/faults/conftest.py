"""Fixtures of the fault tests."""

from pathlib import Path

import pytest
from kills import SMALL, toy_cache
from lab import EXTRACT, Lab, assert_printed
from media import write_media

CLIPS = 3


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few short videos with audio and labels."""
    return write_media(tmp_path_factory.mktemp("media"), CLIPS)


@pytest.fixture(scope="session")
def whole(lab: Lab, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an undisturbed extraction."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert_printed(lab.run(["extract", media, "--out", out, *EXTRACT]), 0)
    return out


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of toy features; tests change copies of it."""
    return toy_cache(tmp_path_factory.mktemp("toys") / "cache")


@pytest.fixture(scope="session")
def whole_run(lab: Lab, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training run on the toy cache."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert_printed(lab.run(["train", toys, "--out", out, *SMALL]), 0)
    return out
