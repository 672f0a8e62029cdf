"""Caches and runs in folders whose names are not UTF-8 are trained on, evaluated and predicted; names of videos."""

from pathlib import Path

import pytest
from lab import Lab
from synthetic_cache import Toy, make_cache

from vaflow.cache import open_cache
from vaflow.errors import UsageError
from vaflow.predict import clips_of
from vaflow.train.run_folder import load_run

NAME = "caf\udce9"  # the byte E9 alone, as in Latin-1: Python reads it as a surrogate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a cache; its name is not UTF-8."""
    folder = tmp_path / NAME
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system requires names in UTF-8")
    make_cache(folder / "cache", Toy(seconds=(8, 14)))
    return folder


def test_train_evaluate_and_predict_accept_folder_names_that_are_not_utf_8(lab: Lab, folder: Path) -> None:
    def vaflow(*arguments: str) -> None:
        strict = "import sys; sys.stdout.reconfigure(encoding='utf-8', errors='strict')"  # as in most locales
        ended = lab.run([*arguments, "--device", "cpu"], strict)
        assert ended.code == 0, ended.err

    cache, run, out = (str(folder / name) for name in ("cache", "run", "out"))
    vaflow("train", cache, "--out", run, "--set", "hidden=8", "--epochs", "1")
    assert load_run(Path(run)).record.cache == cache
    vaflow("evaluate", run)
    vaflow("predict", run, "--cache", cache, "--out", out)
    assert len(list(Path(out).glob("*.csv"))) == len(open_cache(cache).items())


def test_a_video_whose_predictions_cannot_have_its_name_is_rejected_at_the_start(tmp_path: Path) -> None:
    video = tmp_path / "a\\b.mp4"
    video.touch()
    with pytest.raises(UsageError, match=r"unusable name.*without a backslash.*Rename the file"):
        clips_of([video])
