"""Regression tests for bugs of public code for this task, stage two; each asserts that its data would show the bug.

Those of stage one are in `tests/extract/test_known_bugs_extract.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import VISUAL, Toy, make_cache
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS
from vaflow.train.batch import Batch, Output
from vaflow.train.config import TrainConfig
from vaflow.train.data import Data, load_split
from vaflow.train.folds import make_folds
from vaflow.train.inputs import resolve
from vaflow.train.losses import ccc_loss, total_loss
from vaflow.train.scores import evaluate_windows
from vaflow.train.session import new_model
from vaflow.train.traces import predict_clips
from vaflow.train.training_loop import make_optimizer, train_step
from vaflow.train.windows import WindowSet


class FunctionModel(nn.Module):
    """A model whose output is a function of (absolute seconds [B, F], batch)."""

    def __init__(self, windows: WindowSet, function: Callable[[Tensor, Batch], Tensor]):
        super().__init__()
        self.time, self.function = torch.from_numpy(windows.sample_time), function

    def forward(self, batch: Batch) -> Output:
        return Output(self.function(self.time[batch.window], batch).float(), None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Clips with a fifth of the frames unlabelled and half of the faces missing; some are shorter than a window."""
    toy = Toy(splits={"train": 6, "val": 4}, seconds=(1.5, 12.0), unlabelled=0.2, invalid=0.5)
    return make_cache(tmp_path_factory.mktemp("bugs") / "cache", toy)


def windows_of(cache: Cache, split: str) -> WindowSet:
    config, inputs = resolve(cache, TrainConfig())
    return load_split(cache, split, inputs.streams, config)


def concordance(x: np.ndarray, y: np.ndarray) -> float:
    return float(2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def noisy(windows: WindowSet) -> FunctionModel:
    """Predict the label plus noise of a different amplitude for each clip."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(scale=0.3, size=(*windows.sample_time.shape, 2)))
    return FunctionModel(windows, lambda t, batch: batch.target + noise[batch.window])


def test_bug_minus_five_kept_as_a_target(cache: Cache) -> None:
    """Loss and gradient do not depend on values of unlabelled frames."""
    windows = windows_of(cache, "train")
    batch = windows.gather(windows.trainable)
    assert (batch.inside.unsqueeze(-1) & ~batch.labelled).any(), "the bug would show here"
    losses = []
    for value in (0.0, -5.0, torch.nan):
        spoiled = replace(batch, target=torch.where(batch.labelled, batch.target, value))
        predicted = torch.linspace(-1, 1, batch.target.numel()).reshape(batch.target.shape).requires_grad_()
        loss, _ = total_loss(Output(predicted, None), spoiled, mse_weight=1.0)
        (gradient,) = torch.autograd.grad(loss, predicted)
        losses.append((loss.item(), gradient))
    for value, gradient in losses[1:]:
        assert value == losses[0][0] and torch.equal(gradient, losses[0][1])
    assert not losses[0][1][~batch.labelled].any()


def test_bug_unannotated_frames_scored_as_zero(cache: Cache) -> None:
    windows = windows_of(cache, "val")
    model = FunctionModel(windows, lambda t, batch: torch.where(batch.labelled, batch.target, 0.8))
    report, traces = evaluate_windows(model, windows, "val", resamples=20)
    predicted = np.concatenate([trace.va for trace in traces])
    items = [cache.read(LABELS, item) for item in cache.items(split="val")]
    label, valid = np.concatenate([i.value for i in items]), np.concatenate([i.valid for i in items])
    right = concordance(predicted[valid[:, 0], 0], label[valid[:, 0], 0].astype(float))
    as_zero = concordance(predicted[:, 0], np.where(valid[:, 0], label[:, 0], 0).astype(float))
    assert report["ccc"]["valence"] == pytest.approx(right)
    assert abs(right - as_zero) > 0.01, "the bug would show here"


def test_bug_frames_without_a_face_dropped_from_the_score(cache: Cache) -> None:
    windows = windows_of(cache, "val")
    report, _ = evaluate_windows(noisy(windows), windows, "val", resamples=20)
    labelled = sum(int(cache.read(LABELS, item).valid.any(1).sum()) for item in cache.items(split="val"))
    assert report["n_frames"] == labelled
    missing = np.mean([1 - cache.read(VISUAL, item).valid.mean() for item in cache.items(split="val")])
    assert missing > 0.3, "the bug would show here"


def test_bug_the_tail_of_a_video_dropped(cache: Cache) -> None:
    """The last rows of a clip are predicted from its last samples, not held from the last whole window."""
    windows = windows_of(cache, "val")
    for trace in predict_clips(
        FunctionModel(windows, lambda t, _: (t / 40).unsqueeze(-1).expand(*t.shape, 2)), windows
    ):
        assert len(trace.va) == len(trace.clip.time)
        step = 4.0 / 8
        np.testing.assert_allclose(trace.va[:, 0], np.minimum(trace.clip.time, trace.va[-1, 0] * 40) / 40, atol=1e-6)
        assert trace.clip.time[-1] - 40 * trace.va[-1, 0] < step


def test_bug_the_last_batch_dropped(cache: Cache) -> None:
    windows = windows_of(cache, "train")
    count = len(windows.trainable)
    size = next(size for size in (7, 5, 3, 4) if count % size)
    visited = torch.cat(list(windows.shuffled(size, torch.Generator().manual_seed(0))))
    assert sorted(visited.tolist()) == sorted(windows.trainable.tolist())
    every = [trace.clip.item for trace in predict_clips(noisy(windows), windows, batch_size=size)]
    assert every == cache.items(split="train")


def test_bug_loss_over_zero_padding(cache: Cache) -> None:
    windows = windows_of(cache, "train")
    batch = windows.gather(torch.arange(len(windows)))
    padding = ~batch.inside
    assert padding.any(), "the bug would show here"
    predicted = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = ccc_loss(predicted, batch.target, batch.labelled)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert not gradient[padding].any()
    naive = ccc_loss(predicted, torch.where(batch.labelled, batch.target, 0))
    assert abs(naive.item() - loss.item()) > 1e-4


def test_bug_the_loss_detached_from_the_model(cache: Cache) -> None:
    """After one step every parameter with a gradient has changed."""
    config, inputs = resolve(cache, TrainConfig(hidden=8, attention_heads=2, device="cpu", lr=1e-2))
    data = Data(windows_of(cache, "train"), windows_of(cache, "val"))
    model = new_model(config, inputs, data, torch.device("cpu"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    batch = data.train.gather(data.train.trainable[:8])
    train_step(model, make_optimizer(model, config), batch, config)
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not still, still
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_bug_the_mean_of_each_videos_ccc_called_the_metric(cache: Cache) -> None:
    windows = windows_of(cache, "val")
    report, traces = evaluate_windows(noisy(windows), windows, "val", resamples=20)
    predicted, label, per_video = [], [], []
    for trace, item in zip(traces, cache.items(split="val"), strict=True):
        labels = cache.read(LABELS, item)
        keep = labels.valid[:, 1]
        predicted.append(trace.va[keep, 1])
        label.append(labels.value[keep, 1].astype(float))
        per_video.append(concordance(predicted[-1], label[-1]))
    together = concordance(np.concatenate(predicted), np.concatenate(label))
    assert report["ccc"]["arousal"] == pytest.approx(together)
    assert report["within_video_ccc"]["arousal"] == pytest.approx(np.mean(per_video))
    assert abs(together - np.mean(per_video)) > 0.005, "the bug would show here"


def test_bug_folds_separate_left_from_right(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 8}, seconds=(6, 12)))
    for k in range(0, 8, 2):  # a second person in every other video
        for stream in cache.streams():
            if cache.has(stream, f"train{k}"):
                twin = cache.read(stream, f"train{k}")
                cache.write(stream, f"train{k}_left", twin.arrays, meta=dict(twin.meta))
    parts = make_folds(cache, ("train",), 4)
    home = {item: n for n, part in enumerate(parts) for item in part.items}
    assert len(home) == 12
    for k in range(0, 8, 2):
        assert home[f"train{k}"] == home[f"train{k}_left"]
    by_item = {item: n % 4 for n, item in enumerate(sorted(home))}
    assert any(by_item[f"train{k}"] != by_item[f"train{k}_left"] for k in range(0, 8, 2)), "the bug would show here"
