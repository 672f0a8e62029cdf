"""Runs on torch-detected faces predict with torch and can be scored on OpenCV-detected faces."""

import json
from pathlib import Path

import pytest
import torch

from vaflow.cache import open_cache
from vaflow.cli import main

GRID = ["--window", "4", "--stride", "2", "--frames", "4", "--audio-steps", "4", "--workers", "1", "--device", "cpu"]
SMALL = ["--set", "hidden=8", "--batch-size", "2", "--epochs", "1", "--set", "val_split=train", "--device", "cpu"]


def runtime(cache: Path) -> str:
    name: str = open_cache(cache).streams()["clip-tiny"].identity["picture"]["faces"]["runtime"]
    return name.split()[0]


@pytest.mark.slow  # experimental
def test_predict_uses_the_face_detector_of_the_run(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    video = data / "obama.mp4"
    video.symlink_to((clips / "obama.mp4").resolve())
    rows = [f"{k},{k % 40 / 80:.3f},{k % 25 / 50 - 0.3:.3f}" for k in range(105)]
    (data / "obama.csv").write_text("\n".join(["frame,valence,arousal", *rows]) + "\n")
    (data / "splits.csv").write_text("name,split\nobama,train\n")
    for name in ("opencv", "torch"):
        tiny = ["--visual", "clip-tiny", "--audio", "none", "--detector", name]
        assert main(["extract", str(data), "--out", str(tmp_path / name), *tiny, *GRID, "-q"]) == 0
        assert runtime(tmp_path / name) == name
    assert main(["train", str(tmp_path / "torch"), "--out", str(run), *SMALL, "-q"]) == 0

    kept = ["--cache", str(tmp_path / "kept"), "--device", "cpu", "-q"]
    assert main(["predict", str(run), str(video), "--out", str(tmp_path / "traces"), *kept]) == 0
    assert runtime(tmp_path / "kept") == "torch"

    scores = []
    for name in ("opencv", "torch"):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--cache", str(tmp_path / name), "--json", "--device", "cpu"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["ccc"]["mean"])
    assert scores[0] == pytest.approx(scores[1], abs=5e-3)
