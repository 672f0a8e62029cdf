"""Runs that train together: each equals the same run alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_cache import Toy, make_cache

from vaflow.cache import Cache
from vaflow.errors import CorruptError, DataError
from vaflow.train.config import TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.loop import Progress, fit, save_checkpoint
from vaflow.train.session import Data, load_data, new_model
from vaflow.train.storage import read_tensors
from vaflow.train.together.choice import Choice, choose
from vaflow.train.together.compatible import batches_of
from vaflow.train.together.epochs import Member, fit_together
from vaflow.train.together.runs import train_together
from vaflow.train.training import Result, train_run

CPU = torch.device("cpu")
BASE = TrainConfig(hidden=8, attention_heads=2, lr=1e-3, batch_size=4, epochs=3, device="cpu")
# Runs of one architecture that differ in every setting that may differ.
RUNS: tuple[dict[str, Any], ...] = (
    {"seed": 0},
    {"seed": 1, "epochs": 2, "warmup": 0.5, "clip_norm": 0.1, "weight_decay": 0.1, "best": "each"},
    {"seed": 2, "lr": 3e-3, "schedule": "cosine", "clip_norm": 1.0, "sigma": 0.6, "centers": 1.0, "kl_weight": 0.4},
)
DROPOUT = ({"dropout": 0.1}, {"dropout": 0.0}, {"dropout": 0.4, "modality_dropout": 0.3})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    toy = Toy(splits={"train": 3, "val": 2}, seconds=(8, 14))
    return make_cache(tmp_path_factory.mktemp("together") / "cache", toy)


def configs(cache: Cache, *, runs: Sequence[dict[str, Any]] = RUNS, **settings: Any) -> list[TrainConfig]:
    drops = [{}] * len(runs) if settings.get("temporal") == "transformer" else DROPOUT
    settings = {"dropout": 0.0, **settings}
    every = [replace(BASE, **{**settings, **run, **drop}) for run, drop in zip(runs, drops, strict=False)]
    return [resolve(cache, config)[0] for config in every]


def read(cache: Cache, config: TrainConfig) -> Data:
    return load_data(cache, config, resolve(cache, config)[1])


def alone(cache: Cache, data: Data, config: TrainConfig) -> tuple[dict[str, torch.Tensor], Progress]:
    model = new_model(config, resolve(cache, config)[1], data, CPU)
    progress = fit(model, data.train, data.val, config)
    return model.state_dict(), progress


def member(cache: Cache, data: Data, config: TrainConfig, **options: Any) -> Member:
    return Member(new_model(config, resolve(cache, config)[1], data, CPU), config, **options)


def counted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the bias of an attention's keys.

    A softmax does not depend on it, so its gradient is zero but for rounding, which AdamW scales up to the learning
    rate: it differs between any two orders of summation and changes no output.
    """
    if not name.endswith("in_proj_bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def check_equal(run: Member, weights: dict[str, torch.Tensor], progress: Progress) -> None:
    """Weights of the last and of the best epochs to 1e-5, every number of the history to 1e-4."""
    for one, other in (
        (run.model.state_dict(), weights),
        (run.progress.best, progress.best),
        *((run.progress.each[name], progress.each[name]) for name in progress.each),
    ):
        assert one.keys() == other.keys()
        for name in one:
            pair = [counted(name, weights[name]) for weights in (one, other)]
            torch.testing.assert_close(*pair, rtol=0, atol=1e-5, msg=f"{name} differs")
    assert run.progress.best_epoch == progress.best_epoch
    assert len(run.progress.history) == len(progress.history) == run.config.epochs
    for row, expected in zip(run.progress.history, progress.history, strict=True):
        assert list(row) == list(expected)
        for name in row:
            if not name.endswith("_seconds"):
                assert row[name] == pytest.approx(expected[name], abs=1e-4), name


@pytest.mark.parametrize(
    "settings",
    [
        {"temporal": "gru"},
        {"temporal": "lstm", "layers": 2},
        {"temporal": "tcn"},
        {"temporal": "transformer"},
        {"fusion": "attention"},
        {"fusion": "gated"},
        {"fusion": "concat"},
        {"fusion": "attention-concat"},
        {"region_labels": "hard"},
        {"mse_weight": 0.5, "normalize": "layer", "learnable_prompts": True},
        {"attention_positions": "none", "normalize": "l2"},
        {"audio": ("none",)},
        {"uncertainty": "variance", "nll_weight": 0.3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_batched_runs_equal_separate_runs(cache: Cache, settings: dict[str, Any]) -> None:
    runs = configs(cache, **settings)
    data = read(cache, runs[0])
    members = [member(cache, data, config) for config in runs]
    ended = list(fit_together(members, data.train, data.val))
    assert [failure for _, failure in ended] == [None] * len(runs)
    assert ended[0][0] is members[1], "the run with the fewest epochs leaves first"
    for run in members:
        check_equal(run, *alone(cache, data, run.config))


def test_a_nan_in_one_run_does_not_affect_the_others(cache: Cache) -> None:
    runs = configs(cache)
    data = read(cache, runs[0])
    members = [member(cache, data, config) for config in runs]
    with torch.no_grad():
        members[1].model.get_parameter("regression.0.weight")[0, 0] = torch.nan
    failures = {id(run): failure for run, failure in fit_together(members, data.train, data.val)}
    failure = failures.pop(id(members[1]))
    assert isinstance(failure, DataError)
    assert "not finite" in str(failure)
    assert list(failures.values()) == [None, None]
    for run in (members[0], members[2]):
        check_equal(run, *alone(cache, data, run.config))


def test_a_damaged_checkpoint_ends_its_run_only(cache: Cache, tmp_path: Path) -> None:
    runs = configs(cache, runs=RUNS[:2])
    data = read(cache, runs[0])
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"damaged")
    members = [member(cache, data, runs[0], checkpoint=path), member(cache, data, runs[1])]
    (first, failure), (second, no_failure) = fit_together(members, data.train, data.val)
    assert first is members[0]
    assert isinstance(failure, CorruptError)
    assert second is members[1]
    assert no_failure is None


def test_batched_runs_write_the_files_of_separate_runs(cache: Cache, tmp_path: Path) -> None:
    runs = configs(cache)
    data = read(cache, runs[0])
    folders = [tmp_path / f"together{k}" for k in range(len(runs))]
    ended = dict(train_together(cache, list(zip(runs, folders, strict=True)), data))
    for k, (config, folder) in enumerate(zip(runs, folders, strict=True)):
        other = tmp_path / f"alone{k}"
        train_run(cache, config, other, data=data, tensorboard=False, figures=False, keep_checkpoint=False)
        result = ended[k]
        assert isinstance(result, Result)
        check_files(folder, other)
    again = dict(train_together(cache, list(zip(runs, folders, strict=True)), data))
    assert all(isinstance(result, Result) and result.was_done for result in again.values())


def test_interrupting_a_batch_of_runs_gives_the_same_files(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = configs(cache)
    data = read(cache, runs[0])
    whole, parts = ([tmp_path / f"{name}{k}" for k in range(len(runs))] for name in ("whole", "parts"))
    list(train_together(cache, list(zip(runs, whole, strict=True)), data))
    saved: list[Path] = []

    def stop_in_the_second_epoch(path: Path, *state: Any) -> None:
        save_checkpoint(path, *state)
        saved.append(path)
        if len(saved) == len(runs) + 1:  # only the first run has finished its second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vaflow.train.together.epochs.save_checkpoint", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            list(train_together(cache, list(zip(runs, parts, strict=True)), data))
    ended = dict(train_together(cache, list(zip(runs, parts, strict=True)), data))
    assert sorted(ended) == [0, 1, 2]
    for folder, other in zip(parts, whole, strict=True):
        check_files(folder, other)


def check_files(folder: Path, other: Path) -> None:
    """Equal names, weights to 1e-5, and metrics to 1e-4."""
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (folder, other)]
    assert names[0] == names[1]
    assert "checkpoint.safetensors" not in names[0]
    for path in folder.glob("model*.safetensors"):
        one, expected = (read_tensors(run / path.name)[0] for run in (folder, other))
        for name in expected:
            torch.testing.assert_close(counted(name, one[name]), counted(name, expected[name]), rtol=0, atol=1e-5)
    metrics, expected_metrics = (json.loads((run / "metrics.json").read_text()) for run in (folder, other))
    assert metrics["best_epoch"] == expected_metrics["best_epoch"]
    for name in ("ccc", "rmse", "pearson"):
        assert metrics[name] == pytest.approx(expected_metrics[name], abs=1e-4), name


def test_only_runs_of_one_architecture_and_data_train_together() -> None:
    seeds = [replace(BASE, seed=seed) for seed in range(5)]
    tuned = [replace(BASE, lr=1e-2), replace(BASE, sigma=0.6, centers=1.0), replace(BASE, dropout=0.5)]
    for config in tuned:
        assert len(batches_of([BASE, config], lambda c: c)) == 1
    others: list[dict[str, Any]] = [
        *({"hidden": 16}, {"temporal": "tcn"}, {"batch_size": 8}, {"region_labels": "hard"}, {"kl_weight": 0.0}),
        *({"mse_weight": 0.1}, {"audio": ("none",)}, {"folds": 2, "train_split": "rest1of2"}, {"device": "auto"}),
    ]
    for settings in others:
        assert len(batches_of([BASE, replace(BASE, **settings)], lambda c: c)) == 2, settings
    alone_only: list[dict[str, Any]] = [{"finetune": True}, {"temporal": "transformer"}, {"prompt_context": 2}]
    for settings in alone_only:
        runs = [replace(BASE, seed=seed, **settings) for seed in range(2)]
        assert [len(batch) for batch in batches_of(runs, lambda c: c)] == [1, 1], settings
    assert [len(batch) for batch in batches_of(seeds, lambda c: c, processes=2)] == [2, 3]
    many = [replace(BASE, seed=seed) for seed in range(20)]
    assert [len(batch) for batch in batches_of(many, lambda c: c)] == [6, 7, 7]


def test_a_short_training_is_not_measured(cache: Cache) -> None:
    runs = configs(cache)
    choice = choose(cache, runs, read(cache, runs[0]))
    assert not choice.faster
    assert choice.alone == choice.together == 0


def test_measuring_batch_sizes_keeps_random_state_and_returns_times(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaflow.train.together.choice.WORTH_MEASURING", 0)
    runs = configs(cache)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    choice = choose(cache, runs, read(cache, runs[0]))
    assert torch.equal(torch.rand(2), expected)
    assert choice.alone > 0
    assert choice.together > 0
    assert Choice(3, 0.2, 0.1, 600).faster
    assert str(Choice(3, 0.2, 0.1, 600)) == (
        "3 runs train together: about 1.0 min (a step of all: together 100 ms, one after the other 200 ms)"
    )
