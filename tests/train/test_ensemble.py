"""Ensembles: weights equal brute force and SciPy, traces equal manual sums."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache
from vaflow.errors import CorruptError, UsageError
from vaflow.train.config import TrainConfig
from vaflow.train.ensemble import best_weights, combine, concordance_weights, ensemble_runs, onto_simplex
from vaflow.train.evaluate import evaluate_run
from vaflow.train.run_folder import RunFolder, load_run
from vaflow.train.submit import submit_run
from vaflow.train.train_run import train_run

CONFIG = TrainConfig(hidden=8, attention_heads=2, lr=1e-2, batch_size=8, epochs=2, device="cpu")


def ccc(x: np.ndarray, y: np.ndarray) -> float:
    return 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def opinions(runs: int, seed: int, frames: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Predictions with noise, shrinkage, bias and common errors."""
    rng = np.random.default_rng(seed)
    label = np.cumsum(rng.normal(size=frames)) / 15
    common = rng.normal(size=frames) * 0.2
    scale, bias = rng.uniform(0.1, 1.2, runs), rng.normal(scale=0.2, size=runs)
    errors = rng.normal(size=(frames, runs)) * rng.uniform(0.05, 0.8, runs)
    return label[:, None] * scale + bias + errors + common[:, None], label


@pytest.mark.parametrize("seed", range(6))
def test_weights_of_two_runs_equal_a_fine_grid_search(seed: int) -> None:
    x, y = opinions(2, seed)
    weights = best_weights(x, y)
    grid = max(ccc(x @ [w, 1 - w], y) for w in np.linspace(0, 1, 2001))
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    assert ccc(x @ weights, y) >= grid - 1e-9


@pytest.mark.parametrize(("runs", "seed"), [(3, 0), (5, 1), (5, 2), (9, 3)])
def test_weights_of_more_runs_equal_scipy_with_many_starts(runs: int, seed: int) -> None:
    x, y = opinions(runs, seed)
    starts = np.random.default_rng(0).dirichlet(np.ones(runs), 20)
    best = max(
        -minimize(
            lambda w: -ccc(x @ w, y),
            start,
            bounds=[(0, 1)] * runs,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14},
        ).fun
        for start in starts
    )
    assert ccc(x @ best_weights(x, y), y) == pytest.approx(best, abs=1e-6)


def test_identical_and_useless_runs_are_weighted_sensibly() -> None:
    x, y = opinions(1, 4)
    same = best_weights(np.repeat(x, 3, axis=1), y)
    assert same.sum() == pytest.approx(1) and same.min() >= 0
    assert best_weights(x, y).tolist() == [1.0]
    wrong = best_weights(np.stack([-y, -0.1 * y], axis=1), y)  # negative for all weights: the least negative is chosen
    assert wrong.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="best_weights"):
        best_weights(x, y[:-1])


def test_weights_in_proportion_to_concordance() -> None:
    assert concordance_weights(np.array([0.6, 0.2, -0.3])).tolist() == pytest.approx([0.75, 0.25, 0])
    assert concordance_weights(np.array([-0.6, -0.2])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_projection_is_the_nearest_point_of_the_simplex(seed: int) -> None:
    rng = np.random.default_rng(seed)
    point = rng.normal(size=4) * 2
    projected = onto_simplex(point)
    others = rng.dirichlet(np.full(4, 0.5), 5000)
    assert projected.sum() == pytest.approx(1) and projected.min() >= 0
    assert np.linalg.norm(others - point, axis=1).min() >= np.linalg.norm(projected - point) - 1e-9


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("ensemble") / "cache", Toy(seconds=(8, 14)))


@pytest.fixture(scope="module")
def runs(cache: Cache, tmp_path_factory) -> list[Path]:
    """Of different streams and windows."""
    folder = tmp_path_factory.mktemp("runs")
    configs = [
        CONFIG,
        replace(CONFIG, seed=1, audio=("none",), window=6.0, stride=2.0, frames=12),
        replace(CONFIG, seed=2, visual=("none",), kl_weight=0.0),
    ]
    for k, config in enumerate(configs):
        train_run(cache, config, folder / str(k), tensorboard=False, figures=False)
    return [folder / str(k) for k in range(len(configs))]


def predictions(folder: Path, split: str = "val") -> dict[str, np.ndarray]:
    """Item -> frame, time, valence, arousal, and the labels."""
    tables = {}
    for path in sorted((folder / "predictions" / split).glob("*.csv")):
        tables[path.stem] = np.genfromtxt(path, delimiter=",", skip_header=1)
    return tables


@pytest.mark.parametrize("how", ["mean", "ccc", "search"])
def test_an_ensemble_of_one_equals_the_run(runs: list[Path], tmp_path: Path, how: str) -> None:
    _, metrics = ensemble_runs(runs[:1], tmp_path / "one", how, device="cpu")
    run_metrics = RunFolder(runs[0]).read_metrics()
    for key in set(run_metrics) - {"best_epoch", "epochs", "warnings"}:
        assert metrics[key] == run_metrics[key], key
    assert json.loads((tmp_path / "one" / "metrics.json").read_text()) == metrics
    for item in ("val0", "val1", "val2"):
        name = Path("predictions", "val", f"{item}.csv")
        assert (tmp_path / "one" / name).read_text() == (runs[0] / name).read_text()


@pytest.mark.parametrize("how", ["mean", "ccc", "search"])
def test_an_ensemble_is_the_weighted_mean_of_its_runs(runs: list[Path], tmp_path: Path, how: str) -> None:
    made, metrics = ensemble_runs(runs, tmp_path / "all", how, device="cpu")
    assert made.table.shape == (3, 2) and made.table.min() >= 0
    np.testing.assert_allclose(made.table.sum(axis=0), 1)
    parts, combined = [predictions(run) for run in runs], predictions(tmp_path / "all")
    for item, rows in combined.items():
        expected = sum(made.table[k] * part[item][:, 2:4] for k, part in enumerate(parts))
        np.testing.assert_allclose(rows[:, 2:4], expected, atol=2e-6)  # of numbers with six digits
    run_scores = [RunFolder(run).read_metrics()["ccc"] for run in runs]
    for k, name in enumerate(("valence", "arousal")):
        scores = np.clip([one[name] for one in run_scores], 0, None)
        assert json.loads((tmp_path / "all" / "ensemble.json").read_text())["weights"][name] == list(made.table[:, k])
        if how == "ccc" and scores.sum() > 0:
            np.testing.assert_allclose(made.table[:, k], scores / scores.sum(), atol=1e-9)
        if how == "search":
            assert metrics["ccc"][name] >= max(one[name] for one in run_scores) - 1e-6
    assert ("weights were tuned on this split" in " ".join(metrics["warnings"])) == (how == "search")
    assert "regions" not in metrics  # one run has no prompt head


def test_weights_can_be_tuned_on_another_split(runs: list[Path], tmp_path: Path) -> None:
    made, metrics = ensemble_runs(runs, tmp_path / "e", "search", weights_split="train", device="cpu")
    assert made.weights_split == "train" and metrics["split"] == "val"
    _, on_train = ensemble_runs(runs, tmp_path / "t", "search", split="train", weights_split="train", device="cpu")
    assert on_train["ensemble"]["weights_split"] == "train"
    assert not any("found on" in warning for warning in metrics["warnings"])


def test_an_ensemble_can_overwrite_only_an_ensemble_directory(runs: list[Path], tmp_path: Path) -> None:
    ensemble_runs(runs[:2], tmp_path / "e", device="cpu")
    ensemble_runs(runs, tmp_path / "e", device="cpu")
    assert len(json.loads((tmp_path / "e" / "ensemble.json").read_text())["runs"]) == 3
    with pytest.raises(UsageError, match="is a run directory"):
        ensemble_runs(runs, runs[0], device="cpu")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    with pytest.raises(UsageError, match="is not empty and is not a run directory"):
        ensemble_runs(runs, tmp_path / "photos", device="cpu")


def test_predictions_of_an_ensemble_are_of_one_evaluation(cache: Cache, runs: list[Path], tmp_path: Path) -> None:
    fewer = make_cache(tmp_path / "fewer", Toy(seconds=(8, 14), splits={"train": 1, "val": 2}))
    for used in (cache, fewer):
        ensemble_runs(runs[:2], tmp_path / "e", cache=used, device="cpu")
        names = {path.stem for path in (tmp_path / "e" / "predictions" / "val").glob("*.csv")}
        assert names == set(used.items(split="val"))


def test_an_ensemble_can_be_submitted(runs: list[Path], cache: Cache, tmp_path: Path) -> None:
    ensemble_runs(runs, tmp_path / "e", "ccc", device="cpu")
    sample = tmp_path / "sample.txt"
    sample.write_text("image_location,valence,arousal\nval1/00007.jpg,0,0\nval0/00001.jpg,0,0\n")
    submit_run(tmp_path / "e", cache, sample, tmp_path / "out.txt", device="cpu")
    predicted = predictions(tmp_path / "e")
    lines = [line.split(",") for line in (tmp_path / "out.txt").read_text().splitlines()[1:]]
    for (_, *written), expected in zip(lines, (predicted["val1"][6], predicted["val0"][0]), strict=True):
        np.testing.assert_allclose([float(x) for x in written], expected[2:4], atol=1e-6)
    (tmp_path / "e" / "ensemble.json").write_text("{")
    with pytest.raises(CorruptError, match=r"ensemble\.json"):
        submit_run(tmp_path / "e", cache, sample, tmp_path / "out.txt", device="cpu")


def test_invalid_ensembles_are_rejected(runs: list[Path], cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'search'"):
        ensemble_runs(runs, tmp_path / "e", "serch", device="cpu")
    with pytest.raises(UsageError, match="not a run directory"):
        ensemble_runs([tmp_path / "absent"], tmp_path / "e", device="cpu")
    fold = replace(CONFIG, folds=3, fold=1, epochs=1)
    train_run(cache, fold, tmp_path / "fold", tensorboard=False, figures=False)
    with pytest.raises(UsageError, match="--split, a split that none of them was trained on"):
        ensemble_runs([runs[0], tmp_path / "fold"], tmp_path / "e", device="cpu")


def test_a_split_for_equal_weights_is_rejected(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only for --weights ccc and search"):
        ensemble_runs(runs, tmp_path / "e", weights_split="train", device="cpu")
    assert not (tmp_path / "e").exists()


def test_region_probabilities_are_averaged(runs: list[Path], cache: Cache) -> None:
    from vaflow.train.data import load_split

    loaded = [load_run(run) for run in runs[:2]]
    traces_of_runs = [
        list(run.traces(load_split(cache, "val", run.record.streams, run.record.config))) for run in loaded
    ]
    weights = np.array([[0.3, 0.5], [0.7, 0.5]])
    for mixed, one, other in zip(combine(traces_of_runs, weights), *traces_of_runs, strict=True):
        assert one.regions is not None and other.regions is not None
        np.testing.assert_allclose(mixed.regions, 0.4 * one.regions + 0.6 * other.regions)


def test_runs_that_divide_a_split_differently_are_rejected(cache: Cache, tmp_path: Path) -> None:
    rows = [f"{item},{k % 2}" for k, item in enumerate(reversed(cache.items()))]
    (tmp_path / "groups.csv").write_text("\n".join(["item,speaker", *rows]) + "\n")
    for name, groups in (("a", ""), ("b", f"{tmp_path / 'groups.csv'}:speaker")):
        config = replace(CONFIG, epochs=1, folds=2, fold_groups=groups)
        train_run(cache, config, tmp_path / name, tensorboard=False, figures=False)
    for how in ("mean", "search"):
        with pytest.raises(UsageError, match=r"other clips in split 'fold1of2'.*--fold-groups"):
            ensemble_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "e", how, device="cpu")


def test_an_ensemble_warns_of_clips_that_its_runs_were_trained_on(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 2, "val": 2}, seconds=(6, 8)))
    for item in cache.items():
        labels = cache.read("labels", item)
        cache.drop("labels", item)
        cache.write("labels", item, labels.arrays, meta=labels.meta, source={"video": {"blake2b": item * 8}})
    for fold in (1, 2):
        config = replace(CONFIG, epochs=1, folds=2, fold=fold)
        train_run(cache, config, tmp_path / str(fold), tensorboard=False, figures=False)
    _, report = ensemble_runs([tmp_path / "1", tmp_path / "2"], tmp_path / "e", split="val", device="cpu")
    for name in ("1", "2"):
        begin = f"{tmp_path / name}: val shares recordings with the training split"
        assert [text.startswith(begin) for text in report["warnings"]].count(True) == 1
    _, report = ensemble_runs([tmp_path / "1"], tmp_path / "e", device="cpu")
    assert not any("recordings" in text for text in report["warnings"])


def test_predictions_of_an_ensemble_do_not_leave_its_directory(runs: list[Path], tmp_path: Path) -> None:
    ensemble_runs(runs, tmp_path / "e", device="cpu")
    shutil.rmtree(tmp_path / "e" / "predictions")
    (tmp_path / "e" / "predictions").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UsageError, match="Remove the link"):
        ensemble_runs(runs, tmp_path / "e", device="cpu")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_weights_are_chosen_on_scored_clips(runs: list[Path], tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 2, "val": 3}, seconds=(8, 14)))
    for stream in (VISUAL, AUDIO):
        cache.drop(stream, "val0")
    made, _ = ensemble_runs(runs, tmp_path / "e", "ccc", cache=cache, allow_missing=True, device="cpu")
    scores = [evaluate_run(run, cache, allow_missing=True, write=False, device="cpu")["ccc"] for run in runs]
    assert made.scores is not None
    for name in ("valence", "arousal"):
        assert made.scores[name] == pytest.approx([score[name] for score in scores])
