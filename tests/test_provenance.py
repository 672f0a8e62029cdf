"""Every prediction is traced to its run, weights, cache records and source files; changes are detected."""

import hashlib
import json
import os
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.copy import convert
from vaflow.cache.schema import LABELS, Array, StreamInfo
from vaflow.cli import main
from vaflow.datasets import Dataset, open_dataset
from vaflow.errors import UsageError
from vaflow.extract.plan import Summary
from vaflow.extract.source_files import part_of, same_part, sources_of
from vaflow.extract.streams import SOURCES
from vaflow.predict import PredictConfig, predict_media
from vaflow.provenance import find_provenance
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.smoothing import Smoothing, write_smoothing
from vaflow.train.train_run import train_run
from vaflow.viewer import find_predictions

SPLITS = {"a": "train", "b": "train", "sub/c": "val", "d": "val"}
IDENTITY = {"encoder": "toy", "weights": "0123456789abcdef" * 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset whose videos are never decoded; only their bytes matter."""
    folder = tmp_path / "data"
    for item in SPLITS:
        (folder / item).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{item}.mp4").write_bytes(f"video {item}".encode())
        (folder / f"{item}.csv").write_text("frame,valence,arousal\n0,0.1,0.2\n")
    rows = [f"{item},{split}" for item, split in SPLITS.items()]
    (folder / "splits.csv").write_text("\n".join(["name,split", *rows]) + "\n")
    return folder


@pytest.fixture
def cache(tmp_path: Path, root: Path) -> Cache:
    made = new_cache(tmp_path / "cache")
    for clip in open_dataset(root).clips:
        write(made, clip.id, sources_of(clip))
    return made


def new_cache(path: Path) -> Cache:
    made = create_cache(path)
    made.declare(StreamInfo("toy", "visual", 4, "float16", IDENTITY))
    made.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": "labels"}))
    return made


def write(cache: Cache, item: str, sources: dict, seed: int = 0) -> None:
    rng = np.random.default_rng([seed, *item.encode()])
    time = np.arange(24) / 2
    embedding = rng.normal(size=(24, 4)).astype(np.float16)
    features: dict[str, Array] = {"embedding": embedding, "time": time, "valid": np.ones(24, bool)}
    labels: dict[str, Array] = {
        "time": time,
        "value": rng.uniform(-1, 1, (24, 2)).astype(np.float32),
        "valid": np.ones((24, 2), bool),
    }
    for name, kind, arrays in (("toy", "visual", features), (LABELS, "labels", labels)):
        source = {part: sources[part] for part in SOURCES[kind] if part in sources}
        meta = {"vaflow": "0.0", "split": SPLITS.get(item), "duration": 12.0}
        cache.write(name, item, arrays, source=source, meta=meta)


@pytest.fixture
def run(tmp_path: Path, cache: Cache) -> Path:
    config = TrainConfig(epochs=1, hidden=8, kl_weight=0.0, centers=0.7, window=6.0, stride=3.0, frames=6, device="cpu")
    train_run(cache, config, tmp_path / "run", tensorboard=False, figures=False)
    return tmp_path / "run"


def only(trace: dict) -> dict:
    (entry,) = trace["predictions"]
    entry_: dict = entry
    return entry_


def test_a_prediction_is_traced_to_its_inputs(run, cache, root):
    trace = find_provenance(run, "sub/c", root=root)
    entry = only(trace)
    assert entry["csv"] == str(run / "predictions" / "val" / "sub/c.csv")
    assert (entry["state"], entry["csv_state"], entry["weights_state"]) == ("same", "same", "same")
    assert entry["streams"] == {"toy": cache.fingerprint("toy"), LABELS: cache.fingerprint(LABELS)}
    for name in ("toy", LABELS):
        record = cache.record(name, "sub/c")
        facts = entry["records"][name]
        assert (facts["attempt"], facts["created"], facts["vaflow"]) == (record.attempt, record.created, "0.0")
        assert (facts["source"], facts["state"]) == (record.source, "same")
    states = {one["part"]: (one["state"], one["streams"]) for one in entry["sources"]}
    assert states == {
        "video": ("same", ["toy", LABELS]),
        "labels": ("same", [LABELS]),
        "split": ("same", [LABELS]),
        "group": ("same", [LABELS]),
    }
    (stream,) = trace["streams"]
    assert (stream["fingerprint"], stream["identity"], stream["state"]) == (cache.fingerprint("toy"), IDENTITY, "same")
    assert trace["run"]["settings"]["epochs"] == 1
    assert list(trace["run"]["weights"]) == ["model.safetensors"]
    assert trace["cache"] == {"path": str(cache.path), "state": "found", "store": "zarr"}


def test_provenance_without_an_item_lists_everything(run):
    entries = find_provenance(run)["predictions"]
    assert [entry["item"] for entry in entries] == ["d", "sub/c"]
    assert {one["state"] for entry in entries for one in entry["sources"]} == {"not checked"}


def test_changed_and_missing_source_files_are_detected(run, root):
    video, labels = root / "d.mp4", root / "d.csv"
    stat = video.stat()
    video.write_bytes(b"VIDEO d")  # of the same size, and as old as before
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    labels.unlink()
    states = {one["part"]: one["state"] for one in only(find_provenance(run, "d", root=root))["sources"]}
    assert (states["video"], states["labels"]) == ("changed", "missing")


def test_a_touched_or_renamed_root_is_unchanged_data(run, root, tmp_path):
    os.utime(root / "d.mp4")
    root.rename(tmp_path / "moved")
    states = {one["state"] for one in only(find_provenance(run, "d", root=tmp_path / "moved"))["sources"]}
    assert states == {"same"}


def test_a_clip_removed_from_the_dataset_is_reported(run, root):
    (root / "d.mp4").unlink()
    (root / "splits.csv").unlink()
    assert {one["state"] for one in only(find_provenance(run, "d", root=root))["sources"]} == {"missing"}


def test_edited_predictions_and_other_weights_are_detected(run):
    csv = run / "predictions" / "val" / "d.csv"
    csv.write_text(csv.read_text().replace("0", "1", 1))
    entry = only(find_provenance(run, "d"))
    assert (entry["state"], entry["csv_state"], entry["weights_state"]) == ("changed", "changed", "same")
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert only(find_provenance(run, "sub/c"))["weights_state"] == "changed"
    config = run / "config.toml"
    config.write_text(config.read_text().replace("epochs = 1", "epochs = 2"))
    assert only(find_provenance(run, "sub/c"))["settings_state"] == "changed"
    csv.unlink()
    assert only(find_provenance(run, "d"))["csv_state"] == "missing"


def test_a_smoothing_that_was_added_is_a_change(run):
    write_smoothing(run, Smoothing("mean", 2.0))
    assert only(find_provenance(run, "d"))["weights_state"] == "changed"


def test_rewritten_copied_and_dropped_items_are_detected(run, cache, root, tmp_path):
    convert(cache, tmp_path / "copy", "hdf5")
    states = [facts["state"] for facts in only(find_provenance(run, "d", cache=tmp_path / "copy"))["records"].values()]
    assert states == ["a copy", "a copy"]
    clip = next(clip for clip in open_dataset(root).clips if clip.id == "d")
    (root / "d.mp4").write_bytes(b"another take")
    write(cache, "d", sources_of(clip), seed=1)
    cache.drop("toy", "sub/c")
    assert [f["state"] for f in only(find_provenance(run, "d"))["records"].values()] == ["changed", "changed"]
    assert [f["state"] for f in only(find_provenance(run, "sub/c"))["records"].values()] == ["missing", "same"]
    assert cache.record("toy", "d").attempt != only(find_provenance(run, "d"))["records"]["toy"]["attempt"]


def test_recorded_provenance_is_shown_without_the_cache(run, cache, tmp_path):
    attempt = cache.record("toy", "d").attempt
    cache.path.rename(tmp_path / "elsewhere")
    trace = find_provenance(run, "d")
    facts = only(trace)["records"]["toy"]
    assert (trace["cache"]["state"], facts["attempt"], facts["state"]) == ("missing", attempt, "not checked")
    assert trace["streams"][0]["state"] == "not checked"
    assert only(find_provenance(run, "d", cache=tmp_path / "elsewhere"))["records"]["toy"]["state"] == "same"
    with pytest.raises(UsageError):
        find_provenance(run, cache=tmp_path / "nowhere")


def test_settings_that_an_older_version_did_not_have_are_not_changes(run):
    config, sources = run / "config.toml", run / "predictions" / "val" / "sources.json"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("patience =")]
    config.write_text("\n".join(lines))
    table = tomllib.loads(config.read_text())["train"]
    digest = hashlib.blake2b(json.dumps(table, sort_keys=True, separators=(",", ":")).encode(), digest_size=16)
    sources.write_text(json.dumps(json.loads(sources.read_text()) | {"settings": digest.hexdigest()}))
    assert {entry["settings_state"] for entry in find_provenance(run)["predictions"]} == {"same"}


def test_predictions_on_another_cache_name_that_cache(run, cache, tmp_path):
    other = create_cache(tmp_path / "other", store="hdf5")
    convert(cache, other.path, "hdf5")
    other = open_cache(other.path, writable=True)
    evaluate_run(run, other, "train", device="cpu")
    entry = next(entry for entry in find_provenance(run, "a")["predictions"])
    assert entry["cache"] == str(other.path)
    assert entry["records"]["toy"]["attempt"] == other.record("toy", "a").attempt
    assert entry["records"]["toy"]["state"] == "same"


def test_predictions_of_new_clips_are_traced_without_stored_features(run, tmp_path, monkeypatch):
    def features(dataset: Dataset, folder: Path, *_: object, **__: object) -> Summary:
        """Replaces the extraction, which would decode videos."""
        for clip in dataset.clips:
            write(new_cache(folder), clip.id, sources_of(clip))
        return Summary()

    video, out = tmp_path / "new.mp4", tmp_path / "out"
    video.write_bytes(b"new")
    monkeypatch.setattr("vaflow.predict.extract", features)
    predict_media(run, [video], out, PredictConfig(device="cpu"))
    entry = only(find_provenance(run, "new", predictions=out))
    assert (entry["state"], entry["csv_state"], entry["csv"]) == ("same", "same", str(out / "new.csv"))
    assert entry["records"]["toy"]["source"]["video"]["name"] == "new.mp4"
    assert entry["records"]["toy"]["state"] == "not checked"
    assert {one["part"]: one["state"] for one in entry["sources"]}["video"] == "same"
    assert find_provenance(out, "new") == find_provenance(run, "new", predictions=out)
    assert find_predictions(out).centers == 0.7
    video.write_bytes(b"NEW")
    assert {one["part"]: one["state"] for one in only(find_provenance(run, "new", predictions=out))["sources"]}[
        "video"
    ] == ("changed")


def test_items_of_persons_are_compared_with_the_files_of_their_clip(run, cache, root, tmp_path, monkeypatch):
    whole = next(clip for clip in open_dataset(root).clips if clip.id == "d")
    write(cache, "d#2", sources_of(whole))

    def features(dataset: Dataset, folder: Path, *_: object, **__: object) -> Summary:
        write(new_cache(folder), "new#1", sources_of(dataset.clips[0]))
        return Summary()

    predict_media(run, [], tmp_path / "cached", PredictConfig(device="cpu", cache=cache.path))
    entry = only(find_provenance(tmp_path / "cached", "d#2", root=root))
    assert {one["state"] for one in entry["sources"]} == {"same"}
    (tmp_path / "new.mp4").write_bytes(b"new")
    monkeypatch.setattr("vaflow.predict.extract", features)
    predict_media(run, [tmp_path / "new.mp4"], tmp_path / "out", PredictConfig(device="cpu"))
    entry = only(find_provenance(tmp_path / "out", "new#1"))
    assert {one["state"] for one in entry["sources"]} == {"same"}


def test_older_predictions_are_described_from_the_cache_and_marked(run, cache):
    (run / "predictions" / "val" / "sources.json").unlink()
    entry = only(find_provenance(run, "d"))
    assert entry["state"] == "not recorded"
    assert entry["records"]["toy"]["attempt"] == cache.record("toy", "d").attempt
    assert entry["records"]["toy"]["state"] == "not recorded"


def test_missing_items_and_runs_are_usage_errors(run, tmp_path, capsys):
    assert main(["provenance", str(run), "e"]) == 2
    assert "Got: e. Choices: d, sub/c" in capsys.readouterr().err
    assert main(["provenance", str(tmp_path / "nowhere")]) == 2
    assert main(["provenance", str(run), "--root", str(tmp_path / "nowhere")]) == 2
    (run / "predictions" / "val" / "sources.json").write_text("{}")
    assert main(["provenance", str(run)]) == 1


def test_the_command(run, root, cache, capsys):
    assert main(["provenance", str(run), "sub/c", "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    for part in (
        cache.fingerprint("toy")[:12],
        IDENTITY["weights"][:12],
        cache.record("toy", "sub/c").attempt,
        "c.mp4",
    ):
        assert part in printed
    assert main(["provenance", str(run)]) == 0
    assert re.search(r"sub/c +val +same +same +not checked", capsys.readouterr().out)
    assert main(["provenance", str(run), "sub/c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(find_provenance(run, "sub/c")))


def test_components_are_compared_by_content(root):
    clip = next(clip for clip in open_dataset(root).clips if clip.id == "a")
    whole = sources_of(clip)
    assert {part: part_of(clip, part) for part in whole} == whole
    for part in whole:
        assert same_part(whole[part], json.loads(json.dumps(whole[part])))
    assert not same_part(whole["video"], whole["labels"])
    assert same_part(whole["video"], whole["video"] | {"name": "b.mp4", "mtime_ns": 0})


def test_the_old_name_works_with_a_warning(run, capsys):
    assert main(["trace", str(run), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["predictions"]
    assert "`vaflow trace` is now `vaflow provenance`" in printed.err
