"""Runs are bound to their data: changed data, shared recordings, locks, longer training, moved caches."""

import json
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cli import main
from vaflow.errors import CorruptError, UsageError
from vaflow.files import lock_folder, read_tensors
from vaflow.provenance import find_provenance
from vaflow.train import plots, session
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.inputs import check_same, resolve
from vaflow.train.run_folder import RunFolder, cache_of, load_run
from vaflow.train.train_run import Result, train_run
from vaflow.train.uncertainty import read_calibration
from vaflow.viewer.run_results import read_history

CONFIG = TrainConfig(hidden=8, attention_heads=2, lr=3e-3, batch_size=8, epochs=2, device="cpu")
TOY = Toy(splits={"train": 3, "val": 2}, seconds=(8, 12))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a cache like `cache`, for tests to copy."""
    folder = tmp_path_factory.mktemp("finished")
    quiet_run(make_cache(folder / "cache", TOY), CONFIG, folder / "run")
    return folder / "run"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "cache", TOY)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run on the contents of `cache`."""
    return shutil.copytree(finished, tmp_path / "run")


def quiet_run(cache: Cache, config: TrainConfig, out: Path, **options: Any) -> Result:
    return train_run(cache, config, out, tensorboard=False, figures=False, **options)


def rewrite(cache: Cache, stream: str, item: str, *, source: dict[str, Any] | None = None, **changed: Any) -> None:
    """Replace arrays of one item, or its source."""
    arrays = {name: array.copy() for name, array in cache.read(stream, item).arrays.items()} | changed
    record = cache.record(stream, item)
    cache.drop(stream, item)
    cache.write(stream, item, arrays, meta=dict(record.meta), source=source or dict(record.source))


def interrupt(cache: Cache, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "reporter", lambda *_: stop)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(cache, CONFIG, out)


def test_an_interrupted_run_rejects_changed_labels(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cache, tmp_path / "run", monkeypatch)
    rewrite(cache, "labels", "train1", value=-cache.read("labels", "train1").value)
    with pytest.raises(UsageError, match=r"train: changed train1\..*--fresh"):
        quiet_run(cache, CONFIG, tmp_path / "run")
    assert not quiet_run(cache, CONFIG, tmp_path / "run", fresh=True).was_done


def test_a_finished_run_rejects_changed_features(cache: Cache, run: Path) -> None:
    rewrite(cache, VISUAL, "val0", embedding=cache.read(VISUAL, "val0").embedding + np.float16(1))
    with pytest.raises(UsageError, match="val: changed val0"):
        quiet_run(cache, CONFIG, run)


def test_rewriting_equal_contents_is_the_same_data(cache: Cache, tmp_path: Path) -> None:
    first = quiet_run(cache, CONFIG, tmp_path / "run")
    rewrite(cache, AUDIO, "train0")
    again = quiet_run(cache, CONFIG, tmp_path / "run")
    assert again.was_done and again.metrics == first.metrics


def test_another_cache_is_different_data(cache: Cache, run: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", replace(TOY, seed=1))
    with pytest.raises(UsageError, match="does not hold the clips"):
        quiet_run(other, CONFIG, run)


def test_a_copied_cache_is_the_same_data(cache: Cache, run: Path, tmp_path: Path) -> None:
    copy = open_cache(shutil.copytree(cache.path, tmp_path / "copy"))
    assert quiet_run(copy, CONFIG, run).was_done


def test_a_run_of_an_older_version_has_no_digests(cache: Cache, run: Path, caplog) -> None:
    (run / "clips.json").unlink()
    assert quiet_run(cache, CONFIG, run).was_done
    assert "older version" in caplog.text


def test_fresh_deletes_only_the_run(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    quiet_run(cache, CONFIG, out)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(out / "predictions", elsewhere)
    (out / "predictions").symlink_to(elsewhere)
    (out / "notes.txt").write_text("mine")
    RunFolder(out).clear()
    assert sorted(path.name for path in out.iterdir()) == [".lock", "notes.txt"]
    assert list(elsewhere.rglob("*.csv"))


def test_two_processes_cannot_train_into_one_directory(cache: Cache, tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run", "vaflow train"), pytest.raises(UsageError, match="Another `vaflow train` is"):
        quiet_run(cache, CONFIG, tmp_path / "run")
    quiet_run(cache, CONFIG, tmp_path / "run")


def test_splits_that_share_a_recording_are_rejected(cache: Cache, tmp_path: Path) -> None:
    for item, name in (("train0", "a.mp4"), ("val1", "renamed.mp4")):
        rewrite(cache, VISUAL, item, source={"video": {"blake2b": "ab" * 16, "name": name}})
    with pytest.raises(UsageError, match=r"share recordings.*train0 and val1.*shared_sources"):
        quiet_run(cache, CONFIG, tmp_path / "run")
    quiet_run(cache, replace(CONFIG, shared_sources=True), tmp_path / "run")


def test_evaluation_warns_of_recordings_that_are_counted_twice_or_were_trained_on(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", replace(TOY, splits={"train": 2, "val": 2, "test": 2}))
    for item, name in (("val0", "a"), ("val1", "a"), ("train0", "b"), ("test1", "b")):
        source = {"video": {"blake2b": name * 32}}
        for stream in (VISUAL, "labels"):
            rewrite(cache, stream, item, source=source)
    quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    warnings = {split: evaluate_run(tmp_path / "run", cache, split)["warnings"] for split in ("train", "val", "test")}
    assert any("val counts recordings twice: 1 pair" in w and "val0 and val1" in w for w in warnings["val"])
    assert any("shares recordings with the training split" in w and "train0 and test1" in w for w in warnings["test"])
    assert not any("recordings" in warning for warning in warnings["train"])


def test_evaluation_warns_of_clips_that_left_the_training_split(cache: Cache, tmp_path: Path) -> None:
    for item in cache.items():
        rewrite(cache, VISUAL, item, source={"video": {"blake2b": item * 8}})
    quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    assert not any("recordings" in warning for warning in evaluate_run(tmp_path / "run", cache)["warnings"])
    (tmp_path / "splits.csv").write_text("name,split\ntrain1,val\n")
    assert main(["cache", "splits", str(cache.path), str(tmp_path / "splits.csv"), "-q"]) == 0
    warnings = evaluate_run(tmp_path / "run", open_cache(cache.path))["warnings"]
    assert any("shares recordings with the training split" in w and "train1 and train1" in w for w in warnings)


def test_scores_of_a_dimension_without_training_labels_are_marked(cache: Cache, tmp_path: Path) -> None:
    for item in cache.items(split="train"):
        rewrite(cache, "labels", item, valid=cache.read("labels", item).valid & [True, False])
    warning = "train: arousal is not labelled in this split"
    assert warning in quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run").metrics["warnings"]
    assert warning in evaluate_run(tmp_path / "run", cache)["warnings"]
    assert warning in RunFolder(tmp_path / "run").read_metrics()["warnings"]
    assert warning not in evaluate_run(tmp_path / "run", cache, "train")["warnings"]


def test_clips_with_earlier_data_than_their_files_are_named(cache: Cache, run: Path) -> None:
    failure = {"item": "val0", "stage": "labels", "error": "DataError", "message": "not a number"}
    (cache.path / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    assert any("last extraction failed for 1 clip (val0)" in w for w in evaluate_run(run, cache)["warnings"])
    os.utime(cache.path / "failures.jsonl", (0, 0))  # an older list, as another shard leaves it
    assert not any("extraction" in warning for warning in evaluate_run(run, cache)["warnings"])


def test_clips_with_features_of_another_video_than_their_labels_are_named(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an extraction of one encoder, where another one still has the earlier video."""
    videos = {"labels": {"name": "a.mp4", "blake2b": "1"}, VISUAL: {"name": "b.mp4", "blake2b": "1"}}
    for stream, video in videos.items():
        rewrite(cache, stream, "val0", source={"video": video})
    rewrite(cache, AUDIO, "val0", source={"video": {"name": "a.mp4", "blake2b": "2"}})
    quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    warning = (
        f"val: {AUDIO} was made from another video than the labels for 1 clip (val0); extract or import {AUDIO} again"
    )
    assert caplog.text.count("made from another video") == 1 and warning in caplog.text
    assert any(text.startswith(warning) for text in evaluate_run(tmp_path / "run", cache)["warnings"])


@pytest.mark.parametrize("name", [".", "../run"])
def test_a_run_is_named_relative_to_the_working_directory(
    cache: Cache, run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(run)
    shutil.rmtree(run / "predictions")
    assert main(["evaluate", name, "--cache", str(cache.path), "--quiet"]) == 0
    assert len(list(run.glob("predictions/val/*.csv"))) == 2


def test_predictions_of_a_run_are_of_one_evaluation(cache: Cache, run: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", replace(TOY, splits={"train": 1, "val": 3}))
    (run / "predictions" / "val" / "notes.csv").write_text("mine")
    evaluate_run(run, other, device="cpu")
    names = {path.stem for path in (run / "predictions" / "val").glob("*.csv")}
    assert names == {*other.items(split="val"), "notes"}
    evaluate_run(run, cache, device="cpu")
    names = {path.stem for path in (run / "predictions" / "val").glob("*.csv")}
    assert names == {*cache.items(split="val"), "notes"}


def test_equal_label_files_are_not_a_shared_recording(cache: Cache, tmp_path: Path) -> None:
    for item in ("train0", "val1"):
        rewrite(cache, "labels", item, source={"labels": {"blake2b": "ab" * 16}})
    assert not quiet_run(cache, CONFIG, tmp_path / "run").was_done


def test_settings_that_do_not_fit_start_no_run(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be even"):
        quiet_run(cache, replace(CONFIG, hidden=9), tmp_path / "run")
    assert not quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run").was_done


def test_more_epochs_continue_to_the_same_result(cache: Cache, tmp_path: Path) -> None:
    whole = quiet_run(cache, replace(CONFIG, epochs=4), tmp_path / "whole")
    quiet_run(cache, CONFIG, tmp_path / "run")
    longer = quiet_run(cache, replace(CONFIG, epochs=4), tmp_path / "run")
    assert not longer.was_done and longer.metrics == whole.metrics
    assert [row["epoch"] for row in read_history(tmp_path / "run" / "history.csv")] == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="epochs: 4, not 2"):
        quiet_run(cache, CONFIG, tmp_path / "run")


def test_an_interrupted_extended_training_is_not_marked_finished(
    cache: Cache, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluate_run(run, cache) and not caplog.records

    def stop(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "reporter", lambda *_: stop)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(cache, replace(CONFIG, epochs=4), run)
    assert not RunFolder(run).done
    evaluate_run(run, cache)
    assert "its earlier weights are used" in caplog.text
    assert quiet_run(cache, replace(CONFIG, epochs=4), run).metrics["epochs"] == 4


@pytest.mark.slow  # test_cli_train has `--epochs auto`
def test_epochs_auto_stops_when_the_score_stops_rising(cache: Cache, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=AUTO, patience=12)
    metrics = quiet_run(cache, config, tmp_path / "run").metrics
    record = RunFolder(tmp_path / "run").record()
    assert record is not None and record.config.epochs == AUTO
    windows = record.data["train"]["windows"]
    waited = metrics["epochs"] - metrics["best_epoch"]
    steps = -(-windows // config.batch_size)
    assert waited >= 3 and waited * steps >= 12 and (waited - 1 < 3 or (waited - 1) * steps < 12)


def test_best_within_keeps_the_epoch_with_the_best_score_within_videos(cache: Cache, tmp_path: Path) -> None:
    metrics = quiet_run(cache, replace(CONFIG, best="within", epochs=5), tmp_path / "run").metrics
    history = read_history(tmp_path / "run" / "history.csv")
    scores = [row["val_within_mean"] for row in history]
    assert metrics["best_epoch"] == 1 + int(np.argmax(scores))
    assert metrics["within_video_ccc"]["mean"] == pytest.approx(max(scores))


def test_the_best_epoch_and_the_calibration_are_chosen_on_scored_clips(cache: Cache, tmp_path: Path) -> None:
    cache.drop(VISUAL, "val0")
    cache.drop(AUDIO, "val0")
    config = replace(CONFIG, uncertainty="variance")
    metrics = quiet_run(cache, config, tmp_path / "run", allow_missing=True).metrics
    calibration = read_calibration(tmp_path / "run")
    assert calibration is not None and calibration.videos == metrics["n_videos"] == 1
    best = read_history(tmp_path / "run" / "history.csv")[metrics["best_epoch"] - 1]
    assert best["val_ccc_mean"] == pytest.approx(metrics["ccc"]["mean"])


def test_failing_figures_do_not_stop_a_run(cache: Cache, tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise ValueError("mathtext")

    monkeypatch.setattr(plots, "draw_run", fail)
    train_run(cache, CONFIG, tmp_path / "run", tensorboard=False)
    assert RunFolder(tmp_path / "run").done and "could not be drawn" in caplog.text


@pytest.mark.slow  # test_plots draws such names
@pytest.mark.parametrize("name", ["US$ 5% of A$", "x" * 244])
def test_unusual_clip_names_are_trained_and_plotted(tmp_path: Path, name: str) -> None:
    cache = make_cache(tmp_path / "cache", TOY)
    for stream in (VISUAL, AUDIO, "labels"):
        data = cache.read(stream, "val0")
        cache.write(stream, name, dict(data.arrays), meta=dict(data.meta))
        cache.drop(stream, "val0")
    train_run(cache, replace(CONFIG, epochs=1), tmp_path / "run", tensorboard=False)
    assert (tmp_path / "run" / "predictions" / "val" / f"{name}.csv").is_file()


@pytest.mark.parametrize("changed", [{"hidden": 60_000}, {"layers": 100_000_000}, {"hidden": 10}])
def test_weight_shapes_are_checked_before_allocation(cache: Cache, run: Path, changed: dict[str, int]) -> None:
    file = run / "config.toml"
    document = tomllib.loads(file.read_text())
    document["train"] |= changed
    file.write_text(tomli_w.dumps(document))
    with pytest.raises(CorruptError, match=r"does not fit its config\.toml"):
        load_run(run)


def test_a_run_finds_its_cache_after_both_are_moved(cache: Cache, tmp_path: Path) -> None:
    quiet_run(cache, CONFIG, tmp_path / "run")
    (tmp_path / "moved").mkdir()
    for name in ("cache", "run"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    assert cache_of(tmp_path / "moved" / "run") == str((tmp_path / "moved" / "cache").resolve())
    assert main(["smooth", str(tmp_path / "moved" / "run"), "--seconds", "1", "--quiet"]) == 0
    assert find_provenance(tmp_path / "moved" / "run")["cache"]["state"] == "found"
    shutil.move(tmp_path / "moved" / "run", tmp_path / "alone")
    with pytest.raises(UsageError, match=r"--cache CACHE"):
        cache_of(tmp_path / "alone")


def test_a_run_that_was_copied_with_its_cache_names_the_one_that_is_read(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    assert cache_of(tmp_path / "run") == str(cache.path) and not caplog.records
    for name in ("run", "cache"):
        shutil.copytree(tmp_path / name, tmp_path / "copy" / name)
    assert cache_of(tmp_path / "copy" / "run") == str(cache.path)
    assert f"{cache.path}, which is read; to read {tmp_path / 'copy' / 'cache'}, pass --cache" in caplog.text


def test_the_run_records_its_numeric_precision(cache: Cache, tmp_path: Path) -> None:
    quiet_run(cache, replace(CONFIG, deterministic=True), tmp_path / "run")
    record = RunFolder(tmp_path / "run").record()
    assert record is not None
    assert record.environment["tf32"] is False and record.environment["deterministic"] is True
    assert record.environment["device"] == "cpu"


def test_a_run_of_an_older_version_attends_without_positions(cache: Cache, tmp_path: Path) -> None:
    quiet_run(cache, replace(CONFIG, attention_positions="none"), tmp_path / "run")
    file = tmp_path / "run" / "config.toml"
    document = tomllib.loads(file.read_text())
    for name in ("attention_positions", "patience", "deterministic", "shared_sources"):
        del document["train"][name]
    file.write_text(tomli_w.dumps(document))
    assert load_run(tmp_path / "run").record.config.attention_positions == "none"


def test_keep_checkpoint_can_be_disabled(cache: Cache, tmp_path: Path) -> None:
    quiet_run(cache, CONFIG, tmp_path / "run", keep_checkpoint=False)
    assert not RunFolder(tmp_path / "run").checkpoint_file.exists()
    with pytest.raises(UsageError, match="epochs: 2, not 3"):
        quiet_run(cache, replace(CONFIG, epochs=3), tmp_path / "run")


def test_clips_json_lists_every_clip(cache: Cache, run: Path) -> None:
    clips = json.loads((run / "clips.json").read_text())
    assert {split: sorted(items) for split, items in clips.items()} == {
        "train": cache.items(split="train"),
        "val": cache.items(split="val"),
    }
    assert read_tensors(run / "model.safetensors")[0]


def test_a_symlinked_predictions_directory_is_rejected(cache: Cache, run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(run / "predictions" / "val")
    (run / "predictions" / "val").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="link"):
        evaluate_run(run, cache, device="cpu")
    assert not list(elsewhere.iterdir())


def test_storage_dtype_does_not_change_the_encoder_identity(
    cache: Cache, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = create_cache(tmp_path / "float32")
    for name, info in cache.streams().items():
        wide = info.dtype == "float16"
        other.declare(replace(info, dtype="float32") if wide else info)
        for item in cache.items(stream=name) if info.kind == "text" else cache.items():
            arrays = dict(cache.read(name, item).arrays)
            if wide:
                arrays["embedding"] = arrays["embedding"].astype(np.float32)
            other.write(name, item, arrays, meta=dict(cache.record(name, item).meta))
    with caplog.at_level("INFO"):
        report = evaluate_run(run, other, device="cpu", write=False)
    assert report["ccc"]["mean"] == pytest.approx(RunFolder(run).read_metrics()["ccc"]["mean"], abs=1e-6)
    assert "dtype: float32" in caplog.text


def test_audio_storage_dtype_does_not_change_the_encoder_identity(cache: Cache, tmp_path: Path) -> None:
    _, inputs = resolve(cache, CONFIG)
    other = create_cache(tmp_path / "other")
    for name, info in cache.streams().items():
        other.declare(replace(info, identity=info.identity | {"sound": "logmel float32"}) if name == AUDIO else info)
    stored = [replace(s, identity=dict(s.identity) | {"sound": "logmel float16"}) for s in inputs.streams]
    check_same([stream for stream in stored if stream.name == AUDIO], other)


def test_layer_norm_of_one_dimension_is_rejected(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", replace(TOY, widths=(12, 1)))
    with pytest.raises(UsageError, match=f"{AUDIO}.*one dimension.*normalize=standard"):
        resolve(cache, replace(CONFIG, normalize="layer"))
    resolve(cache, replace(CONFIG, normalize="standard"))


def test_a_constant_zero_prompt_loss_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache(tmp_path / "cache", replace(TOY, targets=(1,)))
    quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    assert "the prompt loss is 0" in caplog.text
    caplog.clear()
    quiet_run(cache, replace(CONFIG, epochs=1, kl_weight=0.0), tmp_path / "other")
    assert "the prompt loss is 0" not in caplog.text


def test_a_cache_without_prompts_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache(tmp_path / "cache", replace(TOY, text=False))
    for _ in range(3):
        resolve(cache, CONFIG)
    assert caplog.text.count("has no prompt embeddings") == 1


def test_training_and_prediction_compute_in_full_float32(cache: Cache, tmp_path: Path) -> None:
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for use in (lambda: quiet_run(cache, CONFIG, tmp_path / "run"), lambda: load_run(tmp_path / "run")):
        for switch in switches:
            switch.allow_tf32 = True
        use()
        assert not any(switch.allow_tf32 for switch in switches)
