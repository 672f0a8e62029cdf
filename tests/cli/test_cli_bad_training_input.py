"""Invalid input of stage two: one paragraph with the input, the choices or a remedy."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.schema import StreamInfo
from vaflow.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from synthetic_cache import Toy, make_cache

SMALL = ["--set", "hidden=16", "--lr", "3e-3", "--batch-size", "8", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("bad") / "cache", Toy(seconds=(8, 14)))


@pytest.fixture(scope="module")
def run(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad") / "run"
    assert main(["train", str(cache.path), "--out", str(out), *SMALL, "-q"]) == 0
    return out


@pytest.fixture
def cache_copy(cache: Cache, tmp_path: Path) -> Path:
    """A copy of the cache that tests may damage."""
    return Path(shutil.copytree(cache.path, tmp_path / "cache"))


@pytest.fixture
def interrupted(run: Path, tmp_path: Path) -> Path:
    """A run that was stopped after its first epoch: settings, but no weights and no metrics."""
    out = Path(shutil.copytree(run, tmp_path / "interrupted"))
    for name in ("model.safetensors", "metrics.json", "history.csv"):
        (out / name).unlink()
    shutil.rmtree(out / "predictions")
    return out


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, arguments: list[object], *words: str) -> None:
    """Assert the exit code and one paragraph with these words."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    stderr = capsys.readouterr().err
    [paragraph] = [line for line in stderr.splitlines() if line.startswith("vaflow: ")]
    for word in words:
        assert word in paragraph, paragraph


def train(cache: Path | str, out: Path, *options: object) -> list[object]:
    return ["train", cache, "--out", out, *SMALL, *options]


@pytest.mark.parametrize("option", ["--window=1e308", "--stride=1e308", "--frames=100000", "--window=nan"])
def test_window_sizes_are_limited(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert_refused(capsys, 2, train(cache.path, tmp_path / "run", option), option.partition("=")[0], "must be")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_numeric_features_are_rejected(
    cache_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    cache = open_cache(cache_copy, writable=True)
    arrays = {name: array.copy() for name, array in cache.read("toy-ears", "train4").arrays.items()}
    arrays["embedding"][np.nonzero(arrays["valid"])] = value
    with monkeypatch.context() as patch:  # written by a program that violates the schema
        patch.setattr("vaflow.cache.cache.array_problems", lambda *_: [])
        cache.write("toy-ears", "train4", arrays)
    assert_refused(
        capsys, 1, train(cache_copy, tmp_path / "run"), "'train4'", "'toy-ears'", "NaN or infinite", "Expected", "again"
    )


def test_out_of_range_labels_are_rejected(
    cache_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(cache_copy, writable=True)
    record, arrays = cache.committed("labels", "train2")
    value = np.where(arrays["valid"], 7.0, arrays["value"]).astype(np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("vaflow.cache.cache.array_problems", lambda *_: [])
        cache.write("labels", "train2", {**arrays, "value": value}, meta=record.meta)
    assert_refused(capsys, 1, train(cache_copy, tmp_path / "run"), "'train2'", "[-1, 1]")


def test_missing_and_unlabelled_splits_are_rejected(
    cache_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert_refused(
        capsys,
        2,
        train(cache_copy, out, "--set", "train_split=trian"),
        "trian",
        "train, val",
        "Did you mean",
    )
    cache = open_cache(cache_copy, writable=True)
    for item in cache.items(split="val"):
        record, arrays = cache.committed("labels", item)
        bare = {**arrays, "valid": np.zeros_like(arrays["valid"]), "value": np.full_like(arrays["value"], np.nan)}
        cache.write("labels", item, bare, meta=record.meta)
    assert_refused(capsys, 2, train(cache_copy, out), "split 'val'", "annotated", "Choose another split")
    for item in cache.items(split="train"):
        cache.drop("labels", item)
    assert_refused(capsys, 2, train(cache_copy, out), "train", "Choices: val")


def test_missing_streams_are_rejected(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert_refused(
        capsys, 2, train(cache.path, out, "--visual", "toy-eye"), "Choices: toy-eyes", "Did you mean 'toy-eyes'"
    )
    assert_refused(capsys, 2, train(cache.path, out, "--audio", "ast"), "ast", "Choices: toy-ears")
    assert_refused(capsys, 2, train(cache.path, out, "--set", "text=clip.text"), "clip.text", "Choices: toy-eyes.text")
    assert not (out / "config.toml").exists()


def test_empty_caches_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = create_cache(tmp_path / "an empty cache")
    remedy = f"vaflow extract DATA --out '{empty.path}'"  # with a quoted path
    assert_refused(capsys, 2, train(empty.path, tmp_path / "run"), "nothing to train on", remedy)
    other = f"vaflow extract ROOT --out '{empty.path}' --visual clip-tiny --audio none"
    assert_refused(capsys, 2, train(empty.path, tmp_path / "run", "--visual", "clip-tiny"), "Choices: none", other)
    empty.declare(StreamInfo("toy-eyes", "visual", 3, "float16", {"encoder": "toy"}))
    empty.declare(StreamInfo("labels", "labels", 0, "float32", {"encoder": "labels"}))
    assert_refused(capsys, 2, train(empty.path, tmp_path / "run"), "has no clips", remedy)


def test_another_schema_version_is_rejected(
    cache_copy: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((cache_copy / "manifest.json").read_text())
    (cache_copy / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 77}))
    for command in (
        train(cache_copy, tmp_path / "run"),
        ["evaluate", run, "--cache", cache_copy],
        ["folds", cache_copy],
    ):
        assert_refused(capsys, 2, command, "77", "schema version", "Expected: 1", "extract")


def test_a_cache_with_other_settings_is_rejected(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_cache(tmp_path / "other", Toy(seconds=(8, 14), widths=(13, 10)))
    words = ("'toy-eyes'", "dim: 13, 12 in the run", "Extract the clips again")
    assert_refused(capsys, 2, ["evaluate", run, "--cache", other.path], *words)
    assert_refused(capsys, 2, ["ensemble", run, "--cache", other.path, "--out", tmp_path / "e"], *words)
    assert_refused(capsys, 2, train(other.path, run), "other settings", "toy-eyes", "another --out")


def on_runs(run: Path, out: Path, cache: Cache) -> list[list[object]]:
    """Every command that reads a run."""
    sample = out / "sample.txt"
    sample.write_text("image_location,valence,arousal\nval0/00001.jpg,0,0\n")
    clip = out / "clip.mp4"
    clip.touch()
    return [
        ["evaluate", run],
        ["predict", run, clip, "--out", out / "predictions"],
        ["ensemble", run, "--out", out / "ensemble"],
        ["submit", run, "--cache", cache.path, "--sample", sample, "--out", out / "submission.txt"],
    ]


def test_directories_without_a_run_are_rejected(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (tmp_path / "absent", empty, cache.path):
        for command in on_runs(folder, tmp_path, cache):
            assert_refused(capsys, 2, command, str(folder), "not a run", "vaflow train")
    assert not any((tmp_path / name).exists() for name in ("predictions", "ensemble", "submission.txt"))


def test_unfinished_runs_are_rejected(
    interrupted: Path, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in on_runs(interrupted, tmp_path, cache):
        assert_refused(capsys, 2, command, "interrupted", f"vaflow train {cache.path} --out {interrupted}")
    capsys.readouterr()
    assert main(["train", str(cache.path), "--out", str(interrupted), *SMALL]) == 0, "the printed remedy fails"
    assert main(["evaluate", str(interrupted)]) == 0


def test_a_damaged_run_is_rejected(run: Path, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-10])
    assert_refused(capsys, 1, ["evaluate", broken], "model.safetensors", "damaged")
    (broken / "model.safetensors").write_bytes(data)
    (broken / "config.toml").write_text("[train\n")
    assert_refused(capsys, 1, ["evaluate", broken], "config.toml", "cannot be read")
    assert_refused(capsys, 1, train(cache.path, broken), "config.toml", "cannot be read")


def test_unwritable_output_paths_are_rejected(
    cache: Cache, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert_refused(capsys, 2, train(cache.path, out), str(out), "Cannot write")
        assert_refused(capsys, 2, ["ensemble", run, "--out", out], str(out))
        assert_refused(capsys, 2, ["labels", "agree", run, "--out", out], f"Cannot write --out {out}")
        assert_refused(capsys, 2, ["export", run, out], f"Cannot write DIR {out}")
        assert_refused(capsys, 2, ["export", run, out, "--format", "csv"], f"Cannot write DIR {out}")
    for out in (tmp_path, file / "below"):
        assert_refused(capsys, 2, ["submit", run, "--sample", file, "--out", out], "submission cannot be written")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert_refused(
        capsys, 2, train(cache.path, foreign), "is not empty and is not a run directory", "Choose another --out"
    )
    assert file.read_text() == "mine"
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_a_dataset_given_as_cache_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.mp4").write_bytes(b"")
    assert_refused(capsys, 2, ["train", data, "--out", tmp_path / "run"], f"vaflow extract {data} --out {data}.cache")


def test_a_run_with_a_missing_cache_is_rejected(
    run: Path, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved" / "run"
    shutil.copytree(run, moved)
    text = (moved / "config.toml").read_text().replace(str(cache.path.resolve()), "/nowhere/cache")
    (moved / "config.toml").write_text(text)
    assert_refused(capsys, 2, ["evaluate", moved], "/nowhere/cache", "--cache CACHE")
    assert main(["evaluate", str(moved), "--cache", str(cache.path), "-q"]) == 0
