"""Uninformative scores are reported; non-finite values stop the run and name the clip."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache, create_cache
from vaflow.cli import main
from vaflow.errors import DataError
from vaflow.train.config import TrainConfig
from vaflow.train.data import Data, load_split
from vaflow.train.inputs import resolve
from vaflow.train.run_folder import load_run
from vaflow.train.session import new_model
from vaflow.train.train_run import train_run
from vaflow.train.training_loop import fit
from vaflow.train.windows import StreamTable, WindowSet

CONFIG = TrainConfig(hidden=16, lr=3e-3, batch_size=8, epochs=1, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("trusted") / "cache", Toy(seconds=(8, 14)))


def with_labels(path: Path, deviation: float) -> Cache:
    """A cache with nearly constant valence labels in both splits."""
    cache = make_cache(path, Toy(seconds=(8, 14)))
    rng = np.random.default_rng(0)
    for item in cache.items():
        record, arrays = cache.committed("labels", item)
        value = arrays["value"].copy()
        value[:, 0] = np.where(arrays["valid"][:, 0], 0.1 + rng.normal(scale=deviation, size=len(value)), np.nan)
        cache.write("labels", item, {**arrays, "value": value}, meta=record.meta)
    return cache


@pytest.mark.parametrize(
    ("deviation", "warned"), [pytest.param(0.0, True, marks=pytest.mark.slow), (0.005, True), (0.1, False)]
)
def test_nearly_constant_labels_are_reported_before_and_after_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, deviation: float, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        result = train_run(with_labels(tmp_path / "c", deviation), CONFIG, tmp_path / "run", figures=False)
    words = "labels of valence are nearly constant"
    assert any(w.startswith(f"train: {words}") for w in result.metrics["warnings"]) == warned
    assert any(w.startswith(words) for w in result.metrics["warnings"]) == warned, "of the validation split"
    assert caplog.text.count(f"train: {words}") == 2 * warned
    assert not any("labels of arousal" in w for w in result.metrics["warnings"])


def test_constant_predictions_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without valid input, nothing can be learned."""
    cache = make_cache(tmp_path / "c", Toy(seconds=(8, 14), invalid=1.0))
    out = tmp_path / "run"
    small = ["--set", "hidden=16", "--epochs", "1", "--lr", "1e-6", "--device", "cpu"]
    assert main(["train", str(cache.path), "--out", str(out), *small]) == 0
    assert "val: predictions of valence are nearly constant" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--device", "cpu"]) == 0
    stderr = capsys.readouterr().err
    assert "warning: predictions of valence are nearly constant" in stderr
    assert "warning: predictions of arousal are nearly constant" in stderr


def enlarged(windows: WindowSet, stream: str, item: str, factor: float) -> WindowSet:
    """The features of one clip, multiplied."""
    clip = next(clip for clip in windows.clips if clip.item == item)
    table = windows.tables[stream]
    rows = table.rows.clone()
    read = table.index[clip.first : clip.last].unique().long()
    rows[read[read > 0]] = rows[read[read > 0]].float().mul(factor).to(rows.dtype)
    other = StreamTable(rows, table.index, table.inside, table.time)
    return replace(windows, tables={**windows.tables, stream: other})


@pytest.mark.parametrize("stream", [VISUAL, AUDIO])
def test_a_non_finite_loss_names_the_most_likely_clip(cache: Cache, stream: str) -> None:
    """Features that overflow after the check at loading; the batch has windows of several clips."""
    config, inputs = resolve(cache, replace(CONFIG, epochs=3))
    train, val = (load_split(cache, split, inputs.streams, config) for split in ("train", "val"))
    model = new_model(config, inputs, Data(train, val), torch.device("cpu"))
    bad = enlarged(train, stream, "train3", float("inf"))
    with pytest.raises(DataError, match=rf"is of train3 in stream {stream}") as caught:
        fit(model, bad, val, config)
    assert "windows of" in str(caught.value)
    assert "clip_norm" in str(caught.value)


def test_a_non_finite_gradient_stops_the_run(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, its gradient is not."""
    config, inputs = resolve(cache, CONFIG)
    train, val = (load_split(cache, split, inputs.streams, config) for split in ("train", "val"))
    model = new_model(config, inputs, Data(train, val), torch.device("cpu"))
    next(model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(DataError, match=r"gradient norm nan in a batch with windows of .*train"):
        fit(model, train, val, config)


def widened(cache: Cache, path: Path) -> Cache:
    """Float32 features whose float16 rounding `cache` stores."""
    rng, wide = np.random.default_rng(1), create_cache(path)
    for info in cache.streams().values():
        narrow = info.kind in ("visual", "audio")
        wide.declare(replace(info, dtype="float32") if narrow else info)
        for item in cache.items(stream=info.name):
            record, arrays = cache.committed(info.name, item)
            if narrow:
                rounded = arrays["embedding"]
                step = np.spacing(np.abs(rounded)).astype(np.float64) * (rounded != 0)
                exact = (rounded + rng.uniform(-0.24, 0.24, rounded.shape) * step).astype(np.float32)
                np.testing.assert_array_equal(exact.astype(np.float16), rounded)
                arrays = {**arrays, "embedding": exact}
            wide.write(info.name, item, arrays, meta=record.meta)
    return wide


def test_float16_storage_moves_predictions_by_thousandths_at_most(cache: Cache, tmp_path: Path) -> None:
    """`scripts/rounding_effect.py` measures this on the demo clips with real encoders."""
    exact = widened(cache, tmp_path / "wide")
    train_run(exact, replace(CONFIG, epochs=3), tmp_path / "run", tensorboard=False, figures=False)
    trained = load_run(tmp_path / "run")
    predictions = []
    for source in (exact, cache):
        windows = load_split(source, "val", trained.record.streams, trained.record.config)
        predictions.append(np.concatenate([trace.va for trace in trained.traces(windows)]))
    apart = np.abs(predictions[0] - predictions[1])
    assert 0 < apart.max() < 5e-3
    assert apart.mean() < 1e-3
