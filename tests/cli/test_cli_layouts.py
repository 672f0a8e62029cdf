"""Every dataset layout, from files to a trained run, through the command line."""

import json
import sys
from pathlib import Path

import pytest

from vaflow.cache import open_cache
from vaflow.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))

from other_trees import BUILDERS

SMALL = ["--window", "2", "--stride", "1", "--frames", "8"]


QUICK = ("recola", "afew-va")  # videos, and folders of images; tests/datasets reads the files of every layout


@pytest.mark.parametrize("layout", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in BUILDERS])
def test_from_files_to_a_run(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, cache, run = tmp_path / "data", tmp_path / "cache", tmp_path / "run"
    root.mkdir()
    tree = BUILDERS[layout](root)
    if layout == "afew-va":  # images without audio; splits come from a user list
        (root / "splits.csv").write_text("name,split\n001,train\n02/051,val\n")
    assert main(["check", str(root)]) == 0
    audio_options = [] if layout == "afew-va" else ["--audio", "vggish-tiny", "--audio-steps", "8"]
    encoders = ["--visual", "clip-tiny", *(audio_options or ["--audio", "none"]), "--faces", "none", *SMALL]
    assert main(["extract", str(root), "--out", str(cache), *encoders]) == 0
    assert open_cache(cache).items() == sorted(tree)
    train = ["train", str(cache), "--out", str(run), "--epochs", "1", "--set", "hidden=8", "--device", "cpu"]
    assert main(train) == 0, capsys.readouterr().err
    metrics = json.loads((run / "metrics.json").read_text())
    labelled = {name for name, written in tree.items() if written.rows}
    validating = [name for name in open_cache(cache).items(split="val") if name in labelled]
    assert metrics["n_clips"] == len(validating) > 0
    for name in validating:
        rows = (run / "predictions" / "val" / f"{name}.csv").read_text().splitlines()
        assert len(rows) - 1 == tree[name].times.size, "a row per frame"
