"""A bfloat16 cache supports every command through the command line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.predict import PredictConfig, extraction_settings

TINY = ["--visual", "clip-tiny", "--audio", "vggish-tiny"]
GRID = ["--window", "4", "--stride", "2", "--frames", "4", "--audio-steps", "4", "--workers", "1", "--device", "cpu"]
SMALL = ["--set", "hidden=8", "--batch-size", "2", "--epochs", "1", "--set", "val_split=train", "--device", "cpu"]
LEVELS = ("low", "middle", "high")


@pytest.fixture(scope="module")
def cache(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short") / "cache"
    assert main(["extract", str(data), "--out", str(out), *TINY, *GRID, "--pixels", "--precision", "bfloat16"]) == 0
    return out


@pytest.fixture(scope="module")
def exact(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features in float32."""
    out = tmp_path_factory.mktemp("exact") / "cache"
    assert main(["extract", str(data), "--out", str(out), *TINY, *GRID, "--pixels", "-q"]) == 0
    return out


@pytest.mark.slow  # a fingerprint like any other
def test_low_precision_streams_are_not_mixed_with_float32(
    data: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(data), "--out", str(cache), *TINY, *GRID, "--pixels"]) == 2
    assert "precision: cache has 'bfloat16', now nothing" in capsys.readouterr().err


@pytest.mark.parametrize("finetune", [[], pytest.param(["--finetune"], marks=pytest.mark.slow)])
def test_train_predict_and_score(
    finetune: list[str], data: Path, cache: Path, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(cache), "--out", str(run), *SMALL, *finetune]) == 0
    kept = ["--cache", str(tmp_path / "kept"), "--device", "cpu"]
    assert main(["predict", str(run), str(data / "obama.mp4"), "--out", str(tmp_path / "traces"), *kept]) == 0
    assert len((tmp_path / "traces" / "obama.csv").read_text().splitlines()) == 1 + 105
    made = open_cache(tmp_path / "kept").streams()["clip-tiny"].identity
    assert made.get("precision") == (None if finetune else "bfloat16"), "prediction must use the precision of training"

    scores = []
    for path in (cache, exact):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--cache", str(path), "--json", "--device", "cpu"]) == 0
        printed = capsys.readouterr()
        scores.append(json.loads(printed.out)["ccc"]["mean"])
        assert ("precision: " in printed.err) == (path == exact), (
            "float32 features differ slightly from bfloat16 features"
        )
    assert scores[0] == pytest.approx(scores[1], abs=5e-3)


def test_prompts_are_added_and_read_with_context(cache: Path, tmp_path: Path) -> None:
    words = "\n".join(f'v_{v}.a_{a} = "plain {v} {a}"' for v in LEVELS for a in LEVELS)
    (tmp_path / "plain.toml").write_text(f'[templates]\none = "a {{}} face"\n[descriptions]\n{words}\n')
    assert main(["cache", "prompts", str(cache), "--prompts", str(tmp_path / "plain.toml")]) == 0
    context = ["--set", "prompt_context=2", "--set", "prompts=plain"]
    assert main(["train", str(cache), "--out", str(tmp_path / "run"), *SMALL, *context]) == 0


@pytest.mark.parametrize(("encoder", "expected"), [("onnx", "bfloat16"), ("opensmile", "bfloat16"), ("hf", "auto")])
def test_encoders_that_have_one_precision_do_not_change_that_of_the_others(
    encoder: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [
        SimpleNamespace(name="clip-tiny", kind="visual", identity={"encoder": "clip", "precision": "bfloat16"}),
        SimpleNamespace(name=f"{encoder}:one", kind="audio", identity={"encoder": encoder}),
    ]
    warnings: list[str] = []
    monkeypatch.setattr("vaflow.predict.log.warning", lambda text, names: warnings.append(text % names))
    run: Any = SimpleNamespace(record=SimpleNamespace(head_streams=streams, tuned=()))
    assert extraction_settings({Path("run"): run}, PredictConfig(device="cpu")).precision == expected
    assert ["several precisions (float32, bfloat16)" in warning for warning in warnings] == [True] * (
        expected == "auto"
    )
