"""Batched runs equal separate runs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, LOGMEL, StreamInfo
from vaflow.errors import CorruptError, DataError
from vaflow.files import read_tensors
from vaflow.train.batch import BINARY, CLASSES, Batch
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.data import Data, LoadedSplits, data_key, load_data
from vaflow.train.heads import NORMALIZE
from vaflow.train.heads.fusion import FUSION, POSITIONS
from vaflow.train.heads.temporal import TEMPORAL
from vaflow.train.inputs import resolve
from vaflow.train.repeats import FOLD, VARYING, Choice, Trainer, batches_of, choose
from vaflow.train.session import new_model
from vaflow.train.stacked_loop import Member, fit_together, take_step
from vaflow.train.stacked_models import StackedModels
from vaflow.train.train_run import Result
from vaflow.train.training_loop import Progress, fit, save_checkpoint
from vaflow.train.windows import gather_each

CPU = torch.device("cpu")
BASE = TrainConfig(hidden=8, attention_heads=2, lr=1e-3, batch_size=4, epochs=3, device="cpu")
# Runs of one architecture that differ in every setting that may vary.
RUNS: tuple[dict[str, Any], ...] = (
    {"seed": 2, "lr": 3e-3, "schedule": "cosine", "clip_norm": 1.0, "sigma": 0.6, "centers": 1.0, "kl_weight": 0.4},
    {"seed": 1, "epochs": 2, "warmup": 0.5, "clip_norm": 0.1, "best": "each", "ccc_weight": 0.7, "extra_weight": 0.2},
    {"seed": 0, "weight_decay": 0.1},
)
DROPOUT = ({"dropout": 0.4, "modality_dropout": 0.3}, {"dropout": 0.0}, {"dropout": 0.1})

# Settings that decide the architecture, the data or the terms of the loss, with the values that `ablate` and `search`
# can give them; each is trained in a batch and alone. Registries are read, so that a new entry is tested, too.
CASES: dict[str, Sequence[Any]] = {
    "temporal": tuple(TEMPORAL),
    "fusion": tuple(FUSION),
    "normalize": tuple(NORMALIZE),
    "attention_positions": POSITIONS,
    "visual": (("none",),),
    "audio": (("none",), (LOGMEL,), (AUDIO, LOGMEL)),
    "text": (),  # as `prompts`, which may differ within a batch
    "layers": (2,),
    "causal": (False,),
    "learnable_prompts": (True,),
    "region_labels": ("hard",),
    "mse_weight": (0.5,),
    "uncertainty": ("variance",),
    "nll_weight": (0.3,),
    "kl_weight": (0.0,),
    "extra_targets": (("units", "classes"),),
    "label_reduction": ("mean",),
    "attention_heads": (4,),
    "hidden": (12,),
    "batch_size": (5,),
    "window": (3.0,),
    "stride": (),  # these two change the windows as `window` does
    "frames": (),
    "audio_steps": (4,),
    "epochs": (AUTO,),
    "folds": (2,),
}
OTHERS = {
    # masks of the loaded clips, equal in a batch
    *("min_face_quality", "speech_mask"),
    # no effect on what is computed in a batch
    *("device", "deterministic", "shared_sources", "fold_splits", "fold_groups"),
    # fine-tuning and learned context vectors, which never train in a batch
    *("finetune", "backbone_lr", "finetune_blocks", "accumulate", "augment", "checkpointing", "precision", "init"),
    *("prompt_context", "text_weights"),
}
WITH: dict[str, dict[str, Any]] = {
    "layers": {"temporal": "lstm"},
    "nll_weight": {"uncertainty": "variance"},
    "causal": {"temporal": "tcn"},
    "epochs": {"patience": 1, "schedule": "constant", "lr": 1e-9},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    toy = Toy(splits={"train": 2, "val": 2}, seconds=(7, 9), logmel=True)
    cache = make_cache(tmp_path_factory.mktemp("together") / "cache", toy)
    rng = np.random.default_rng(1)
    for name, task, width in (("units", BINARY, 3), ("classes", CLASSES, 2)):
        names = [f"{name}{k}" for k in range(width)]
        cache.declare(StreamInfo(name, "targets", 0, "float32", {"task": task, "names": names}))
        for item in cache.items():
            time = cache.read(LABELS, item).time
            value = np.eye(width, dtype=np.float32)[rng.integers(0, width, len(time))]
            cache.write(name, item, {"time": time, "value": value, "valid": np.ones(value.shape, bool)})
    return cache


def configs(cache: Cache, *, runs: Sequence[dict[str, Any]] = RUNS, **settings: Any) -> list[TrainConfig]:
    drops = [{}] * len(runs) if settings.get("temporal") == "transformer" else DROPOUT
    settings = {"dropout": 0.0, **settings}
    every = [replace(BASE, **{**run, **drop, **settings, **drop}) for run, drop in zip(runs, drops, strict=False)]
    return [resolve(cache, config)[0] for config in every]


def alone(cache: Cache, data: Data, config: TrainConfig) -> tuple[dict[str, torch.Tensor], Progress]:
    model = new_model(config, resolve(cache, config)[1], data, CPU)
    progress = fit(model, data.train, data.val, config)
    return model.state_dict(), progress


def members_of(cache: Cache, runs: Sequence[TrainConfig], **options: Any) -> list[Member]:
    loaded = LoadedSplits(cache)
    members = []
    for config in runs:
        data = loaded.data(config)
        members.append(Member(new_model(config, resolve(cache, config)[1], data, CPU), config, data, **options))
    return members


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
    assert len(run.progress.history) == len(progress.history) > 0
    for row, expected in zip(run.progress.history, progress.history, strict=True):
        assert list(row) == list(expected)
        for name in row:
            if not name.endswith("_seconds"):
                assert row[name] == pytest.approx(expected[name], abs=1e-4), name


@pytest.mark.parametrize(
    "settings",
    [{name: value} for name, values in CASES.items() for value in values],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_batched_runs_equal_separate_runs(cache: Cache, settings: dict[str, Any]) -> None:
    (name,) = settings
    every = RUNS if name == "temporal" else [run | {"epochs": 2 - k} for k, run in enumerate(RUNS[:2])]
    runs = configs(cache, runs=every, **{**settings, **WITH.get(name, {})})
    if name == "folds":
        runs = [resolve(cache, replace(config, fold=1 + k % 2))[0] for k, config in enumerate(runs)]
    assert len(batches_of(runs, lambda config: config)) == 1
    members = members_of(cache, runs)
    ended = list(fit_together(members))
    assert [failure for _, failure in ended] == [None] * len(runs)
    loaded = LoadedSplits(cache)
    for run in members:
        check_equal(run, *alone(cache, loaded.data(run.config), run.config))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"extra_targets": ("units", "classes")}, id="further targets"),
        pytest.param({"temporal": "tcn", "audio": ("none",)}, id="tcn", marks=pytest.mark.slow),
    ],
)
def test_captured_steps_equal_dispatched_steps(cache: Cache, settings: dict[str, Any]) -> None:
    """The same bits, with dropout, for all runs and for some."""
    sizes = [(range(3), 4), (range(3), 4), (range(3), 4), ([0, 2], 4)]
    results = []
    for capture_after in (1, 1000):
        members = members_of(cache, configs(cache, **settings))
        stack = StackedModels([m.model for m in members], [m.config for m in members], capture_after)
        for generator in stack.generators:
            generator.manual_seed(5)
        steps = []
        for step, (runs, size) in enumerate(sizes):
            sets = [members[run].data.train for run in runs]
            batch = gather_each(sets, [torch.arange(size) + k for k in range(len(sets))])
            steps += take_step(stack, members, runs, batch, step)
        results.append((steps, [member.model.state_dict() for member in members]))
    captured, dispatched = results
    torch.testing.assert_close(captured, dispatched, rtol=0, atol=0)


def test_every_setting_that_may_vary_is_tested() -> None:
    """A new setting is a case above, or one that may differ within a batch, or it never trains in a batch."""
    varying = VARYING | FOLD
    assert {field.name for field in fields(TrainConfig)} == varying | CASES.keys() | OTHERS
    assert varying - FOLD - {"prompts", "patience", "mse_weight", "nll_weight"} <= {
        name for run in (*RUNS, *DROPOUT) for name in run
    }


def test_runs_with_other_data_settings_do_not_share_loaded_clips() -> None:
    other: dict[str, Any] = {"min_face_quality": 0.5, "speech_mask": True, "window": 3.0, "label_reduction": "mean"}
    for name, value in {**other, "visual": (VISUAL,), "train_split": "x", "extra_targets": ("units",)}.items():
        assert data_key(replace(BASE, **{name: value})) != data_key(BASE), name
    assert data_key(replace(BASE, seed=5, lr=0.1, prompts="other", modality_dropout=0.3)) == data_key(BASE)


def test_folds_share_rows_and_equal_separately_loaded_folds(cache: Cache) -> None:
    loaded, config = LoadedSplits(cache), replace(BASE, folds=3)
    folds = [loaded.data(resolve(cache, replace(config, fold=k))[0]) for k in (1, 2)]
    assert folds[0].train.tables[VISUAL].rows is folds[1].val.tables[VISUAL].rows
    resolved, inputs = resolve(cache, replace(config, fold=2))
    expected = load_data(cache, resolved, inputs)
    for windows, other in ((folds[1].train, expected.train), (folds[1].val, expected.val)):
        assert [clip.item for clip in windows.clips] == [clip.item for clip in other.clips]
        assert [(clip.first, clip.last) for clip in windows.clips] == [(c.first, c.last) for c in other.clips]
        assert np.array_equal(windows.sample_time, other.sample_time)
        for name in (VISUAL, AUDIO):
            torch.testing.assert_close(windows.statistics(name), other.statistics(name))
        ids = torch.arange(len(other))
        batch, reference = windows.gather(ids), other.gather(ids)
        for part in fields(Batch):
            torch.testing.assert_close(getattr(batch, part.name), getattr(reference, part.name), rtol=0, atol=0)


def test_a_nan_in_one_run_does_not_affect_the_others(cache: Cache) -> None:
    members = members_of(cache, configs(cache))
    with torch.no_grad():
        members[1].model.get_parameter("regression.0.weight")[0, 0] = torch.nan
    failures = {id(run): failure for run, failure in fit_together(members)}
    failure = failures.pop(id(members[1]))
    assert isinstance(failure, DataError)
    assert "not finite" in str(failure)
    assert list(failures.values()) == [None, None]
    for run in (members[0], members[2]):
        check_equal(run, *alone(cache, run.data, run.config))


def test_a_damaged_checkpoint_ends_its_run_only(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"damaged")
    members = members_of(cache, configs(cache, runs=RUNS[:2]))
    members[0].checkpoint = path
    (first, failure), (second, no_failure) = fit_together(members)
    assert first is members[0]
    assert isinstance(failure, CorruptError)
    assert second is members[1]
    assert no_failure is None


def train_all(cache: Cache, runs: Sequence[TrainConfig], folders: Sequence[Path], mode: str = "always") -> list[Result]:
    ended = dict(Trainer(cache, together=mode).train(list(zip(runs, folders, strict=True))))
    results = [ended[k] for k in range(len(runs))]
    assert all(isinstance(result, Result) for result in results)
    return results  # type: ignore[return-value]


def test_batched_runs_write_the_files_of_separate_runs(cache: Cache, tmp_path: Path) -> None:
    runs = configs(cache)
    together, separate = ([tmp_path / f"{name}{k}" for k in range(len(runs))] for name in ("together", "alone"))
    train_all(cache, runs, together)
    train_all(cache, runs, separate, "never")
    for folder, other in zip(together, separate, strict=True):
        check_files(folder, other)
    assert all(result.was_done for result in train_all(cache, runs, together))


def test_interrupting_a_batch_of_runs_gives_the_same_files(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = configs(cache)
    whole, parts = ([tmp_path / f"{name}{k}" for k in range(len(runs))] for name in ("whole", "parts"))
    train_all(cache, runs, whole)
    saved: list[Path] = []

    def stop_in_the_second_epoch(path: Path, *state: Any) -> None:
        save_checkpoint(path, *state)
        saved.append(path)
        if len(saved) == len(runs) + 1:  # only the first run has finished its second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vaflow.train.stacked_loop.save_checkpoint", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train_all(cache, runs, parts)
    train_all(cache, runs, parts)
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


def test_folds_train_together() -> None:
    folds = [replace(BASE, folds=3, fold=k, train_split=f"rest{k}of3", val_split=f"fold{k}of3") for k in (1, 2, 3)]
    assert len(batches_of(folds, lambda c: c)) == 1
    assert len(batches_of([*folds, replace(folds[0], fold_splits=("train",))], lambda c: c)) == 2


def test_a_short_training_is_not_measured(cache: Cache) -> None:
    runs = configs(cache)
    choice = choose(cache, runs, [LoadedSplits(cache).data(runs[0])] * len(runs))
    assert not choice.faster
    assert choice.alone == choice.together == 0


def test_measuring_keeps_random_state_and_returns_times(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaflow.train.repeats.WORTH_MEASURING", 0)
    runs = configs(cache)
    data = [LoadedSplits(cache).data(runs[0])] * len(runs)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    choice = choose(cache, runs, data)
    assert torch.equal(torch.rand(2), expected)
    assert choice.alone > 0
    assert choice.together > 0
    assert Choice(3, 0.2, 0.1, 600).faster
    assert str(Choice(3, 0.2, 0.1, 600)) == (
        "3 runs train in one batch: about 1.0 min (a step of all: in one batch 100 ms, one after the other 200 ms)"
    )


def test_a_batch_of_runs_reads_memory_mapped_features_ahead(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with features in memory, with different steps per run and dropout of modalities."""
    weights = []
    for budget in (None, 0):
        if budget is not None:
            monkeypatch.setattr("vaflow.train.data.default_budget", lambda device: 0)
        chosen = configs(cache, epochs=2)
        data = LoadedSplits(cache).data(chosen[0])
        assert data.train.off_device == (budget == 0)
        members = [Member(new_model(c, resolve(cache, c)[1], data, CPU), c, data) for c in chosen]
        assert [failure for _, failure in fit_together(members) if failure is not None] == []
        weights.append([member.model.state_dict() for member in members])
    for one, other in zip(*weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
