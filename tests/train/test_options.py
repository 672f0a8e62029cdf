"""Options of training and evaluation: modality dropout, weights per dimension, one modality hidden, long windows."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache
from torch import nn
from toy_batches import AUDIO_STREAM, AUDIO_STREAM_2, VISUAL_STREAM, toy_batch, toy_model

from vaflow.cache import Cache
from vaflow.errors import CorruptError, UsageError
from vaflow.files import read_tensors
from vaflow.timeline import Grid, nearest
from vaflow.train.batch import Batch, drop_modality
from vaflow.train.config import TrainConfig, merge
from vaflow.train.data import load_split
from vaflow.train.evaluate import choose_smoothing, evaluate_run, store_smoothing
from vaflow.train.inputs import resolve
from vaflow.train.losses import ccc_loss, masked_mse, total_loss
from vaflow.train.run_folder import RunFolder, load_run
from vaflow.train.scores import score
from vaflow.train.smoothing import Smoothing, read_smoothing, write_smoothing
from vaflow.train.traces import predict_clips
from vaflow.train.train_run import Result, train_run
from vaflow.train.windows import without_modality
from vaflow.viewer.run_results import read_history

CONFIG = TrainConfig(hidden=8, attention_heads=2, lr=1e-2, batch_size=8, epochs=4, device="cpu", kl_weight=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("options") / "cache", Toy(seconds=(8, 14)))


def quiet_run(cache: Cache, config: TrainConfig, out: Path, **options) -> Result:
    return train_run(cache, config, out, tensorboard=False, figures=False, **options)


# --- modality dropout ---


def test_modality_dropout_removes_one_modality_at_the_given_rate() -> None:
    streams, windows = (VISUAL_STREAM, AUDIO_STREAM, AUDIO_STREAM_2), 4000
    batch = toy_batch([3] * windows, [4] * windows, streams)
    torch.manual_seed(3)
    changed = drop_modality(batch, streams, 0.3)
    gone = {s.name: ~changed.valid[s.name].any(dim=1) & batch.valid[s.name].any(dim=1) for s in streams}
    assert torch.equal(gone[AUDIO_STREAM.name], gone[AUDIO_STREAM_2.name])  # all streams of a modality, or none
    assert not (gone[VISUAL_STREAM.name] & gone[AUDIO_STREAM.name]).any()
    for stream in streams:  # the others are unchanged
        kept = ~gone[stream.name]
        assert torch.equal(changed.valid[stream.name][kept], batch.valid[stream.name][kept])
    counts = Counter(zip(gone[VISUAL_STREAM.name].tolist(), gone[AUDIO_STREAM.name].tolist(), strict=True))
    deviation = np.sqrt(windows * 0.15 * 0.85)
    for modality in ((True, False), (False, True)):
        assert abs(counts[modality] - 0.15 * windows) < 4 * deviation
    assert changed.features is batch.features and changed.inside is batch.inside


def test_modality_dropout_is_seeded_and_requires_two_modalities() -> None:
    batch = toy_batch([3] * 50, [4] * 50)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(drop_modality(batch, (VISUAL_STREAM, AUDIO_STREAM), 0.5).valid[VISUAL_STREAM.name])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert (
        drop_modality(batch, (VISUAL_STREAM,), 0.5) is batch
        and drop_modality(batch, (VISUAL_STREAM, AUDIO_STREAM), 0.0) is batch
    )


def test_modality_dropout_trains_the_missing_face_vector() -> None:
    model = toy_model()
    whole = toy_batch([4] * 8, [5] * 8)
    whole = replace(whole, valid={name: torch.ones_like(mask) for name, mask in whole.valid.items()})
    gradients = []
    for share in (0.0, 0.9):
        torch.manual_seed(0)
        model.zero_grad()
        model(drop_modality(whole, (VISUAL_STREAM, AUDIO_STREAM), share)).va.sum().backward()
        gradients.append([branch.missing.grad.abs().sum().item() for branch in model.branches])  # type: ignore[union-attr, operator]
    assert gradients[0] == [0.0, 0.0]
    assert gradients[1][0] > 0 and gradients[1][1] == 0  # without audio there is nothing to attend to


def test_a_run_with_modality_dropout_is_reproducible_and_resumes(cache: Cache, tmp_path: Path) -> None:
    config = replace(CONFIG, modality_dropout=0.5, epochs=2)
    one = quiet_run(cache, config, tmp_path / "one").metrics
    assert quiet_run(cache, config, tmp_path / "two").metrics == one
    assert quiet_run(cache, replace(config, modality_dropout=0.0), tmp_path / "none").metrics["ccc"] != one["ccc"]


# --- evaluation without a modality ---


def test_evaluation_without_a_modality_does_not_read_its_features(cache: Cache) -> None:
    config, inputs = resolve(cache, CONFIG)
    windows = load_split(cache, "val", inputs.streams, config)
    hidden = without_modality(windows, "audio").gather(torch.arange(3))
    assert not hidden.valid[AUDIO].any() and hidden.valid[VISUAL].any()
    one, inputs = resolve(cache, replace(CONFIG, audio=("none",)))
    alone = load_split(cache, "val", inputs.streams, one)
    for modality in ("audio", "visual"):
        with pytest.raises(UsageError, match=f"--without {modality} leaves"):
            without_modality(alone, modality)
    with pytest.raises(UsageError, match="Choices: audio, visual"):
        without_modality(windows, "sound")


def test_evaluating_without_a_modality_keeps_the_stored_results(cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    metrics = quiet_run(cache, CONFIG, run).metrics
    stored = (run / "predictions" / "val" / "val0.csv").read_text()
    less = evaluate_run(run, cache, device="cpu", without="audio")
    assert less["without"] == "audio" and less["ccc"] != metrics["ccc"] and less["n_frames"] == metrics["n_frames"]
    assert RunFolder(run).read_metrics() == metrics
    assert (run / "predictions" / "val" / "val0.csv").read_text() == stored
    assert len(list((run / "predictions" / "val-without-audio").glob("*.csv"))) == 3
    config, inputs = resolve(cache, CONFIG)
    windows = load_split(cache, "val", inputs.streams, config)
    by_hand = score(predict_clips(load_run(run).model, windows.without(frozenset({AUDIO}))))
    assert list(less["ccc"].values()) == pytest.approx(by_hand.tolist())


# --- weights per dimension ---


def test_each_dimension_uses_the_weights_of_its_best_epoch(cache: Cache, tmp_path: Path) -> None:
    config = replace(CONFIG, best="each", epochs=6)
    metrics = quiet_run(cache, config, tmp_path / "each").metrics
    plain = quiet_run(cache, replace(config, best="mean"), tmp_path / "mean").metrics
    history = read_history(tmp_path / "each" / "history.csv")
    for name in ("valence", "arousal"):
        column = [row[f"val_ccc_{name}"] for row in history]
        assert metrics["best_epoch_each"][name] == 1 + int(np.argmax(column))
        assert metrics["ccc"][name] == pytest.approx(max(column), abs=1e-9)
        assert metrics["ccc"][name] >= plain["ccc"][name] - 1e-9
    assert metrics["best_epoch"] == plain["best_epoch"]
    assert (
        read_tensors(tmp_path / "each" / "model.safetensors")[0].keys()
        == load_run(tmp_path / "mean").model.state_dict().keys()
    )
    again = evaluate_run(tmp_path / "each", cache, device="cpu", write=False)
    assert again == {key: metrics[key] for key in again}


def test_a_dimension_without_labels_uses_the_best_mean_epoch(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(seconds=(8, 14), targets=(1,)))
    metrics = quiet_run(cache, replace(CONFIG, best="each"), tmp_path / "run").metrics
    assert set(metrics["best_epoch_each"].values()) == {metrics["best_epoch"]}


@pytest.mark.slow
def test_weights_per_dimension_are_kept_after_an_interruption(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vaflow.train import session

    def stopping(*arguments, **options):
        def stop(row: dict[str, float]) -> None:
            if row["epoch"] == 2:
                raise KeyboardInterrupt

        return stop

    config = replace(CONFIG, best="each")
    whole = quiet_run(cache, config, tmp_path / "whole").metrics
    with monkeypatch.context() as patch:
        patch.setattr(session, "reporter", stopping)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(cache, config, tmp_path / "run")
    assert quiet_run(cache, config, tmp_path / "run").metrics == whole


def test_a_run_missing_its_second_weights_is_reported_as_damaged(cache: Cache, tmp_path: Path) -> None:
    quiet_run(cache, replace(CONFIG, best="each", epochs=1), tmp_path / "run")
    (tmp_path / "run" / "model-arousal.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"model-arousal\.safetensors"):
        load_run(tmp_path / "run")


# --- losses ---


@pytest.mark.parametrize(("ccc_weight", "mse_weight"), [(1.0, 0.5), (0.3, 2.0), (0.0, 1.0)])
def test_ccc_and_squared_error_can_be_mixed(ccc_weight: float, mse_weight: float) -> None:
    batch = toy_batch()
    output = toy_model()(batch)
    loss, parts = total_loss(output, batch, kl_weight=0, mse_weight=mse_weight, ccc_weight=ccc_weight)
    pair = (output.va, batch.target, batch.labelled)
    expected = ccc_weight * ccc_loss(*pair) + mse_weight * masked_mse(*pair)
    assert loss.item() == pytest.approx(expected.item())
    assert parts["ccc"].item() == pytest.approx(ccc_loss(*pair).item())


def test_contradictory_settings_are_rejected() -> None:
    with pytest.raises(UsageError, match="ccc_weight"):
        TrainConfig(ccc_weight=0)
    with pytest.raises(UsageError, match="modality_dropout must be a number >= 0 and < 1"):
        TrainConfig(modality_dropout=1.0)
    with pytest.raises(UsageError, match="Choices: each, mean, within"):
        TrainConfig(best="both")
    with pytest.raises(UsageError, match="--finetune"):
        TrainConfig(best="each", finetune=True)
    assert merge({"fold_splits": '["train","val"]'}) == merge({"fold_splits": "train, val"}) == TrainConfig()


# --- smoothing of a run ---


def test_a_stored_smoothing_is_applied_by_every_prediction(cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = quiet_run(cache, CONFIG, run).metrics
    chosen = choose_smoothing(run, cache, "savgol", device="cpu")
    assert chosen is not None and chosen.chosen_on == "val"
    assert read_smoothing(run) is None  # choosing a smoothing stores nothing
    assert chosen.scores["0"] == pytest.approx(before["ccc"]["mean"])
    choice = choose_smoothing(run, cache, "mean", 2.0, device="cpu")
    assert choice == Smoothing("mean", 2.0)
    write_smoothing(run, choice)
    after = evaluate_run(run, cache, device="cpu")
    assert after["smoothing"] == {"kind": "mean", "seconds": 2.0, "chosen_on": ""}
    assert after["smoothness"]["prediction"]["valence"] < before["smoothness"]["prediction"]["valence"]
    written = RunFolder(run).read_metrics()
    assert written == {**after, "best_epoch": before["best_epoch"], "epochs": before["epochs"]}
    config, inputs = resolve(cache, CONFIG)
    windows = load_split(cache, "val", inputs.streams, config)
    loaded = load_run(run)
    for raw, trace in zip(predict_clips(loaded.model, windows), loaded.traces(windows), strict=True):
        np.testing.assert_array_equal(trace.va, Smoothing("mean", 2.0).apply(raw).va)
    assert choose_smoothing(run, cache, "none", device="cpu") is None
    write_smoothing(run, None)
    assert evaluate_run(run, cache, device="cpu")["ccc"] == before["ccc"]
    assert RunFolder(run).read_metrics() == before
    with pytest.raises(UsageError, match="Choices: mean, none, savgol"):
        choose_smoothing(run, cache, "median", device="cpu")


def test_longer_training_removes_the_smoothing_of_earlier_weights(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, config = tmp_path / "run", replace(CONFIG, epochs=1, uncertainty="variance")
    quiet_run(cache, config, run)
    store_smoothing(run, cache, Smoothing("mean", 2.0), device="cpu")
    longer = quiet_run(cache, replace(config, epochs=2), run).metrics
    assert f"vaflow smooth {run}" in caplog.text
    again = evaluate_run(run, cache, device="cpu")
    assert "smoothing" not in again and again["ccc"] == longer["ccc"] and again["coverage"] == longer["coverage"]


def test_smoothing_one_evaluation_does_not_change_the_run(cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = quiet_run(cache, CONFIG, run).metrics
    predictions = {path: path.read_bytes() for path in run.rglob("val/*.csv")}
    once = evaluate_run(run, cache, device="cpu", smoothing=Smoothing("mean", 2.0))
    assert once["smoothing"]["seconds"] == 2.0 and once["ccc"] != before["ccc"]
    assert RunFolder(run).read_metrics() == before and read_smoothing(run) is None
    assert {path: path.read_bytes() for path in predictions} == predictions
    assert list((run / "predictions" / "val-smooth-mean").glob("*.csv"))


# --- long windows ---


@pytest.mark.slow
def test_windows_of_three_hundred_frames_train_and_evaluate(tmp_path: Path) -> None:
    """Features at 30 per second, labels at 30 per second: 10-s windows of 300 frames."""
    toy = Toy(
        splits={"train": 4, "val": 2}, seconds=(9, 16), rate=30.0, grid=Grid(10.0, 5.0, 300), steps=20, text=False
    )
    cache = make_cache(tmp_path / "cache", toy)
    metrics = quiet_run(cache, replace(CONFIG, epochs=10), tmp_path / "run").metrics
    assert metrics["ccc"]["mean"] > 0.3
    config = load_run(tmp_path / "run").record.config
    assert (config.window, config.frames) == (10.0, 300)
    rows = (tmp_path / "run" / "predictions" / "val" / "val0.csv").read_text().splitlines()
    assert len(rows) == 1 + len(cache.read("labels", "val0").time)


def test_higher_frame_rates_read_the_nearest_cached_sample(cache: Cache) -> None:
    """Windows of 90 frames in 6 s on 8 samples in 4 s: each sample serves 7 or 8 frames."""
    config, inputs = resolve(cache, replace(CONFIG, window=6.0, stride=3.0, frames=90))
    windows = load_split(cache, "val", inputs.streams, config)
    for clip in windows.clips:
        data = cache.read(VISUAL, clip.item)
        batch: Batch = windows.gather(torch.arange(clip.first, clip.last))
        for w in range(clip.last - clip.first):
            for f in range(0, 90, 7):
                at = windows.sample_time[clip.first + w, f]
                if not batch.inside[w, f]:
                    continue
                row = int(nearest(data.time, at - 1e-6))
                near = abs(data.time[row] - at) <= 0.25 + 1e-6
                assert bool(batch.valid[VISUAL][w, f]) == bool(near and data.valid[row])
                if batch.valid[VISUAL][w, f]:
                    np.testing.assert_array_equal(batch.features[VISUAL][w, f], data.embedding[row].astype(np.float32))


def test_outputs_of_both_models_are_combined() -> None:
    from vaflow.train.heads import EachModel

    one, other = toy_model(), toy_model()
    nn.init.normal_(other.regression[0].weight)  # type: ignore[arg-type]
    batch = toy_batch()
    combined, a, b = EachModel(one, other).eval()(batch), one.eval()(batch), other.eval()(batch)
    assert torch.equal(combined.va[..., 0], a.va[..., 0]) and torch.equal(combined.va[..., 1], b.va[..., 1])
    torch.testing.assert_close(combined.region_logits, (a.region_logits + b.region_logits) / 2)
    assert not torch.equal(a.va, b.va)
