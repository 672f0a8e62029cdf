"""`vaflow train --finetune`, from a cache without pixels to extraction with tuned encoders."""

import json
import re
import shlex
from pathlib import Path

import pytest

from vaflow.cache import open_cache
from vaflow.cli import main

GRID = ["--window", "4", "--stride", "2", "--frames", "4", "--audio-steps", "4", "--workers", "1", "--device", "cpu"]
SMALL = ["--set", "hidden=8", "--batch-size", "2", "--epochs", "1", "--set", "val_split=train", "--device", "cpu"]


@pytest.mark.slow  # the commands of docs/fine-tuning.md, which test_docs runs
def test_from_features_to_tuned_encoders(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    encoders = ["--visual", "clip-tiny", "--audio", "ast-tiny"]
    assert main(["extract", str(data), "--out", str(cache), *encoders, *GRID, "-q"]) == 0
    before = json.loads(next((cache / "records" / "clip-tiny").glob("*.json")).read_text())
    train = ["train", str(cache), "--out", str(run), "--finetune", "--backbone-lr", "1e-4", *SMALL]
    capsys.readouterr()
    assert main(train) == 2
    [command] = re.findall(r"`vaflow (extract ROOT [^`]*)`", capsys.readouterr().err)
    assert main([*shlex.split(command.replace("ROOT", str(data))), *GRID, "-q"]) == 0
    assert json.loads(next((cache / "records" / "clip-tiny").glob("*.json")).read_text()) == before  # not rewritten

    assert main(train) == 0
    assert "best epoch 1 of 1" in capsys.readouterr().out
    assert main(train) == 0
    assert "finished already" in capsys.readouterr().out
    tuned = tmp_path / "tuned"
    weights = ["--weights", f"clip-tiny={run}/encoders/clip-tiny.safetensors"]
    weights += ["--weights", f"ast-tiny={run}/encoders/ast-tiny"]
    assert main(["extract", str(data), "--out", str(tuned), *encoders, *weights, *GRID, "-q"]) == 0
    assert open_cache(tuned).fingerprint("clip-tiny") != open_cache(cache).fingerprint("clip-tiny")
    scores = []
    for other in (cache, tuned):
        assert main(["evaluate", str(run), "--cache", str(other), "--json", "--device", "cpu"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["ccc"]["mean"])
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


def test_weights_option_requires_finetune(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert (
        main(["extract", str(data), "--out", str(cache), "--visual", "clip-tiny", "--audio", "none", *GRID, "-q"]) == 0
    )
    command = ["train", str(cache), "--out", str(tmp_path / "run"), "--weights", f"clip-tiny={data / 'obama.csv'}"]
    assert main([*command, *SMALL]) == 2
    assert "--finetune" in capsys.readouterr().err
