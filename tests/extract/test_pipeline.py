"""Stage one end to end on real files: correct frames and audio, each encoded once, for any order or store."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from affwild2_tree import Tree, decode_number
from PIL import Image
from tiny_extraction import CONFIG, assert_same_arrays, run

from vaflow.cache import Cache, open_cache
from vaflow.datasets import open_dataset
from vaflow.errors import FingerprintError
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.plan import Summary
from vaflow.timeline import nearest


@pytest.fixture(scope="module")
def extracted(tree: Tree, tiny_pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Summary]:
    """The tree with every quirk, extracted once with two workers, crops kept."""
    out = tmp_path_factory.mktemp("extracted") / "cache"
    config = ExtractConfig(visual=("clip-tiny",), audio=("ast-tiny",), device="cpu", workers=2, pixels=True)
    summary = run(open_dataset(tree.root, "affwild2"), out, tiny_pair, config)
    return open_cache(out), summary


def test_every_clip_is_extracted(extracted: tuple[Cache, Summary], tree: Tree) -> None:
    cache, summary = extracted
    clips = open_dataset(tree.root, "affwild2").clips
    assert cache.items() == sorted(clip.id for clip in clips)
    assert not summary.failures
    assert not (cache.path / "failures.jsonl").exists()


def test_crops_are_read_by_frame_number(extracted: tuple[Cache, Summary], tree: Tree) -> None:
    """Each crop shows its own 1-based number: it must be that of the frame nearest to the sample's time."""
    cache, _ = extracted
    for name, trial in tree.trials.items():
        if name not in cache.items():
            continue
        pixels, visual = cache.read("pixels", name), cache.read("clip-tiny", name)
        frame = nearest(trial.times, visual.time)
        assert visual.frame.tolist() == frame.tolist()
        has_crop = np.isin(frame + 1, trial.crops)
        assert visual.valid.tolist() == has_crop.tolist(), name
        assert pixels.valid.tolist() == has_crop.tolist()
        shown = [decode_number(np.asarray(Image.open(BytesIO(image)))) for image in pixels.images if image]
        assert shown == (frame[has_crop] + 1).tolist(), name


def test_a_missing_crop_is_masked_with_zero_features(extracted: tuple[Cache, Summary]) -> None:
    cache, _ = extracted
    assert not cache.read("clip-tiny", "video9").valid.any(), "it has a crop of one frame only, which is no sample"
    assert cache.read("clip-tiny", "video7").valid.all()
    for item in cache.items():
        visual = cache.read("clip-tiny", item)
        assert (visual.embedding[~visual.valid] == 0).all()
        assert (np.abs(visual.embedding[visual.valid].astype(float)).sum(axis=1) > 0).all()


def test_crops_are_stored_with_their_original_bytes(extracted: tuple[Cache, Summary], tree: Tree) -> None:
    cache, _ = extracted
    pixels = cache.read("pixels", "solo_left")
    for image, frame in zip(pixels.images, pixels.frame, strict=True):
        assert image == (tree.root / "cropped_aligned" / "solo_left" / f"{frame + 1:05d}.jpg").read_bytes()


def test_every_needed_frame_is_encoded_exactly_once(extracted: tuple[Cache, Summary]) -> None:
    cache, summary = extracted
    faces = sum(int(cache.read("clip-tiny", item).valid.sum()) for item in cache.items())
    windows = sum(int(cache.read("ast-tiny", item).valid.any(axis=1).sum()) for item in cache.items())
    assert summary.encoded == {"clip-tiny": faces, "ast-tiny": windows}


def test_embeddings_equal_encoding_the_stored_images(extracted: tuple[Cache, Summary], tiny_pair: tuple) -> None:
    """Encode images one by one; other batch sizes differ by float16 rounding."""
    cache, _ = extracted
    visual, pixels = cache.read("clip-tiny", "video7"), cache.read("pixels", "video7")
    encoder = tiny_pair[0]
    for k, image in enumerate(pixels.images):
        prepared = encoder.prepare(np.asarray(Image.open(BytesIO(image)).convert("RGB")))
        alone = encoder.encode(torch.from_numpy(prepared.copy())[None])[0].numpy()
        np.testing.assert_allclose(visual.embedding[k].astype(np.float32), alone, rtol=2e-3, atol=2e-3)


def test_labels_use_frame_times(extracted: tuple[Cache, Summary], tree: Tree) -> None:
    cache, _ = extracted
    for name, trial in tree.trials.items():
        if trial.labels is None or name not in cache.items():
            continue
        labels = cache.read("labels", name)
        rows = len(trial.labels)
        np.testing.assert_allclose(labels.time[: trial.times.size], trial.times, atol=1e-6)
        assert len(labels.time) == max(rows, trial.times.size)
        annotated = (trial.labels != -5).all(axis=1)
        assert labels.valid[:rows].all(axis=1).tolist() == annotated.tolist(), "-5 is never a target"
        np.testing.assert_allclose(labels.value[:rows][annotated], trial.labels[annotated], atol=1e-6)
        assert np.isnan(labels.value[~labels.valid]).all()


def test_left_and_right_share_video_and_audio(extracted: tuple[Cache, Summary]) -> None:
    cache, _ = extracted
    assert cache.meta("video5_left")["group"] == cache.meta("video5_right")["group"] == "video5"
    left, right = cache.read("logmel", "video5_left"), cache.read("logmel", "video5_right")
    assert left.embedding.tobytes() == right.embedding.tobytes()


def test_missing_audio_is_recorded_not_failed(extracted: tuple[Cache, Summary]) -> None:
    cache, _ = extracted
    assert cache.record("logmel", "video9").meta["audio"] == "absent"
    assert not cache.read("ast-tiny", "video9").valid.any()
    assert cache.read("logmel", "video9").embedding.shape[0] == 0
    assert cache.record("logmel", "8-30-64x64").meta["audio"] == "short"
    valid = cache.read("ast-tiny", "8-30-64x64").valid[0]
    assert valid[0]
    assert not valid[-1]


def test_merged_shards_equal_one_extraction(
    extracted: tuple[Cache, Summary], tree: Tree, tiny_pair: tuple, tmp_path: Path
) -> None:
    """Extracted by one and by three workers, to another store."""
    dataset = open_dataset(tree.root, "affwild2")
    parts = [
        run(dataset, tmp_path / "cache", tiny_pair, replace(CONFIG, workers=workers), shard=Shard(i, 2), store="hdf5")
        for i, workers in ((1, 1), (2, 3))
    ]
    assert sum(part.extracted for part in parts) == len(dataset.clips)
    assert min(part.extracted for part in parts) >= 3, "both shards must contain clips"
    assert [Path(part.failures_file).name for part in parts] == ["failures-1-of-2.jsonl", "failures-2-of-2.jsonl"]
    assert_same_arrays(extracted[0], open_cache(tmp_path / "cache"), ["labels", "logmel", "clip-tiny", "ast-tiny"])


def test_a_second_run_extracts_only_missing_items(two_clips: Path, tiny_pair: tuple, tmp_path: Path) -> None:
    visual, _ = tiny_pair
    out, dataset = tmp_path / "cache", open_dataset(two_clips, "videos")
    first = run(dataset, out, (visual, None), ExtractConfig(visual=("clip-tiny",), audio=(), device="cpu"))
    assert (first.extracted, first.done) == (2, 0)
    attempts = {item: open_cache(out).record("clip-tiny", item).attempt for item in ("obama", "face_noface")}

    again = run(dataset, out, (visual, None), ExtractConfig(visual=("clip-tiny",), audio=(), device="cpu"))
    assert (again.extracted, again.done, again.encoded) == (0, 2, {})

    more = run(dataset, out, tiny_pair)
    assert (more.extracted, more.done) == (2, 0)
    assert more.encoded["clip-tiny"] == 0, "adding an audio stream must not encode images again"
    cache = open_cache(out)
    assert {item: cache.record("clip-tiny", item).attempt for item in attempts} == attempts

    whole = tmp_path / "whole"
    run(dataset, whole, tiny_pair)
    assert_same_arrays(cache, open_cache(whole), ["labels", "logmel", "clip-tiny", "ast-tiny"])


def test_only_changed_sources_are_extracted_again(
    two_clips: Path, clips: Path, tiny_pair: tuple, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.mp4").write_bytes((clips / "obama.mp4").read_bytes())
    (root / "b.mp4").write_bytes((clips / "carphone.mp4").read_bytes())
    out = tmp_path / "cache"
    run(open_dataset(root, "videos"), out, tiny_pair)
    before = open_cache(out).record("clip-tiny", "b").attempt

    (root / "a.mp4").write_bytes((clips / "single_face.mp4").read_bytes())
    (root / "b.mp4").touch()  # newer, same content
    summary = run(open_dataset(root, "videos"), out, tiny_pair)
    assert (summary.extracted, summary.done, summary.changed) == (1, 1, 1)
    assert open_cache(out).meta("a")["duration"] == pytest.approx(2.4)
    assert open_cache(out).record("clip-tiny", "b").attempt == before


def test_changed_labels_rewrite_only_the_labels(clips: Path, tiny_pair: tuple, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.mp4").write_bytes((clips / "single_face.mp4").read_bytes())
    out = tmp_path / "cache"
    run(open_dataset(root, "videos"), out, tiny_pair)
    attempt = open_cache(out).record("clip-tiny", "a").attempt
    (root / "a.csv").write_text("frame,valence,arousal\n0,0.5,-0.5\n1,-5,-5\n")
    summary = run(open_dataset(root, "videos"), out, tiny_pair)
    assert summary.encoded == {"clip-tiny": 0, "ast-tiny": 0}
    cache = open_cache(out)
    assert cache.record("clip-tiny", "a").attempt == attempt
    assert cache.read("labels", "a").value[0].tolist() == [0.5, -0.5]
    assert not cache.read("labels", "a").valid[1:].any()


def test_changed_settings_are_rejected_naming_the_field(
    extracted: tuple[Cache, Summary], tree: Tree, tiny_pair: tuple
) -> None:
    config = ExtractConfig(visual=("clip-tiny",), audio=("ast-tiny",), device="cpu", stride=5.0)
    with pytest.raises(FingerprintError, match=r"sampling\.stride"):
        run(open_dataset(tree.root, "affwild2"), extracted[0].path, tiny_pair, config)


def test_one_person_is_followed_and_masked_where_the_face_leaves(
    two_clips: Path, tiny_pair: tuple, tmp_path: Path
) -> None:
    run(open_dataset(two_clips, "videos"), tmp_path / "cache", tiny_pair)
    cache = open_cache(tmp_path / "cache")
    assert cache.read("clip-tiny", "obama").valid.all()
    leaves = cache.read("clip-tiny", "face_noface")
    assert leaves.valid[leaves.time < 2].all()
    assert not leaves.valid[leaves.time > 3].any()
