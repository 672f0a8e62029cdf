"""Complete fine-tuning runs: falling loss, resumption, extraction with tuned encoders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_ready import SETTINGS, copied

from vaflow.cache import Cache, open_cache
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.datasets import open_dataset
from vaflow.errors import FingerprintError, UsageError, VaflowError, WeightsError
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract
from vaflow.files import read_tensors
from vaflow.predict import predict_media
from vaflow.train import finetune as tuning_run
from vaflow.train.batch import CLASSES
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.finetune.backbones import saved_weights
from vaflow.train.run_folder import RunFolder, load_run, require_record
from vaflow.train.train_run import train_run
from vaflow.viewer.run_results import read_history

CONFIG = replace(SETTINGS, augment=True, uncertainty="variance")
QUIET: dict[str, Any] = {"tensorboard": False, "figures": False}


@pytest.fixture(scope="module")
def run(pixels_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read-only for tests."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("run") / "run"
    train_run(pixels_cache, CONFIG, path, **QUIET)
    return path


@pytest.fixture(scope="module")
def tuned_cache(run: Path, videos: Path, pixels_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same videos, extracted with the encoders of the run."""
    record = require_record(run)
    sampling = record.streams[0].identity["sampling"]
    config = ExtractConfig(
        visual=("clip-tiny",),
        audio=("ast-tiny",),
        weights=saved_weights(RunFolder(run).encoders, record.tuned),
        workers=1,
        **sampling,
    )
    path = tmp_path_factory.mktemp("tuned") / "cache"
    assert not extract(open_dataset(videos, "videos"), path, config).failures
    return open_cache(path)


def test_fine_tuning_reduces_the_loss_and_writes_a_complete_run(run: Path, pixels_cache: Cache) -> None:
    history = read_history(run / "history.csv")
    assert history[-1]["loss_total"] < history[0]["loss_total"]
    assert not RunFolder(run).checkpoint_file.exists()
    assert train_run(pixels_cache, CONFIG, run).was_done
    assert RunFolder(run).read_metrics()["best_epoch"] in (1, 2)
    assert set(RunFolder(run).read_metrics()["coverage"]) == {"valence", "arousal"}
    assert {"uncertainty.json", "training_features.safetensors"} <= {path.name for path in run.iterdir()}
    assert not list(run.rglob("*.bin")), "a pickle file was written"


def test_a_resumed_run_equals_an_uninterrupted_run(
    run: Path, pixels_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = tuning_run.train_epoch

    def stop(tuning: Any, epoch: int) -> Any:
        if epoch == 1:
            raise KeyboardInterrupt
        return learn(tuning, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuning_run, "train_epoch", stop)
        train_run(pixels_cache, CONFIG, tmp_path / "run", **QUIET)
    assert RunFolder(tmp_path / "run").checkpoint_file.is_file()
    train_run(pixels_cache, CONFIG, tmp_path / "run", **QUIET)
    for name in ("model.safetensors", "encoders/clip-tiny.safetensors", "encoders/ast-tiny/model.safetensors"):
        mine, theirs = (read_tensors(folder / name)[0] for folder in (tmp_path / "run", run))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def test_backbones_change_and_their_text_tower_does_not(run: Path, pixels_cache: Cache, tuned_cache: Cache) -> None:
    before, after = pixels_cache.streams(), tuned_cache.streams()
    for name in ("clip-tiny", "ast-tiny"):
        assert pixels_cache.fingerprint(name) != tuned_cache.fingerprint(name)
        assert before[name].identity["weights"] != after[name].identity["weights"]
        one, other = pixels_cache.read(name, "obama"), tuned_cache.read(name, "obama")
        np.testing.assert_array_equal(one.valid, other.valid)
        assert np.abs(one.embedding.astype(float) - other.embedding).max() > 0.01
    one, other = (cache.read("clip-tiny.text", "default") for cache in (pixels_cache, tuned_cache))
    np.testing.assert_array_equal(one.embedding, other.embedding)


def test_extraction_with_other_weights_does_not_mix_with_the_cache(
    run: Path, videos: Path, pixels_cache: Cache, tmp_path: Path
) -> None:
    weights = saved_weights(RunFolder(run).encoders, require_record(run).tuned)
    config = ExtractConfig(
        visual=("clip-tiny",), audio=(), weights={"clip-tiny": weights["clip-tiny"]}, **sampling_of(pixels_cache)
    )
    copied(pixels_cache, tmp_path / "cache")
    with pytest.raises(FingerprintError, match="weights"):
        extract(open_dataset(videos, "videos"), tmp_path / "cache", config)


def sampling_of(cache: Cache) -> dict[str, Any]:
    sampling: dict[str, Any] = cache.streams()["clip-tiny"].identity["sampling"]
    return sampling


@pytest.mark.parametrize("split", ["val", pytest.param("train", marks=pytest.mark.slow)])
def test_evaluation_from_frames_equals_a_cache_of_the_tuned_encoders(
    run: Path, pixels_cache: Cache, tuned_cache: Cache, split: str
) -> None:
    from_pixels = evaluate_run(run, pixels_cache, split, write=False)
    from_features = evaluate_run(run, tuned_cache, split, write=False)
    for name in ("valence", "arousal", "mean"):
        assert from_pixels["ccc"][name] == pytest.approx(from_features["ccc"][name], abs=2e-3)
    if split == "val":
        assert from_pixels["ccc"] == RunFolder(run).read_metrics()["ccc"]


def test_evaluation_does_not_use_features_of_the_original_encoders(
    run: Path, pixels_cache: Cache, tmp_path: Path
) -> None:
    """Without pixels the split cannot be encoded again, so evaluation fails."""
    cache = copied(pixels_cache, tmp_path / "cache", pixels=None)
    with pytest.raises(UsageError, match="--pixels"):
        evaluate_run(run, cache, write=False)


def test_new_videos_are_predicted_with_the_tuned_encoders(
    run: Path, clips: Path, tuned_cache: Cache, tmp_path: Path
) -> None:
    summary = predict_media(run, [clips / "obama.mp4"], tmp_path)
    assert not summary.failures
    table = np.genfromtxt(tmp_path / "obama.csv", delimiter=",", names=True)
    evaluate_run(run, tuned_cache, "train")
    theirs = np.genfromtxt(RunFolder(run).predictions("train") / "obama.csv", delimiter=",", names=True)
    assert len(table) == tuned_cache.meta("obama")["frames"]
    np.testing.assert_allclose(table["valence"], theirs["valence"][: len(table)], atol=5e-3)


@pytest.mark.slow  # docs/fine-tuning.md does, and test_docs runs it
def test_fine_tuning_can_start_from_the_heads_of_another_run(pixels_cache: Cache, run: Path, tmp_path: Path) -> None:
    first = TrainConfig(hidden=16, epochs=1, batch_size=2, lr=1e-3, device="cpu", uncertainty="variance")
    train_run(pixels_cache, first, tmp_path / "heads", **QUIET)
    still = replace(CONFIG, epochs=1, lr=1e-12, backbone_lr=1e-12, init=str(tmp_path / "heads"))
    train_run(pixels_cache, still, tmp_path / "warm", **QUIET)
    heads, warm = (load_run(tmp_path / name).model.state_dict() for name in ("heads", "warm"))
    for name, tensor in heads.items():
        torch.testing.assert_close(warm[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="other shapes"):
        train_run(pixels_cache, replace(still, hidden=8), tmp_path / "other", **QUIET)
    with pytest.raises(UsageError, match="is a fine-tuned run"):
        train_run(pixels_cache, replace(still, init=str(run)), tmp_path / "again", **QUIET)


def test_missing_encoders_and_unused_weights_are_reported(run: Path, pixels_cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"encoder for clip-tiny is missing"):
        saved_weights(tmp_path, require_record(run).tuned)
    heads = replace(CONFIG, finetune=False)
    with pytest.raises(UsageError, match="--finetune"):
        train_run(pixels_cache, heads, tmp_path / "run", weights={"clip-tiny": tmp_path})
    with pytest.raises(VaflowError, match="None of the run's streams"):
        train_run(pixels_cache, replace(CONFIG, visual=("none",), audio=("logmel",)), tmp_path / "none", **QUIET)


def test_further_targets_are_trained_with_the_encoders(pixels_cache: Cache, tmp_path: Path) -> None:
    cache = copied(pixels_cache, tmp_path / "cache")
    cache.declare(StreamInfo("expr", "targets", 0, "float32", {"task": CLASSES, "names": ["low", "high"]}))
    for item in cache.items():
        labels = cache.read(LABELS, item)
        value = np.eye(2, dtype=np.float32)[(labels.value[:, 0] > 0).astype(int)]
        cache.write("expr", item, {"time": labels.time, "value": value, "valid": np.ones(value.shape, bool)})
    config = replace(CONFIG, extra_targets=("expr",), audio=("none",), epochs=1, accumulate=2)
    metrics = train_run(cache, config, tmp_path / "run", **QUIET).metrics
    assert 0 <= metrics["extra"]["expr"]["macro_f1"] <= 1
    fresh = train_run(cache, replace(config, extra_weight=0.0), tmp_path / "unweighted", **QUIET)
    assert fresh.metrics["extra"]["expr"] is not None
    names = ("extra.0.weight",)
    one, other = (read_tensors(tmp_path / run / "model.safetensors")[0] for run in ("run", "unweighted"))
    assert any(not torch.equal(one[name], other[name]) for name in names)  # the loss reaches the head
