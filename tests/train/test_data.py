"""A split in memory equals reading the cache window by window."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.export import pack
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.errors import DataError, FingerprintError, UsageError
from vaflow.timeline import Grid
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split, load_windows, make_packs
from vaflow.train.inputs import check_same, resolve
from vaflow.train.metrics import region_occupancy
from vaflow.train.run_record import clip_digests, describe_labels
from vaflow.train.windows import WindowSet

GRID = Toy().grid


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def load(cache: Cache, config: TrainConfig | None = None, split: str = "train", **options: Any) -> WindowSet:
    config, inputs = resolve(cache, config or TrainConfig())
    return load_split(cache, split, inputs.streams, config, **options)


def every_window(windows: WindowSet):
    for clip in windows.clips:
        for w in range(clip.first, clip.last):
            yield clip, w - clip.first, w


def test_batches_equal_the_cached_arrays(cache: Cache) -> None:
    windows = load(cache)
    batch = windows.gather(torch.arange(len(windows)))
    for clip, rows, w in every_window(windows):
        visual, audio, labels = (cache.read(name, clip.item) for name in (VISUAL, AUDIO, LABELS))
        start = audio.start[rows]
        for k in range(GRID.frames):
            t = start + k * GRID.step
            assert batch.inside[w, k] == (t < clip.duration)
            matches = np.flatnonzero(np.isclose(visual.time, t))
            has_face = bool(len(matches)) and bool(visual.valid[matches[0]])
            assert batch.valid[VISUAL][w, k] == has_face
            assert (batch.features[VISUAL][w, k].numpy() == (visual.embedding[matches[0]] if has_face else 0)).all()
            row = np.abs(labels.time - t).argmin()
            known = labels.valid[row] & (t < clip.duration) & (np.abs(labels.time[row] - t) <= GRID.step / 2)
            assert (batch.labelled[w, k].numpy() == known).all()
            assert (batch.target[w, k].numpy() == np.where(known, labels.value[row], 0)).all()
        audio_valid = audio.valid[rows] & batch.feature_inside[AUDIO][w].numpy()
        assert (batch.valid[AUDIO][w].numpy() == audio_valid).all()
        assert (batch.features[AUDIO][w].numpy() == np.where(audio_valid[:, None], audio.embedding[rows], 0)).all()
        np.testing.assert_allclose(batch.feature_time[AUDIO][w].numpy(), audio.time[rows] - start, atol=1e-5)
    np.testing.assert_allclose(batch.time[0].numpy(), np.arange(GRID.frames) * GRID.step)
    assert batch.features[VISUAL].dtype == torch.float32


def test_gathering_batches_reads_no_file(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = load(cache)
    monkeypatch.setattr(Cache, "read", _never)
    monkeypatch.setattr(Path, "open", _never)
    batches = [windows.gather(ids) for ids in windows.shuffled(4, torch.Generator().manual_seed(0))]
    assert sum(len(batch.window) for batch in batches) >= len(windows)


def _never(*args: object, **options: object) -> None:
    raise AssertionError("a file was read")


def test_every_array_is_read_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, str]] = []
    real = Cache.read

    def counting(self: Cache, stream: str, item: str, *args: Any, **options: Any) -> Any:
        read.append((stream, item))
        return real(self, stream, item, *args, **options)

    monkeypatch.setattr(Cache, "read", counting)
    config, inputs = resolve(cache, TrainConfig())
    read.clear()
    load_split(cache, "train", inputs.streams, config)
    assert sorted(read) == sorted((s, i) for s in (VISUAL, AUDIO, LABELS) for i in cache.items(split="train"))


def test_a_memory_mapped_split_gives_equal_batches(cache: Cache, tmp_path: Path) -> None:
    held, mapped = load(cache), load(cache, budget=0, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []  # the scratch file has no name
    ids = torch.arange(len(held)).flip(0)
    one, other = held.gather(ids), mapped.gather(ids)
    for name in (VISUAL, AUDIO):
        assert torch.equal(one.features[name], other.features[name])
        assert torch.equal(one.valid[name], other.valid[name])
    assert torch.equal(one.target, other.target)


def test_a_subset_of_the_streams_can_be_memory_mapped(cache: Cache) -> None:
    held = load(cache)
    rows = held.tables[VISUAL].rows
    part = load(cache, budget=rows.numel() * 2)
    assert torch.equal(part.gather(torch.arange(9)).features[AUDIO], held.gather(torch.arange(9)).features[AUDIO])


def test_features_that_exceed_the_memory_of_a_gpu_stay_in_host_memory(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocation only, which needs no GPU: nothing fits on the device, and one stream fits in host memory."""
    streams, items = resolve(cache, TrainConfig())[1].streams, cache.items("train")

    def mapped(host: int) -> list[bool]:
        monkeypatch.setattr("vaflow.train.data.default_budget", lambda device: 0 if device.type == "cuda" else host)
        packs = make_packs(cache, items, streams, torch.device("cuda"), None, tmp_path).values()
        assert {pack.rows.device.type for pack in packs} == {"cpu"}
        return [pack.mapped for pack in packs]

    first = make_packs(cache, items, streams, torch.device("cpu"), None, tmp_path)[streams[0].name].rows
    assert mapped(10**9) == [False, False]
    assert mapped(first.numel() * first.element_size()) == [False, True]
    assert mapped(0) == [True, True]


def test_shuffling_visits_every_labelled_window_once(cache: Cache) -> None:
    windows = load(cache)
    batches = list(windows.shuffled(4, torch.Generator().manual_seed(1)))
    again = list(windows.shuffled(4, torch.Generator().manual_seed(1)))
    other = torch.cat(list(windows.shuffled(4, torch.Generator().manual_seed(2))))
    order = torch.cat(batches)
    assert torch.equal(order, torch.cat(again)) and not torch.equal(order, other)
    assert sorted(order.tolist()) == windows.trainable.tolist()
    assert len(batches) == -(-len(windows.trainable) // 4)  # the last, smaller batch is not dropped
    assert torch.cat(list(windows.in_order(7))).tolist() == list(range(len(windows)))


def test_unlabelled_windows_are_excluded_from_training_only(tmp_path: Path) -> None:
    windows = load(make_cache(tmp_path / "c", Toy(unlabelled=0.6)))
    labelled = windows.labelled.flatten(1).any(dim=1)
    assert 0 < len(windows.trainable) < len(windows)
    assert windows.trainable.tolist() == labelled.nonzero().flatten().tolist()


def test_other_training_windows(cache: Cache) -> None:
    """Half the frame rate: every frame is one that was cached."""
    windows = load(cache, TrainConfig(window=6.0, stride=2.0, frames=6))
    batch = windows.gather(torch.arange(len(windows)))
    grid = Grid(6.0, 2.0, 6)
    assert batch.features[AUDIO].shape[1] == 12  # audio keeps its own rate
    for clip, rows, w in every_window(windows):
        visual = cache.read(VISUAL, clip.item)
        start = grid.seconds(grid.starts(clip.duration))[rows]
        for k in range(6):
            matches = np.flatnonzero(np.isclose(visual.time, start + k))
            has_face = bool(len(matches)) and bool(visual.valid[matches[0]])
            assert batch.valid[VISUAL][w, k] == has_face
            assert (batch.features[VISUAL][w, k].numpy() == (visual.embedding[matches[0]] if has_face else 0)).all()


def test_setting_only_the_window_keeps_the_cached_frame_rate(cache: Cache) -> None:
    config, _ = resolve(cache, TrainConfig(window=2.0))
    assert (config.window, config.stride, config.frames) == (2.0, 1.5, 4)


def test_streams_without_sampling_facts_are_rejected(tmp_path: Path) -> None:
    windows = load(make_cache(tmp_path / "c", Toy(sampling=False)))
    assert windows.time.tolist() == pytest.approx((np.arange(20) * 0.5).tolist())  # the default grid
    assert windows.tables[AUDIO].index.shape[1] == 20  # 10 s at its own 0.5 s
    assert (windows.tables[AUDIO].index > 0).float().mean() > 0.6


def imported(path: Path, rate: float) -> Cache:
    """A visual stream of any rate, as `cache import` makes it, one-dimensional labels, no duration."""
    cache = create_cache(path)
    cache.declare(StreamInfo("mine", "visual", 3, "float32", {"encoder": "imported", "rate": rate}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": "imported"}))
    for item, split in (("a", "train"), ("b", "val")):
        time = np.arange(0, 12, 1 / rate)
        embedding = np.repeat(time[:, None], 3, axis=1).astype(np.float32)
        cache.write("mine", item, {"embedding": embedding, "time": time, "valid": np.ones(len(time), bool)})
        clock = np.arange(0, 12, 0.25)
        value = np.stack([np.full(len(clock), np.nan), np.sin(clock)], axis=1).astype(np.float32)
        labels = {"time": clock, "value": value, "valid": np.isfinite(value)}
        cache.write(LABELS, item, labels, meta={"split": split})
    return cache


@pytest.mark.parametrize("rate", [1.0, 4.0, 25.0])
def test_imported_features_may_have_any_rate(tmp_path: Path, rate: float) -> None:
    windows = load(imported(tmp_path / "c", rate), TrainConfig(window=4, stride=2, frames=8))
    batch = windows.gather(torch.arange(len(windows)))
    inside = windows.inside_array
    read = batch.features["mine"][..., 0].numpy()[inside]
    times = windows.sample_time[inside]
    valid = batch.valid["mine"].numpy()[inside]
    assert valid.all()
    assert np.abs(read - times).max() <= 0.5 / rate + 1e-6
    assert not batch.labelled[..., 0].any() and batch.labelled[..., 1].numpy()[inside].all()


def test_clips_missing_a_stream_are_listed(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    cache.drop(AUDIO, "train1")
    windows = load(cache)
    clip = next(clip for clip in windows.clips if clip.item == "train1")
    batch = windows.gather(torch.arange(clip.first, clip.last))
    assert clip.missing == (AUDIO,)
    assert not batch.valid[AUDIO].any() and batch.valid[VISUAL].any()
    assert (batch.feature_inside[AUDIO][:, 0]).all()  # the input is missing, but the clip continues


def test_one_modality_is_supported(cache: Cache) -> None:
    config, inputs = resolve(cache, TrainConfig(audio=("none",)))
    windows = load_split(cache, "val", inputs.streams, config)
    assert list(windows.gather(torch.tensor([0])).features) == [VISUAL]
    config, inputs = resolve(cache, TrainConfig(visual=("none",)))
    assert [s.name for s in inputs.streams] == [AUDIO]
    assert inputs.prototypes is not None and config.text == f"{VISUAL}.text"


def test_log_mel_is_an_audio_stream_of_many_steps(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(logmel=True, splits={"train": 1}))
    windows = load(cache, TrainConfig(audio=("logmel",)))
    batch = windows.gather(torch.arange(len(windows)))
    clip = windows.clips[0]
    mel = cache.read("logmel", clip.item)
    starts = GRID.seconds(GRID.starts(clip.duration))
    for w, start in enumerate(starts):
        first = round(start * 100)
        part = mel.embedding[first : first + 400]
        assert (batch.features["logmel"][w, : len(part)].numpy() == part).all()
        assert not batch.valid["logmel"][w, len(part) :].any()


def poisoned(path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> Cache:
    """A cache with one item written by a program without validation."""
    cache = make_cache(path)
    monkeypatch.setattr("vaflow.cache.cache.array_problems", lambda info, arrays: [])
    arrays = {name: array.copy() for name, array in cache.read(VISUAL, "train2").arrays.items()}
    change(arrays)
    cache.write(VISUAL, "train2", arrays)
    return cache


def _nan_where_valid(arrays: dict[str, Any]) -> None:
    arrays["embedding"][np.flatnonzero(arrays["valid"])[3], 5] = np.nan


def _infinite_where_valid(arrays: dict[str, Any]) -> None:
    arrays["embedding"][np.flatnonzero(arrays["valid"])[3], 5] = np.inf


def _nan_where_invalid(arrays: dict[str, Any]) -> None:
    arrays["embedding"][~arrays["valid"]] = np.nan


@pytest.mark.parametrize("change", [_nan_where_valid, _infinite_where_valid])
def test_non_finite_features_name_their_clip(tmp_path: Path, monkeypatch, change) -> None:
    cache = poisoned(tmp_path / "c", monkeypatch, change)
    with pytest.raises(DataError, match=r"'train2'.*'toy-eyes'.* 1 of "):
        load(cache)


def test_invalid_rows_are_ignored(tmp_path: Path, monkeypatch) -> None:
    windows = load(poisoned(tmp_path / "c", monkeypatch, _nan_where_invalid))
    assert torch.isfinite(windows.gather(torch.arange(len(windows))).features[VISUAL]).all()


def test_splits_without_labels_or_clips_are_rejected(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", Toy(targets=()))
    with pytest.raises(UsageError, match=r"No clip of split 'train'.*annotated"):
        load(cache)
    with pytest.raises(UsageError, match=r"Choices: train, val"):
        load(cache, split="test")
    config, inputs = resolve(cache, TrainConfig())
    assert len(load_windows(cache, cache.items(split="val"), inputs.streams, config)) > 0


def test_streams_are_selected_automatically_or_must_be_named(cache: Cache, tmp_path: Path) -> None:
    for settings, message in (
        ({"visual": ("clip",)}, "Choices: toy-eyes"),
        ({"visual": (AUDIO,)}, "it is a audio stream"),
        ({"text": "clip.text"}, "Choices: toy-eyes.text"),
        ({"prompts": "mine"}, "Choices: default"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve(cache, TrainConfig(**settings))
    two = make_cache(tmp_path / "c", Toy(splits={}))
    two.declare(StreamInfo("other-eyes", "visual", 3, "float32", {}))
    with pytest.raises(UsageError, match=r"several visual streams.*other-eyes, toy-eyes"):
        resolve(two, TrainConfig())
    two.declare(StreamInfo("clip-vit-b16", "visual", 3, "float32", {}))
    assert resolve(two, TrainConfig())[0].visual == ("clip-vit-b16",)


def test_a_cache_without_prompts_trains_without_the_head(tmp_path: Path, caplog) -> None:
    cache = make_cache(tmp_path / "c", Toy(text=False, splits={}))
    assert resolve(cache, TrainConfig())[1].prototypes is None
    assert "the prompt head is left out" in caplog.text
    assert resolve(cache, TrainConfig(kl_weight=0))[1].prototypes is None


def test_a_cache_without_streams_is_rejected(tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "c")
    with pytest.raises(UsageError, match="nothing to train on"):
        resolve(cache, TrainConfig())


def test_another_cache_must_come_from_the_same_encoders(cache: Cache, tmp_path: Path) -> None:
    _, inputs = resolve(cache, TrainConfig())
    check_same(inputs.streams, cache)
    wider = make_cache(tmp_path / "wider", Toy(grid=Grid(8, 2, 16), steps=16, splits={}))
    check_same(inputs.streams, wider)  # sampled otherwise, but the same encoder
    with pytest.raises(FingerprintError, match=r"dim: 13, 12 in the run"):
        check_same(inputs.streams, make_cache(tmp_path / "dim", Toy(widths=(13, 10), splits={})))
    other = replace(inputs.streams[0], identity={**inputs.streams[0].identity, "weights": "x"}, fingerprint="")
    with pytest.raises(FingerprintError, match=r"weights: None, 'x' in the run"):
        check_same([other], cache)
    with pytest.raises(UsageError, match="has no stream 'absent'"):
        check_same([replace(other, name="absent")], cache)


def test_feature_statistics_cover_only_rows_that_are_read(cache: Cache) -> None:
    windows = load(cache)
    mean, deviation = windows.statistics(VISUAL)
    visual = [cache.read(VISUAL, item) for item in cache.items(split="train")]
    rows = np.concatenate([e.embedding[e.valid].astype(np.float64) for e in visual])
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deviation.numpy(), rows.std(0), rtol=1e-5)


def test_hidden_streams_are_missing(cache: Cache) -> None:
    windows = load(cache).without(frozenset({AUDIO}))
    batch = windows.gather(torch.arange(len(windows)))
    assert not batch.valid[AUDIO].any() and batch.valid[VISUAL].any()
    assert not batch.features[AUDIO].any()


def test_sample_validity_marks_frames_with_a_face(cache: Cache) -> None:
    windows = load(cache)
    for clip in windows.clips:
        visual = cache.read(VISUAL, clip.item)
        instants, has_face = windows.sample_validity(clip)
        assert (instants == visual.time).all() and (has_face == visual.valid).all()


def test_region_occupancy_is_reported(cache: Cache) -> None:
    windows = load(cache)
    labels = [cache.read(LABELS, item) for item in cache.items(split="train")]
    share = region_occupancy(
        np.concatenate([np.nan_to_num(item.value) for item in labels]), np.concatenate([item.valid for item in labels])
    )
    rows = describe_labels(windows, 0.66).splitlines()[-3:]
    numbers = [float(word.rstrip("%")) for row in rows for word in row.split()[1:]]
    np.testing.assert_allclose(numbers, 100 * share.reshape(3, 3)[::-1].ravel(), atol=0.051)


def write_toy_clip(cache: Cache, times: np.ndarray, meta: dict[str, Any]) -> None:
    """One clip with labels and visual features at `times`."""
    count = len(times)
    known = np.ones((count, 2), bool)
    cache.declare(StreamInfo(VISUAL, "visual", 4, "float16", {}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {}))
    features = {"embedding": np.ones((count, 4), np.float16), "time": times, "valid": np.ones(count, bool)}
    cache.write(VISUAL, "clip", features)
    cache.write(LABELS, "clip", {"time": times, "value": known.astype(np.float32), "valid": known}, meta=meta)


def test_a_record_claiming_more_time_than_its_arrays_is_rejected(tmp_path: Path) -> None:
    """Windows cover the whole duration: 9.9e6 s allocated 8 GB."""
    cache = create_cache(tmp_path / "cache")
    write_toy_clip(cache, np.arange(40) * 0.5, {"split": "train", "duration": 9.9e6})
    config = TrainConfig(visual=(VISUAL,), audio=(), window=4.0, stride=1.0, frames=8)
    windows = load(cache, config)
    assert windows.clips[0].duration == 20.0 + 4.0
    assert len(windows) < 30


def test_times_without_rows_are_rejected(tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "cache")
    write_toy_clip(cache, np.array([0.0, 0.5, 1e7]), {"split": "train"})
    config = TrainConfig(visual=(VISUAL,), audio=(), window=4.0, stride=1.0, frames=8)
    with pytest.raises(DataError, match="not credible"):
        load(cache, config)


def test_a_packed_cache_gives_the_same_windows(cache, tmp_path):
    pack(cache, tmp_path / "packed")
    packed = open_cache(tmp_path / "packed")
    one, other = load(cache), load(packed)
    ids = torch.arange(len(one))
    for name, value in vars(one.gather(ids)).items():
        expected = value if isinstance(value, dict) else {name: value}
        got = getattr(other.gather(ids), name)
        for key, tensor in expected.items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(
                    (got if isinstance(value, dict) else {name: got})[key], tensor, rtol=0, atol=0
                )
    items = cache.items()
    assert clip_digests(packed, [VISUAL, AUDIO], items) == clip_digests(cache, [VISUAL, AUDIO], items)
