"""Run directories: files, resumption, rejected combinations."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache
from vaflow.errors import CorruptError, DataError, FingerprintError, UsageError, VaflowError
from vaflow.files import read_tensors, write_tensors
from vaflow.train import evaluate, session
from vaflow.train.batch import Batch
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.data import load_data
from vaflow.train.evaluate import evaluate_run
from vaflow.train.inputs import resolve
from vaflow.train.run_folder import PROTOTYPES, RunFolder, load_run
from vaflow.train.run_record import RunRecord, new_record
from vaflow.train.train_run import Result, train_run
from vaflow.train.training_loop import Row
from vaflow.viewer.run_results import read_history

CONFIG = TrainConfig(hidden=16, lr=3e-3, batch_size=8, epochs=3, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("runs") / "cache", Toy(seconds=(8, 14)))


@pytest.fixture(scope="module")
def run(cache: Cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train_run(cache, CONFIG, out, tensorboard=False, figures=False)
    return out


def quiet_run(cache: Cache, config: TrainConfig, out: Path, **options) -> Result:
    return train_run(cache, config, out, tensorboard=False, figures=False, **options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "model.safetensors")[0]


def test_a_run_writes_all_its_files(cache: Cache, tmp_path: Path) -> None:
    result = train_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    events = {name for name in names if name.startswith("tensorboard/")}
    assert len(events) == 1
    assert names - events == {
        ".lock",
        "checkpoint.safetensors",
        "clips.json",
        "config.toml",
        "model.safetensors",
        "metrics.json",
        "history.csv",
        "predictions/val/sources.json",
        *(f"predictions/val/val{k}.csv" for k in range(3)),
        *(f"pictures/trace-val{k}.png" for k in range(3)),
        "pictures/training.png",
        "pictures/agreement.png",
    }
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == result.metrics
    assert {"split", "n_frames", "ccc", "ci95", "within_video_ccc", "rmse"} <= set(metrics)
    assert set(metrics["ccc"]) == set(metrics["ci95"]) == {"valence", "arousal", "mean"}


def test_the_record_contains_resolved_settings(cache: Cache, run: Path) -> None:
    record = RunFolder(run).record()
    assert record is not None
    assert record.config == replace(
        CONFIG, visual=(VISUAL,), audio=(AUDIO,), text=f"{VISUAL}.text", window=4.0, stride=1.5, frames=8
    )
    assert RunRecord.from_toml(record.to_toml()) == record
    assert record.cache == str(cache.path.resolve())
    infos = cache.streams()
    for stream in record.streams:
        assert stream.fingerprint == cache.fingerprint(stream.name)
        assert stream.identity == infos[stream.name].identity and stream.dim == infos[stream.name].dim
    assert record.data["train"]["clips"] == 6 and record.data["val"]["clips"] == 3
    history = read_history(run / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_a_loaded_run_predicts_like_the_trained_model(cache: Cache, run: Path) -> None:
    loaded = load_run(run)
    assert not loaded.model.training
    assert torch.equal(weights(run)[PROTOTYPES], resolve(cache, CONFIG)[1].prototypes)  # type: ignore[arg-type]
    again = evaluate_run(run, cache, device="cpu", write=False)
    metrics = RunFolder(run).read_metrics()
    for key, value in again.items():
        assert metrics[key] == value, key


def test_evaluating_writes_predictions_of_another_split(cache: Cache, run: Path) -> None:
    report = evaluate_run(run, cache, "train", device="cpu")
    assert report["split"] == "train" and report["n_clips"] == 6
    assert len(list(RunFolder(run).predictions("train").glob("*.csv"))) == 6


def test_a_finished_run_is_not_trained_again(cache: Cache, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaflow.train.train_run.fit", _never)
    result = quiet_run(cache, CONFIG, run)
    assert result.was_done and result.metrics == RunFolder(run).read_metrics()
    assert quiet_run(cache, replace(CONFIG, device="auto"), run).was_done


def _never(*args: object, **options: object) -> None:
    raise AssertionError("trained again")


def test_changed_settings_are_rejected_by_name(cache: Cache, run: Path) -> None:
    with pytest.raises(UsageError, match=r"other settings.*epochs: 3, not 2; seed: 0, not 1.*--config .*config.toml"):
        quiet_run(cache, replace(CONFIG, epochs=2, seed=1), run)


def interrupted(cache: Cache, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    def stop(config, bar, board):
        def report(row: Row) -> None:
            if row["epoch"] == after:
                raise KeyboardInterrupt

        return report

    with monkeypatch.context() as patch:
        patch.setattr(session, "reporter", stop)
        with pytest.raises(KeyboardInterrupt):
            quiet_run(cache, CONFIG, out)


def test_an_interrupted_run_resumes_to_the_same_result(cache: Cache, run: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    interrupted(cache, out, monkeypatch, after=2)
    with pytest.raises(UsageError, match=r"interrupted before it finished.*vaflow train"):
        load_run(out)
    result = quiet_run(cache, CONFIG, out)
    assert result.metrics == RunFolder(run).read_metrics()
    one, other = weights(out), weights(run)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_rejects_other_clips(tmp_path: Path, monkeypatch) -> None:
    cache = make_cache(tmp_path / "c", Toy(seconds=(8, 14)))
    interrupted(cache, tmp_path / "run", monkeypatch, after=1)
    cache.drop("labels", "train0")
    with pytest.raises(UsageError, match=r"train: removed train0.*--fresh"):
        quiet_run(cache, CONFIG, tmp_path / "run")


@pytest.mark.parametrize("changed", [{"visual": ("absent",)}, {"val_split": "absent"}, {"hidden": 9}])
def test_fresh_with_settings_that_do_not_fit_deletes_nothing(cache: Cache, run: Path, changed: dict) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"absent|must be even"):
        quiet_run(cache, replace(CONFIG, **changed), run, fresh=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_several_processes_train_no_heads(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"2 processes .* only for --finetune"):
        quiet_run(cache, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_prompts_are_rejected(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 1, "val": 1}, seconds=(4, 5)))
    quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run")
    text = f"{VISUAL}.text"
    cache.write(text, "default", dict(cache.read(text, "default").arrays), source={"prompts": {"templates": ["{}"]}})
    with pytest.raises(UsageError, match="prompts 'default': other templates, descriptions or encoder"):
        quiet_run(cache, replace(CONFIG, epochs=2), tmp_path / "run")
    assert RunFolder(tmp_path / "run").done


def test_a_longer_training_that_is_refused_keeps_the_scores(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 2, "val": 2}, seconds=(5, 6)))
    config = replace(CONFIG, epochs=1)
    metrics = quiet_run(cache, config, tmp_path / "run").metrics
    failure = {"item": "val2", "stage": "decode", "error": "MediaError", "message": "broken", "split": "val"}
    (cache.path / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    with pytest.raises(DataError, match="1 clip could not be extracted"):
        quiet_run(cache, replace(config, epochs=2), tmp_path / "run")
    assert quiet_run(cache, config, tmp_path / "run") == Result(metrics, was_done=True)


def test_an_evaluation_of_earlier_weights_does_not_replace_later_scores(
    cache: Cache, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    before = (out / "metrics.json").read_bytes()

    def finish_training(*_: object) -> None:
        write_tensors(out / "model.safetensors", {name: 2 * tensor for name, tensor in weights(out).items()})

    monkeypatch.setattr(evaluate, "check_same_targets", finish_training)  # another process, meanwhile
    with pytest.raises(VaflowError, match="was trained or smoothed while it was evaluated"):
        evaluate_run(out, cache)
    assert (out / "metrics.json").read_bytes() == before


def test_more_patience_continues_a_run(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 1, "val": 1}, seconds=(4, 5)))
    config = replace(CONFIG, lr=1e-9, epochs=AUTO, patience=1)
    for patience, waited in ((1, 3), (5, 5)):  # one step per epoch, and at least three epochs
        result = quiet_run(cache, replace(config, patience=patience), tmp_path / "run")
        assert result.metrics["epochs"] - result.metrics["best_epoch"] == waited and not result.was_done
    assert quiet_run(cache, replace(config, patience=2), tmp_path / "run").was_done
    with pytest.raises(UsageError, match="epochs: 'auto', not 9"):
        quiet_run(cache, replace(config, epochs=9), tmp_path / "run")


def test_loaded_data_can_be_shared(cache: Cache, run: Path, tmp_path: Path, monkeypatch) -> None:
    config, inputs = resolve(cache, CONFIG)
    data = load_data(cache, config, inputs)
    monkeypatch.setattr("vaflow.train.data.load_split", _never)
    result = quiet_run(cache, CONFIG, tmp_path / "run", data=data)
    assert result.metrics == RunFolder(run).read_metrics()


@pytest.mark.parametrize(
    "settings",
    [
        {"temporal": "tcn", "fusion": "attention-concat", "causal": False, "layers": 2, "kl_weight": 0.0},
        {"temporal": "transformer", "fusion": "gated", "attention_heads": 2, "region_labels": "hard"},
        {"temporal": "lstm", "audio": ("none",), "normalize": "standard", "label_reduction": "mean"},
        {"visual": ("none",), "learnable_prompts": True, "schedule": "cosine", "mse_weight": 0.1},
    ],
)
def test_every_kind_of_model_is_loaded_back(cache: Cache, tmp_path: Path, settings: dict) -> None:
    config = replace(CONFIG, epochs=1, **settings)
    quiet_run(cache, config, tmp_path / "run")
    again = evaluate_run(tmp_path / "run", cache, device="cpu", write=False)
    assert again["ccc"] == RunFolder(tmp_path / "run").read_metrics()["ccc"]
    assert (PROTOTYPES in weights(tmp_path / "run")) == (config.kl_weight > 0)


def test_prediction_does_not_require_the_cache(cache: Cache, run: Path) -> None:
    config, inputs = resolve(cache, CONFIG)
    windows = load_data(cache, config, inputs).val
    batch: Batch = windows.gather(torch.arange(4))
    output = load_run(run).model(batch)
    assert output.region_logits is not None and output.region_logits.shape == (4, 8, 9)


def test_a_cache_of_another_encoder_is_rejected(cache: Cache, run: Path, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=r"dim: 12, 10 in the run"):
        evaluate_run(run, make_cache(tmp_path / "c", Toy(widths=(12, 12))), device="cpu")


def test_evaluation_rejects_labelled_clips_without_features(tmp_path: Path, run: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(seconds=(8, 14)))
    cache.drop(VISUAL, "val0")
    cache.drop(AUDIO, "val0")
    with pytest.raises(DataError, match=r"no features: val0.*--allow-missing"):
        evaluate_run(run, cache, device="cpu", write=False)
    assert evaluate_run(run, cache, device="cpu", allow_missing=True, write=False)["n_clips"] == 2


def test_training_validates_its_arguments_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c", Toy(seconds=(8, 14)))
    cache.drop(VISUAL, "val0")
    cache.drop(AUDIO, "val0")
    with monkeypatch.context() as patch:
        patch.setattr("vaflow.train.train_run.fit", _never)
        with pytest.raises(DataError, match="val0"):
            quiet_run(cache, CONFIG, tmp_path / "run")
    result = quiet_run(cache, replace(CONFIG, epochs=1), tmp_path / "run", allow_missing=True)
    assert result.metrics["missing"]["clips"] == ["val0"]


def test_directories_without_a_run_are_rejected(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        load_run(tmp_path / "absent")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("miaow")
    with pytest.raises(UsageError, match=r"no config\.toml"):
        load_run(tmp_path / "photos")
    with pytest.raises(UsageError, match="is not empty and is not a run directory"):
        quiet_run(cache, CONFIG, tmp_path / "photos")
    with pytest.raises(UsageError, match="Cannot write the run directory"):
        quiet_run(cache, CONFIG, tmp_path / "photos" / "cat.jpg")


def test_damaged_runs_are_reported(cache: Cache, tmp_path: Path) -> None:
    config, inputs = resolve(cache, replace(CONFIG, window=4.0, stride=1.5, frames=8))
    folder = RunFolder(tmp_path)
    folder.write_record(new_record(cache.path, config, inputs))
    write_tensors(folder.weights_file, {"odd": torch.zeros(2)})
    with pytest.raises(CorruptError, match="does not fit"):
        load_run(tmp_path)
    folder.weights_file.write_bytes(b"\x10" + b"\0" * 30)
    with pytest.raises(CorruptError, match="damaged"):
        load_run(tmp_path)
    folder.config_file.write_text("vaflow = ")
    with pytest.raises(CorruptError, match="cannot be read"):
        load_run(tmp_path)


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}
    write_tensors(tmp_path / "t", tensors, {"note": "x"})
    read, note = read_tensors(tmp_path / "t")
    assert note == {"note": "x"} and all(np.array_equal(read[k], tensors[k]) for k in tensors)
