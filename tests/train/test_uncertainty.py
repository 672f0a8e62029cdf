"""Standard deviations: likelihood and coverage restated in NumPy; runs, ensembles and exports that have them."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import Toy, make_cache
from toy_batches import toy_batch, toy_model

from vaflow.cache import Cache, open_cache
from vaflow.cli import main
from vaflow.errors import CorruptError, UsageError
from vaflow.train.batch import Output
from vaflow.train.config import TrainConfig
from vaflow.train.ensemble import ensemble_runs, total_deviation
from vaflow.train.evaluate import evaluate_run
from vaflow.train.losses import gaussian_nll, total_loss
from vaflow.train.run_folder import load_run
from vaflow.train.traces import Trace
from vaflow.train.train_run import train_run
from vaflow.train.uncertainty import (
    Calibration,
    ScaleSearch,
    VideoErrors,
    calibrate,
    coverage_of,
    errors_by_video,
    read_calibration,
    uncertainty_report,
)
from vaflow.train.windows import ClipRows

BASE = TrainConfig(hidden=8, attention_heads=2, lr=1e-2, batch_size=8, epochs=2, device="cpu")
VARIANCE = replace(BASE, uncertainty="variance")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    toy = Toy(splits={"train": 4, "val": 4, "test": 2}, seconds=(8.0, 14.0))
    return make_cache(tmp_path_factory.mktemp("uncertain") / "cache", toy)


@pytest.fixture(scope="module")
def runs(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories; training changes nothing in them later except in copies."""
    root = tmp_path_factory.mktemp("runs")
    settings = {"plain": BASE, "variance": VARIANCE, "other": replace(VARIANCE, seed=1, best="each")}
    for name, config in settings.items():
        train_run(cache, config, root / name, tensorboard=False, figures=False)
    return {name: root / name for name in settings}


def gaussian(rng: np.random.Generator, videos: int, factor: float, frames: int = 400) -> list[Trace]:
    """Traces whose errors are Gaussian with `factor` times the standard deviations that they state."""
    traces = []
    for k in range(videos):
        std = rng.uniform(0.05, 0.2, (frames, 2))
        va = np.zeros((frames, 2))
        clip = ClipRows(
            f"clip{k}", f"video{k}", frames / 10, np.arange(frames) / 10,
            va - factor * std * rng.normal(size=std.shape), np.ones((frames, 2), bool), 0, 1,
        )  # fmt: skip
        traces.append(Trace(clip, va, None, std=std))
    return traces


def rows_of(path: Path) -> dict[str, list[str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_likelihood_equals_a_gaussian(beta: float) -> None:
    rng = np.random.default_rng(0)
    mean, target = rng.uniform(-1, 1, (2, 3, 5, 2))
    log_std, mask = rng.uniform(-3, 0.5, mean.shape), rng.random(mean.shape) < 0.6
    target[~mask] = np.nan
    std = np.exp(log_std)
    terms = -np.log(np.exp(-0.5 * ((target - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))) * std ** (2 * beta)
    got = gaussian_nll(*(torch.from_numpy(x) for x in (mean, log_std, target, mask)), beta=beta)
    assert float(got) == pytest.approx(terms[mask].mean(), abs=1e-12)


def test_the_likelihood_trains_only_the_variance_head_by_default() -> None:
    model, batch = toy_model(variance=True), toy_batch()
    for weight in (0.0, 0.5):
        model.zero_grad()
        output = model(batch)
        loss = total_loss(output, batch, kl_weight=0.0, ccc_weight=0.0, nll_weight=weight)[0]
        loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {name for name in reached if name.startswith("variance.")}
        assert any(name.startswith("regression.") for name in reached) == bool(weight)


def test_packed_outputs_contain_standard_deviations() -> None:
    output = toy_model(variance=True)(toy_batch())
    again = Output.unpacked(output.packed(), regions=9, extra={}, variance=True)
    assert output.log_std is not None and again.log_std is not None
    assert torch.equal(again.log_std, output.log_std) and torch.equal(again.va, output.va)
    inside = toy_batch().inside
    std = output.log_std.exp()[inside]
    assert std.min() > 0.02 and std.max() < 2
    assert not output.log_std[~inside].any(), "padding"


def test_a_variance_head_does_not_change_predictions(runs: dict[str, Path]) -> None:
    for file in sorted((runs["plain"] / "predictions/val").glob("*.csv")):
        plain, other = rows_of(file), rows_of(runs["variance"] / "predictions/val" / file.name)
        assert list(other) == [*list(plain)[:-1], "valence_std", "arousal_std", "far_from_training", "interpolated"]
        assert all(other[name] == plain[name] for name in plain)


def test_variance_settings_are_not_recorded_without_a_variance_head(runs: dict[str, Path]) -> None:
    assert not {"uncertainty", "nll_weight"} & set(BASE.as_dict())
    assert VARIANCE.as_dict()["uncertainty"] == "variance"
    for name in ("uncertainty.json", "training_features.safetensors"):
        assert (runs["variance"] / name).is_file() and not (runs["plain"] / name).exists()
    assert "loss_nll" in (runs["variance"] / "history.csv").read_text()
    assert "loss_nll" not in (runs["plain"] / "history.csv").read_text()


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_calibration_recovers_the_factor_of_gaussian_errors(factor: float) -> None:
    traces = gaussian(np.random.default_rng(1), 8, factor)
    calibration = calibrate(traces, "val")
    assert calibration.factors == pytest.approx([factor, factor], rel=0.06)
    report = uncertainty_report([calibration.apply(t) for t in traces], "test", "val")
    for name in ("valence", "arousal"):
        for level, share in report["coverage"][name].items():
            assert share == pytest.approx(int(level) / 100, abs=0.03)


def test_runs_that_agree_have_a_calibrated_constant_deviation() -> None:
    """An ensemble of plain runs has no deviation where one run has all the weight."""
    traces = [replace(trace, std=np.zeros_like(trace.va)) for trace in gaussian(np.random.default_rng(3), 6, 1.0)]
    calibration = calibrate(traces, "val")
    applied = [calibration.apply(trace) for trace in traces]
    for k in range(2):
        assert coverage_of(errors_by_video(applied, k))["80"] == pytest.approx(0.8, abs=0.03)


def test_coverage_is_averaged_over_videos() -> None:
    rng = np.random.default_rng(2)
    videos = [VideoErrors(rng.normal(size=n), rng.uniform(0.5, 2, n)) for n in (10, 1000, 37)]
    for level, z in (("50", 0.6744897501960817), ("80", 1.2815515655446004), ("95", 1.959963984540054)):
        shares = [np.mean([abs(e) <= z * 1.3 * s for e, s in zip(v.error, v.std, strict=True)]) for v in videos]
        assert coverage_of(videos, 1.3)[level] == pytest.approx(np.mean(shares))


def test_calibration_on_the_scored_split_leaves_one_video_out() -> None:
    (odd,) = gaussian(np.random.default_rng(4), 1, 5.0)
    traces = [*gaussian(np.random.default_rng(3), 3, 1.0), replace(odd, clip=replace(odd.clip, group="odd"))]
    for k, name in enumerate(("valence", "arousal")):
        videos = errors_by_video(traces, k)
        expected = dict.fromkeys(("50", "80", "95"), 0.0)
        for v, video in enumerate(videos):
            others = ScaleSearch.of([w for u, w in enumerate(videos) if u != v]).best()
            for level, share in coverage_of([video], others).items():
                expected[level] += float(share or 0) / len(videos)
        got = uncertainty_report(traces, "val", "val")["coverage"][name]
        assert got == pytest.approx(expected, abs=0.01)
        assert got["95"] < 0.9, "the odd video is not covered by an interval that it widened"
    assert uncertainty_report(traces[:1], "val", "val")["coverage"]["valence"]["95"] is None, "one video"


def test_metrics_contain_the_coverage_of_written_standard_deviations(runs: dict[str, Path], cache: Cache) -> None:
    report = evaluate_run(runs["variance"], cache, "test", device="cpu")
    metrics = json.loads((runs["variance"] / "metrics.json").read_text())
    assert metrics["uncertainty"]["calibrated_on"] == "val"
    shares = []
    for file in sorted((runs["variance"] / "predictions/test").glob("*.csv")):
        rows = rows_of(file)
        pairs = [
            abs(float(v) - float(y)) <= 1.2815515655446004 * float(s)
            for v, y, s in zip(rows["valence"], rows["label_valence"], rows["valence_std"], strict=True)
            if y
        ]
        shares.append(np.mean(pairs))
    assert report["coverage"]["valence"]["80"] == pytest.approx(np.mean(shares), abs=2e-3)
    assert report["uncertainty"]["held_out"] == "calibrated on split val"


def test_coverage_in_another_cache_is_that_of_the_written_intervals(
    runs: dict[str, Path], cache: Cache, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs["variance"], tmp_path / "run"))
    other = make_cache(tmp_path / "other", Toy(splits={"train": 1, "val": 3}, seconds=(8.0, 14.0), seed=7))
    report = evaluate_run(run, other, device="cpu")
    assert report["uncertainty"]["held_out"] == "calibrated on split val of the training cache"
    shares = []
    for file in (run / "predictions" / "val").glob("*.csv"):
        rows = [row for row in csv.DictReader(file.open()) if row["label_arousal"]]
        table = np.array([[float(row[name]) for name in ("arousal", "label_arousal", "arousal_std")] for row in rows])
        shares.append(np.mean(np.abs(table[:, 0] - table[:, 1]) <= 1.2815515655446004 * table[:, 2]))
    assert report["coverage"]["arousal"]["80"] == pytest.approx(np.mean(shares), abs=2e-3)
    copy = open_cache(shutil.copytree(cache.path, tmp_path / "copy"))
    assert evaluate_run(run, copy, device="cpu")["uncertainty"]["held_out"] == "each video is calibrated on the others"


def test_smoothing_recalibrates_standard_deviations(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs["variance"], tmp_path / "run"))
    before = read_calibration(run)
    assert main(["smooth", str(run), "--kind", "mean", "--seconds", "2"]) == 0
    after = read_calibration(run)
    assert before is not None and after is not None
    assert after.smoothing == {"kind": "mean", "seconds": 2.0} and not before.smoothing
    assert main(["evaluate", str(run), "--json"]) == 0
    assert "coverage" in json.loads((run / "metrics.json").read_text())
    (run / "smoothing.json").unlink()
    assert load_run(run).calibration is None, "it was made for another smoothing"
    capsys.readouterr()
    assert main(["evaluate", str(runs["variance"]), "--smooth", "mean", "--smooth-seconds", "2", "--json"]) == 0
    assert "coverage" not in json.loads(capsys.readouterr().out)


def test_an_ensemble_follows_the_law_of_total_variance(runs: dict[str, Path], tmp_path: Path, cache: Cache) -> None:
    one, other = gaussian(np.random.default_rng(5), 1, 1.0)[0], gaussian(np.random.default_rng(6), 1, 1.0)[0]
    other = replace(other, va=other.va + 0.3)
    weights = np.array([[0.25, 0.5], [0.75, 0.5]])
    mean = weights[0] * one.va + weights[1] * other.va
    assert one.std is not None and other.std is not None
    second_moment = weights[0] * (one.std**2 + one.va**2) + weights[1] * (other.std**2 + other.va**2)
    got = total_deviation([one, other], weights, mean)
    np.testing.assert_allclose(got, np.sqrt(second_moment - mean**2), atol=1e-12)  # type: ignore[arg-type]
    _, metrics = ensemble_runs([runs["variance"], runs["other"], runs["plain"]], tmp_path / "both", device="cpu")
    assert set(metrics["coverage"]["valence"]) == {"50", "80", "95"}
    assert read_calibration(tmp_path / "both") is not None
    command = ["predict", str(tmp_path / "both"), "--cache", str(cache.place), "--out", str(tmp_path / "csv"), "--json"]
    assert main(command) == 0
    assert rows_of(tmp_path / "csv/val0.csv").keys() >= {"valence_std", "arousal_std", "far_from_training"}
    assert rows_of(tmp_path / "csv/val0.csv") == rows_of(tmp_path / "both/predictions/val/val0.csv")


def test_an_exported_run_keeps_its_calibration(runs: dict[str, Path], tmp_path: Path) -> None:
    assert main(["export", str(runs["variance"]), str(tmp_path / "shared")]) == 0
    shared = load_run(tmp_path / "shared")
    assert shared.calibration == read_calibration(runs["variance"]) and shared.training_features is not None


def test_frames_between_samples_are_marked(runs: dict[str, Path]) -> None:
    rows = rows_of(runs["plain"] / "predictions/val/val0.csv")
    samples = {round(k * 0.5, 6) for k in range(100)}  # 8 frames in windows of 4 s, starts on the same grid
    on_grid = [round(float(t), 6) in samples for t in rows["time"]]
    marked = [flag == "0" for flag in rows["interpolated"]]
    assert sum(marked) > 10 and all(grid for grid, mark in zip(on_grid, marked, strict=True) if mark)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"scale": {"valence": 0, "arousal": 1}, "split": "val", "videos": 1}', "{"]
)
def test_a_damaged_calibration_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "uncertainty.json").write_text(text)
    with pytest.raises(CorruptError, match=r"uncertainty\.json"):
        read_calibration(tmp_path)


def test_nll_weight_requires_a_variance_head() -> None:
    with pytest.raises(UsageError, match="uncertainty=variance"):
        TrainConfig(nll_weight=1.0)


def test_a_dimension_without_labels_is_not_calibrated() -> None:
    traces = gaussian(np.random.default_rng(7), 2, 1.0)
    for trace in traces:
        trace.clip.valid[:, 1] = False
    calibration = calibrate(traces, "val")
    assert calibration.scale["arousal"] is None and calibration.factors[1] == 1
    assert uncertainty_report(traces, "val", "val")["coverage"]["arousal"] == {"50": None, "80": None, "95": None}
    assert Calibration(**json.loads(json.dumps(vars(calibration)))) == calibration
