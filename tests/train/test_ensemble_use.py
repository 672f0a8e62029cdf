"""An ensemble directory instead of a run: predictions of new clips, submissions, provenance."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache
from vaflow.cli import main
from vaflow.datasets import Dataset
from vaflow.errors import UsageError
from vaflow.extract.config import ExtractConfig
from vaflow.extract.plan import Summary
from vaflow.predict import PredictConfig, predict_media
from vaflow.provenance import find_provenance
from vaflow.timeline import Grid
from vaflow.train.config import TrainConfig
from vaflow.train.ensemble import ensemble_runs
from vaflow.train.smoothing import Smoothing, write_smoothing
from vaflow.train.train_run import train_run

CONFIG = TrainConfig(hidden=8, attention_heads=2, lr=1e-2, batch_size=8, epochs=1, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("use") / "cache", Toy(seconds=(8, 14)))


@pytest.fixture(scope="module")
def runs(cache: Cache, tmp_path_factory) -> list[Path]:
    """One audio run and one visual run."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [replace(CONFIG, visual=("none",), kl_weight=0.0), replace(CONFIG, audio=("none",), seed=1)]
    for k, config in enumerate(configs):
        train_run(cache, config, folder / str(k), tensorboard=False, figures=False)
    return [folder / str(k) for k in range(2)]


@pytest.fixture
def ensemble(runs: list[Path], tmp_path: Path) -> Path:
    ensemble_runs(runs, tmp_path / "e", "search", weights_split="train", device="cpu")
    return tmp_path / "e"


@pytest.fixture
def extract_configs(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> list[ExtractConfig]:
    """Replaces the extraction by the toy cache and records its settings."""
    recorded: list[ExtractConfig] = []

    def features(dataset: Dataset, folder: Path, config: ExtractConfig, **_: object) -> Summary:
        recorded.append(config)
        shutil.copytree(cache.path, folder)
        return Summary()

    monkeypatch.setattr("vaflow.predict.extract", features)
    return recorded


def video(tmp_path: Path) -> Path:
    path = tmp_path / "val1.mp4"
    path.write_bytes(b"never decoded")
    return path


def va(path: Path) -> np.ndarray:
    return np.genfromtxt(path, delimiter=",", skip_header=1)[:, 2:4]


def test_new_clips_are_predicted_by_every_run_and_averaged(
    ensemble: Path, runs: list[Path], extract_configs: list[ExtractConfig], tmp_path: Path
) -> None:
    summary = predict_media(ensemble, [video(tmp_path)], tmp_path / "out", PredictConfig(device="cpu"))
    assert [(one.visual, one.audio) for one in extract_configs] == [((VISUAL,), (AUDIO,))], (
        "all runs must share one extraction"
    )
    (made,) = summary.predicted
    weights = json.loads((ensemble / "ensemble.json").read_text())["weights"]
    table = np.array([weights["valence"], weights["arousal"]]).T
    expected = sum(w * va(run / "predictions" / "val" / "val1.csv") for w, run in zip(table, runs, strict=True))
    np.testing.assert_allclose(va(made.csv), expected, atol=2e-6)
    assert made.png.is_file()


def test_runs_with_incompatible_extraction_settings_are_rejected(
    runs: list[Path], extract_configs: list[ExtractConfig], cache: Cache, tmp_path: Path
) -> None:
    other = make_cache(tmp_path / "cache", Toy(seconds=(8, 14), grid=Grid(4.0, 1.5, 16)))
    train_run(other, CONFIG, tmp_path / "dense", tensorboard=False, figures=False)
    file = {"runs": [str(runs[1]), str(tmp_path / "dense")], "how": "mean"}
    (tmp_path / "e").mkdir()
    weights = {"valence": [0.5, 0.5], "arousal": [0.5, 0.5]}
    (tmp_path / "e" / "ensemble.json").write_text(json.dumps(file | {"weights": weights}))
    with pytest.raises(UsageError, match=r"differ in the sampling \(frames\).*dense"):
        predict_media(tmp_path / "e", [video(tmp_path)], tmp_path / "out", PredictConfig(device="cpu"))
    assert not extract_configs


def test_an_ensemble_is_traced_to_its_runs(ensemble: Path, runs: list[Path], cache: Cache, capsys) -> None:
    provenance = find_provenance(ensemble)
    weights = json.loads((ensemble / "ensemble.json").read_text())["weights"]
    for k, (maker, run) in enumerate(zip(provenance["run"]["runs"], runs, strict=True)):
        alone = find_provenance(run)["run"]
        assert {key: maker[key] for key in alone} == alone
        assert maker["weight"] == {name: weights[name][k] for name in weights}
    assert {stream["name"]: stream["state"] for stream in provenance["streams"]} == {
        AUDIO: "same",
        VISUAL: "same",
        f"{VISUAL}.text": "found",
    }
    assert {entry["item"]: entry["state"] for entry in provenance["predictions"]} == dict.fromkeys(
        ("val0", "val1", "val2"), "same"
    )
    assert set(provenance["predictions"][0]["records"]) == {VISUAL, AUDIO, "labels"}
    assert main(["provenance", str(ensemble)]) == 0
    printed = capsys.readouterr().out
    assert all(str(run) in printed for run in (ensemble, *runs))


@pytest.mark.parametrize("changed", ["ensemble.json", "model.safetensors"])
def test_changed_ensemble_weights_are_detected(ensemble: Path, runs: list[Path], changed: str) -> None:
    file = ensemble / changed if changed == "ensemble.json" else runs[0] / changed
    before = file.read_bytes()
    if changed == "ensemble.json":
        file.write_text(before.decode().replace('"search"', '"mean"'))
    else:
        file.write_bytes((runs[1] / changed).read_bytes())
    try:
        states = {entry["weights_state"] for entry in find_provenance(ensemble)["predictions"]}
    finally:
        file.write_bytes(before)
    assert states == {"changed"}


@pytest.mark.parametrize("many", [True, False])
def test_a_submission_stores_its_provenance(
    ensemble: Path, runs: list[Path], cache: Cache, tmp_path: Path, many: bool, capsys
) -> None:
    run = ensemble if many else runs[0]
    sample, out = tmp_path / "sample.txt", tmp_path / "submission.txt"
    sample.write_text("image_location,valence,arousal\nval1/00007.jpg,0,0\nval0/00001.jpg,0,0\n")
    assert main(["submit", str(run), "--sample", str(sample), "--out", str(out), "--device", "cpu"]) == 0
    entries = {entry["item"]: entry for entry in find_provenance(run, predictions=out)["predictions"]}
    assert set(entries) == {"val0", "val1"}
    for item, entry in entries.items():
        assert (entry["csv"], entry["state"]) == (str(out), "same")
        assert entry["records"][AUDIO]["attempt"] == cache.record(AUDIO, item).attempt
    out.write_text(out.read_text() + "\n")
    assert find_provenance(run, "val0", predictions=out)["predictions"][0]["csv_state"] == "changed"


def test_commands_that_need_one_run_reject_an_ensemble(ensemble: Path, capsys) -> None:
    for command in ("evaluate", "report"):
        assert main([command, str(ensemble)]) == 2
        stderr = capsys.readouterr().err
        assert "is an ensemble, not a run" in stderr and "vaflow ensemble" in stderr


def test_runs_that_changed_since_the_ensemble_are_named(
    ensemble: Path, runs: list[Path], cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PredictConfig(device="cpu", cache=cache.path)
    predict_media(ensemble, [], tmp_path / "same", config)
    assert not caplog.records
    write_smoothing(runs[1], Smoothing("mean", 1.0))
    try:
        predict_media(ensemble, [], tmp_path / "changed", config)
    finally:
        write_smoothing(runs[1], None)
    [message] = caplog.messages
    assert message.startswith(f"{runs[1]}: changed since {ensemble} was made")
    assert message.endswith(f"vaflow ensemble {runs[0]} {runs[1]} --out {ensemble}")


def test_predictions_of_an_earlier_ensemble_are_not_those_of_the_present_one(
    runs: list[Path], cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ensemble_runs(runs, tmp_path / "e", split="train", device="cpu")
    write_smoothing(runs[1], Smoothing("mean", 1.0))
    try:
        ensemble_runs(runs, tmp_path / "e", device="cpu")
        caplog.clear()
        predict_media(tmp_path / "e", [], tmp_path / "out", PredictConfig(device="cpu", cache=cache.path))
    finally:
        write_smoothing(runs[1], None)
    assert not caplog.records


def test_an_ensemble_is_moved_together_with_its_runs(
    runs: list[Path], cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for run in runs:
        shutil.copytree(run, first / "runs" / run.name)
    ensemble_runs([first / "runs" / run.name for run in runs], first / "e", device="cpu")
    config = PredictConfig(device="cpu", cache=cache.path)
    predict_media(first / "e", [], tmp_path / "before", config)
    first.rename(second)
    predict_media(second / "e", [], tmp_path / "after", config)
    assert not caplog.records, "the runs have not changed"
    np.testing.assert_array_equal(va(tmp_path / "before/val1.csv"), va(tmp_path / "after/val1.csv"))
    assert {entry["weights_state"] for entry in find_provenance(second / "e")["predictions"]} == {"same"}


def test_missing_runs_of_an_ensemble_are_named(runs: list[Path], tmp_path: Path, capsys) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    ensemble_runs([runs[1], tmp_path / "run"], tmp_path / "e", device="cpu")
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "e"), "--cache", "c", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"Runs of the ensemble {tmp_path / 'e'} do not exist. Got: {tmp_path / 'run'}." in message


def test_a_run_is_listed_once(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"listed twice\. Got: {runs[0]}\."):
        ensemble_runs([runs[0], runs[1], runs[0] / "." / ""], tmp_path / "e", device="cpu")
    assert not (tmp_path / "e").exists()
