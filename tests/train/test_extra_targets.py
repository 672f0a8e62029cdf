"""Expression classes and action units: losses equal PyTorch, scores equal torchmetrics, and a complete run."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import Toy, make_cache
from torch.nn import functional

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.errors import FingerprintError, UsageError
from vaflow.timeline import nearest
from vaflow.train.batch import BINARY, CLASSES, ExtraRows, ExtraTargets, TargetSpec, extra_loss, extra_scores
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.ensemble import ensemble_runs
from vaflow.train.evaluate import evaluate_run
from vaflow.train.inputs import resolve
from vaflow.train.run_folder import RunFolder, load_run
from vaflow.train.train_run import train_run

CONFIG = TrainConfig(hidden=8, attention_heads=2, lr=1e-2, batch_size=8, epochs=8, device="cpu", kl_weight=0)
NAMES = ("sad", "calm", "happy")
UNITS = ("AU1", "AU12")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    """Classes computed from valence, at five rows per second; units computed from arousal, a row per frame."""
    cache = make_cache(tmp_path_factory.mktemp("extra") / "cache", Toy(seconds=(8, 14), unlabelled=0.0))
    cache.declare(StreamInfo("expr.8", "targets", 0, "float32", {"task": CLASSES, "names": list(NAMES)}))
    cache.declare(StreamInfo("au", "targets", 0, "float32", {"task": BINARY, "names": list(UNITS)}))
    for item in cache.items():
        labels = cache.read(LABELS, item)
        rows = np.arange(0, len(labels.time), 2)
        level = np.digitize(labels.value[rows, 0], (-0.15, 0.15))
        valid = np.repeat((rows % 10 != 0)[:, None], 3, axis=1)
        classes = np.where(valid, np.eye(3)[level], np.nan).astype(np.float32)
        cache.write("expr.8", item, {"time": labels.time[rows], "value": classes, "valid": valid})
        if item != "train1":
            units = np.stack([labels.value[:, 1] > 0, labels.value[:, 1] < -0.3], axis=1).astype(np.float32)
            present = np.ones(units.shape, bool)
            present[:4, 1] = False
            cache.write("au", item, {"time": labels.time, "value": units, "valid": present})
    return cache


@pytest.fixture(scope="module")
def run(cache: Cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("extra") / "run"
    train_run(cache, replace(CONFIG, extra_targets=("expr.8", "au")), out, tensorboard=False, figures=False)
    return out


def random_targets(task: str, seed: int = 0) -> tuple[torch.Tensor, ExtraTargets]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    if task == CLASSES:
        value = functional.one_hot(torch.randint(4, (3, 5), generator=draw), 4).double()
        labelled = (torch.rand(3, 5, 1, generator=draw) < 0.6).expand(3, 5, 4)
    else:
        value = torch.randint(2, (3, 5, 4), generator=draw).double()
        labelled = torch.rand(3, 5, 4, generator=draw) < 0.6
    return logits, ExtraTargets(task, torch.where(labelled, value, 0), labelled)


def test_the_class_loss_equals_pytorch_cross_entropy() -> None:
    logits, targets = random_targets(CLASSES)
    present = targets.labelled[..., 0]
    expected = functional.cross_entropy(logits[present], targets.value[present].argmax(dim=-1))
    assert extra_loss(logits, targets).item() == pytest.approx(expected.item())


def test_the_unit_loss_equals_pytorch_binary_cross_entropy() -> None:
    logits, targets = random_targets(BINARY)
    known = targets.labelled
    expected = functional.binary_cross_entropy_with_logits(logits[known], targets.value[known])
    assert extra_loss(logits, targets).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("task", [CLASSES, BINARY])
def test_unlabelled_targets_have_no_gradient(task: str) -> None:
    logits, targets = random_targets(task)
    with torch.no_grad():
        logits[~targets.labelled] = torch.nan
    extra_loss(logits, targets).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert not logits.grad[~targets.labelled].any() and logits.grad[targets.labelled].any()
    nothing = ExtraTargets(task, targets.value, torch.zeros_like(targets.labelled))
    assert extra_loss(logits, nothing).item() == 0
    with pytest.raises(ValueError, match="logits"):
        extra_loss(logits[..., :3], targets)


def rows_of(task: str, names: tuple[str, ...], frames: int, seed: int) -> tuple[ExtraRows, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.random((frames, len(names)))
    if task == CLASSES:
        value, valid = np.eye(len(names))[rng.integers(len(names), size=frames)], np.ones((frames, len(names)), bool)
        valid[rng.random(frames) < 0.3] = False
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    else:
        value, valid = (rng.random(probabilities.shape) < 0.4).astype(float), rng.random(probabilities.shape) < 0.7
    rows = ExtraRows(TargetSpec("x", task, names), np.arange(frames) / 5, np.where(valid, value, 0), valid)
    return rows, probabilities


def test_scores_equal_torchmetrics() -> None:
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score  # 3 s

    clips = [rows_of(CLASSES, NAMES, 40, seed) for seed in range(3)]
    scores = extra_scores({"x": clips})["x"]
    present = np.concatenate([rows.valid.all(axis=1) for rows, _ in clips])
    predicted = torch.tensor(np.concatenate([predicted for _, predicted in clips])[present])
    truth = torch.tensor(np.concatenate([rows.value for rows, _ in clips])[present]).argmax(dim=1)
    each = multiclass_f1_score(predicted, truth, 3, average="none")
    assert list(scores["f1"].values()) == pytest.approx(each.tolist())
    assert scores["macro_f1"] == pytest.approx(multiclass_f1_score(predicted, truth, 3, average="macro").item())
    assert scores["accuracy"] == pytest.approx((predicted.argmax(dim=1) == truth).float().mean().item())
    assert scores["n_frames"] == present.sum()
    clips = [rows_of(BINARY, UNITS, 40, seed) for seed in range(3)]
    scores = extra_scores({"x": clips})["x"]
    for k, name in enumerate(UNITS):
        valid = np.concatenate([rows.valid[:, k] for rows, _ in clips])
        predicted = torch.tensor(np.concatenate([predicted[:, k] for _, predicted in clips])[valid])
        truth = torch.tensor(np.concatenate([rows.value[:, k] for rows, _ in clips])[valid]).long()
        assert scores["f1"][name] == pytest.approx(binary_f1_score(predicted, truth).item())
    assert scores["macro_f1"] == pytest.approx(np.mean(list(scores["f1"].values())))


def test_unlabelled_classes_are_excluded_from_the_score() -> None:
    rows, predicted = rows_of(CLASSES, NAMES, 40, 0)
    never = replace(rows, value=np.eye(3)[np.where(rows.value.argmax(axis=1) == 2, 0, rows.value.argmax(axis=1))])
    scores = extra_scores({"x": [(never, predicted)]})["x"]
    assert scores["f1"]["happy"] is None
    assert scores["macro_f1"] == pytest.approx((scores["f1"]["sad"] + scores["f1"]["calm"]) / 2)


def test_frames_have_the_targets_of_the_nearest_row(cache: Cache) -> None:
    config, inputs = resolve(cache, replace(CONFIG, extra_targets=("expr.8", "au")))
    windows = load_split(cache, "train", inputs.streams, config)
    for clip in windows.clips:
        rows = cache.read("expr.8", clip.item)
        batch = windows.gather(torch.arange(clip.first, clip.last))
        at = windows.sample_time[clip.first : clip.last]
        row = nearest(rows.time, at)
        labelled = rows.valid[row] & (batch.inside.numpy() & (np.abs(rows.time[row] - at) <= 0.25 + 1e-6))[..., None]
        np.testing.assert_array_equal(batch.extra["expr.8"].labelled, labelled)
        np.testing.assert_array_equal(batch.extra["expr.8"].value, np.where(labelled, rows.value[row], 0))
        assert batch.extra["au"].labelled.any() == (clip.item != "train1")


def test_a_run_trains_and_scores_extra_targets(cache: Cache, run: Path) -> None:
    metrics = RunFolder(run).read_metrics()
    assert metrics["extra"]["expr.8"]["task"] == CLASSES and metrics["extra"]["au"]["task"] == BINARY
    assert metrics["extra"]["expr.8"]["macro_f1"] > 0.5  # chance level is 1/3
    frames = sum(int(cache.read("expr.8", item).valid.all(axis=1).sum()) for item in cache.items(split="val"))
    assert metrics["extra"]["expr.8"]["n_frames"] == frames
    record = load_run(run).record
    assert record.targets == (TargetSpec("expr.8", CLASSES, NAMES), TargetSpec("au", BINARY, UNITS))
    again = evaluate_run(run, cache, device="cpu", write=False)
    assert again == {key: metrics[key] for key in again}


def test_valence_and_arousal_start_from_the_same_weights_with_and_without(cache: Cache, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    plain = train_run(cache, config, tmp_path / "plain", tensorboard=False, figures=False).metrics
    weightless = replace(config, extra_targets=("au",), extra_weight=0.0)
    beside = train_run(cache, weightless, tmp_path / "beside", tensorboard=False, figures=False).metrics
    assert beside["ccc"] == plain["ccc"] and "extra" not in plain


def test_an_ensemble_averages_extra_targets(run: Path, tmp_path: Path) -> None:
    _, one = ensemble_runs([run], tmp_path / "one", device="cpu")
    assert one["extra"] == RunFolder(run).read_metrics()["extra"]


def test_a_cache_without_the_targets_is_rejected(cache: Cache, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'expr\.8'"):
        resolve(cache, replace(CONFIG, extra_targets=("expr",)))
    other = make_cache(tmp_path / "other", Toy(seed=3))
    assert "extra" not in evaluate_run(run, other, device="cpu", write=False)


def test_targets_in_another_order_are_not_scored(cache: Cache, run: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "cache", Toy(seconds=(8, 14), unlabelled=0.0))
    other.declare(StreamInfo("expr.8", "targets", 0, "float32", {"task": CLASSES, "names": list(NAMES[::-1])}))
    for score in (partial(evaluate_run, run, other), partial(ensemble_runs, [run], tmp_path / "e", cache=other)):
        with pytest.raises(FingerprintError, match=r"classes: sad, calm, happy\. Got: classes: happy, calm"):
            score(device="cpu")
