"""Every block of docs/own-features.md runs in page order, and its statements are correct."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, open_cache
from vaflow.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "own-features.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which all blocks of the page have run."""
    folder = tmp_path_factory.mktemp("own")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in re.findall(r"^```(python|bash)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            if language == "python":
                exec(compile(block, PAGE.name, "exec"), names)
                continue
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "vaflow" and main(arguments) == 0, line
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "own.cache")


def test_every_recording_has_its_split_group_and_labels(cache: Cache) -> None:
    assert len(cache.items(split="train")) == 6 and len(cache.items(split="val")) == 2
    assert {cache.meta(item)["group"] for item in cache.items()} == {"0", "1", "2", "3"}
    assert all(cache.meta(item)["rows"] == 80 for item in cache.items())


def test_features_are_z_scores_within_each_speaker(cache: Cache) -> None:
    for speaker in range(4):
        both = [cache.read("prosody", f"speaker{speaker}_take{take}").embedding[0] for take in range(2)]
        np.testing.assert_allclose(np.concatenate(both).mean(axis=0, dtype=np.float64), 0, atol=1e-2)
        np.testing.assert_allclose(np.concatenate(both).std(axis=0, dtype=np.float64), 1, atol=1e-2)


def test_the_run_is_scored_on_the_labels_of_the_validation_speaker(folder: Path) -> None:
    metrics = json.loads((folder / "runs" / "own" / "metrics.json").read_text())
    assert metrics["split"] == "val" and metrics["n_frames"] == 160
    rows = (folder / "runs" / "own" / "predictions" / "val" / "speaker3_take0.csv").read_text().splitlines()
    assert len(rows) == 81


def test_folds_keep_the_takes_of_a_speaker_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["folds", str(folder / "own.cache"), "--folds", "4", "--json"]) == 0
    folds = [fold["clips"] for fold in json.loads(capsys.readouterr().out)]
    assert sorted(folds) == [[f"speaker{speaker}_take{take}" for take in range(2)] for speaker in range(4)]
