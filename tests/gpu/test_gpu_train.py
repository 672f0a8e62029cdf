"""Stage two on a GPU: training, predictions equal to the CPU's, fine-tuning."""

import json
from pathlib import Path

import pytest

from vaflow.cli import main

TINY = ["--visual", "clip-tiny", "--audio", "ast-tiny", "--workers", "2", "-q"]
SMALL = ["--set", "hidden=16", "--epochs", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def cache(gpu: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "cache"
    assert main(["extract", str(data), "--out", str(out), *TINY, "--device", gpu, "--pixels"]) == 0
    return out


@pytest.mark.parametrize("options", [[], ["--finetune"]])
def test_a_run_predicts_the_same_on_cpu_and_gpu(
    options: list[str], gpu: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(cache), "--out", str(run), "--device", gpu, *SMALL, *options, "-q"]) == 0
    scores = []
    for device in (gpu, "cpu"):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--cache", str(cache), "--json", "--device", device]) == 0
        scores.append(json.loads(capsys.readouterr().out)["ccc"]["mean"])
    assert scores[0] == pytest.approx(scores[1], abs=5e-3)
