"""A model trained on arousal labels only marks its valence predictions as untrained."""

from pathlib import Path

import pytest
import torch

from vaflow.cli import main
from vaflow.train.run_folder import require_record

GRID = ["--window", "4", "--stride", "2", "--frames", "4", "--audio-steps", "4", "--workers", "1", "--device", "cpu"]
SMALL = ["--set", "hidden=8", "--batch-size", "2", "--epochs", "1", "--set", "val_split=train", "--device", "cpu"]


@pytest.mark.parametrize(
    "names", [pytest.param(("valence", "arousal"), marks=pytest.mark.slow), ("arousal",), ("valence",)]
)
def test_predict_marks_untrained_dimensions(
    names: tuple[str, ...], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    data, cache, run = tmp_path / "data", tmp_path / "cache", tmp_path / "run"
    data.mkdir()
    (data / "obama.mp4").symlink_to((clips / "obama.mp4").resolve())
    rows = [",".join([str(k), *(f"{k % 40 / 80:.3f}" for _ in names)]) for k in range(105)]
    (data / "obama.csv").write_text("\n".join([",".join(["frame", *names]), *rows]) + "\n")
    (data / "splits.csv").write_text("name,split\nobama,train\n")
    tiny = ["--visual", "none", "--audio", "vggish-tiny"]
    assert main(["extract", str(data), "--out", str(cache), *tiny, *GRID, "-q"]) == 0
    assert main(["train", str(cache), "--out", str(run), *SMALL, "-q"]) == 0
    counts = require_record(run).data["train"]
    assert {name: counts[f"labelled_{name}"] > 0 for name in ("valence", "arousal")} == {
        name: name in names for name in ("valence", "arousal")
    }
    capsys.readouterr()
    assert main(["predict", str(run), str(data / "obama.mp4"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    stderr = capsys.readouterr().err
    for name in ("valence", "arousal"):
        assert (f"without {name} labels" in stderr) == (name not in names)
