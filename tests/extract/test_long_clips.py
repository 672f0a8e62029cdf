"""Clips larger than memory use an unlinked scratch file and give identical results."""

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from make_media import AudioTrack, VideoTrack, tones, write_media
from tiny_extraction import CONFIG, assert_same_arrays, run

from vaflow.cache import Cache, create_cache, open_cache, stores
from vaflow.cache import scratch as long
from vaflow.cache.schema import StreamInfo
from vaflow.datasets import Dataset, open_dataset
from vaflow.datasets.clip import Clip
from vaflow.encoders.base import KALDI, Segments
from vaflow.errors import CacheError
from vaflow.extract.clip_assembly import ClipAssembly
from vaflow.extract.config import ExtractConfig
from vaflow.extract.decoding_pool import AudioBlock, AudioEnd, Clock, Done, Face, FacesEnd, Message
from vaflow.extract.encoding import make_encoders
from vaflow.extract.plan import PendingClip

WHOLE = replace(CONFIG, face_source="none", pixels=True)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return create_cache(tmp_path / "scratch")


@pytest.mark.parametrize("seed", range(8))
def test_a_disk_backed_array_equals_numpy(seed: int, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random writes and reads by rows, against an array in memory."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(long, "IN_MEMORY", 0)
    shape = tuple(rng.integers(1, 9, rng.integers(1, 4)).tolist())
    dtype = str(rng.choice(["float16", "float32", "uint8", "int64"]))
    expected, stored = np.zeros(shape, dtype), cache.scratch.zeros(shape, dtype)
    assert isinstance(stored, long.LongArray)
    for _ in range(20):
        start, stop = sorted(rng.integers(-shape[0], shape[0] + 1, 2).tolist())
        values = rng.integers(0, 100, shape[1:]).astype("float32")
        expected[start:stop] = values
        stored[start:stop] = values
        start, stop = rng.integers(-shape[0] - 1, shape[0] + 2, 2).tolist()
        np.testing.assert_array_equal(stored[start:stop], expected[start:stop])
    assert (stored.shape, stored.dtype, stored.ndim) == (expected.shape, expected.dtype, expected.ndim)
    assert (stored.size, stored.nbytes, len(stored)) == (expected.size, expected.nbytes, len(expected))
    flat = stored.reshape(expected.size)
    np.testing.assert_array_equal(flat[:], expected.reshape(-1))
    with pytest.raises(ValueError, match="does not fit"):
        stored.reshape(expected.size + 1)


@pytest.mark.parametrize("limit", [0, 40, 10**6])
def test_blocks_are_concatenated(limit: int, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "IN_MEMORY", limit)
    rng = np.random.default_rng(limit)
    blocks = [rng.standard_normal((n, 3)) for n in (0, 4, 1, 0, 7)]
    growing = cache.scratch.growing((3,), "float16")
    for block in blocks:
        growing.append(block)
    array = growing.finish()
    assert isinstance(array, np.ndarray) == (limit == 10**6)
    np.testing.assert_array_equal(array[:], np.concatenate(blocks).astype(np.float16))
    assert cache.scratch.growing((3,), "float16").finish().shape == (0, 3)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="the system has no nameless files")
def test_the_temporary_file_is_unlinked(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unlinked file leaves nothing after a kill."""
    monkeypatch.setattr(long, "IN_MEMORY", 0)
    before = sorted(cache.path.iterdir())
    kept = cache.scratch.zeros((10, 10), "float32")
    kept[2:4] = np.ones(10)
    assert sorted(cache.path.iterdir()) == before


def test_a_full_disk_raises_a_cache_error(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "IN_MEMORY", 0)
    cache.path.rename(cache.path.with_name("gone"))
    with pytest.raises(CacheError, match="Cannot write into the cache"):
        cache.scratch.zeros((1,), "uint8")


# -- the pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("long")
    for number, seconds in enumerate((12.0, 3.4)):
        audio_track = AudioTrack(tones(seconds, 16000) * (number + 1) / 4, 16000)
        write_media(
            root / f"clip{number}.mp4", VideoTrack(tuple(range(0, round(seconds * 1000), 200)), noise=30), audio_track
        )
    return open_dataset(root, "videos")


@pytest.fixture(scope="module")
def reference(dataset: Dataset, tiny_pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("reference") / "cache"
    assert run(dataset, out, tiny_pair, WHOLE).extracted == 2
    return open_cache(out)


@pytest.mark.parametrize("store", ["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def test_disk_backed_extraction_gives_identical_results(
    store: str, dataset: Dataset, reference: Cache, tiny_pair: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long, "IN_MEMORY", 500)
    monkeypatch.setattr(stores, "LARGEST_CHUNK", 4096)
    assert run(dataset, tmp_path / "cache", tiny_pair, WHOLE, store=store).extracted == 2
    assert_same_arrays(
        reference, open_cache(tmp_path / "cache"), ["labels", "logmel", "pixels", "clip-tiny", "ast-tiny"]
    )


# -- memory ------------------------------------------------------------------------------------------------------


class FreeVisual:
    """A zero-cost encoder with the width of CLIP."""

    kind, name, dim, preparation = "visual", "free-visual", 512, None
    identity: ClassVar[dict[str, Any]] = {}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3))[:, None].expand(-1, self.dim)


class FreeAudio:
    """A zero-cost encoder with the width of AST."""

    kind, name, dim, front_end = "audio", "free-audio", 768, KALDI
    identity: ClassVar[dict[str, Any]] = {}

    def segments(self, window: float, steps: int) -> Segments:
        return Segments((0,), 1024)

    def step_times(self, window: float, steps: int) -> np.ndarray:
        return (np.arange(steps) + 0.5) * window / steps

    def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        return logmel[:, :steps].repeat(1, 1, 6)


CONFIG_FREE = ExtractConfig(visual=("free-visual",), audio=("free-audio",), device="cpu", pixels=True)
INFOS = {
    info.name: info
    for info in (
        StreamInfo("logmel", "logmel", 128, "float16"),
        StreamInfo("pixels", "pixels", 0, "uint8"),
        StreamInfo("free-visual", "visual", 512, "float16"),
        StreamInfo("free-audio", "audio", 768, "float16"),
        StreamInfo("labels", "labels", 0, "float32"),
    )
}


def messages(seconds: int) -> Iterator[Message]:
    """Messages of a worker for a clip with five frames per second, a face in each, and noise."""
    times = np.arange(seconds * 5) / 5
    labels: dict[str, Any] = {
        "time": times,
        "value": np.zeros((times.size, 2), np.float32),
        "valid": np.ones((times.size, 2), bool),
    }
    yield Clock(0, labels, float(seconds), {})
    rng = np.random.default_rng(0)
    for _ in range(seconds):
        yield AudioBlock(0, rng.standard_normal(16000).astype(np.float32))
    yield AudioEnd(0, ((0.0, float(seconds)),), {})
    samples = len(CONFIG_FREE.grid.sample_times(float(seconds)))
    for sample in range(samples):
        yield Face(0, sample, {None: np.full((16, 16, 3), sample % 256, np.uint8)}, bytes(12_000))  # type: ignore[dict-item]
    yield FacesEnd(0, np.arange(samples), {})
    yield Done(0)


def peak_and_stored(cache: Cache, item: str, seconds: int) -> tuple[int, int]:
    """Peak Python and NumPy memory while a clip is assembled and committed, and its stored bytes."""
    encoders = make_encoders(CONFIG_FREE, torch.device("cpu"), [FreeVisual()], [FreeAudio()])  # type: ignore[list-item]
    task = PendingClip(Clip(item, None, item, None), tuple(INFOS), False)
    tracemalloc.start()
    try:
        clip = ClipAssembly(task, CONFIG_FREE, INFOS, encoders, cache)
        for message in messages(seconds):
            clip.take(message)
        for batcher in encoders.batchers.values():
            batcher.flush()
        assert clip.complete
        ((_, results),) = clip.items()
        files = [cache.write(name, item, results[name][0]).files for name in INFOS]
        return tracemalloc.get_traced_memory()[1], sum(facts["size"] for made in files for facts in made.values())
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("store", ["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def test_memory_grows_less_than_the_stored_data(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only times and masks stay in memory: 9 of 265 bytes per 10 ms of audio, plus intermediates."""
    monkeypatch.setattr(long, "IN_MEMORY", 2**18)
    monkeypatch.setattr(stores, "LARGEST_CHUNK", 2**18)
    cache = create_cache(tmp_path / "cache", store=store)
    for info in INFOS.values():
        cache.declare(info)
    peak_and_stored(cache, "warm-up", 30)  # memory of lazy imports counts too
    short, stored_short = peak_and_stored(cache, "short", 30)
    longer, stored_longer = peak_and_stored(cache, "longer", 210)
    assert stored_longer - stored_short > 10 * 2**20
    assert longer - short < 0.2 * (stored_longer - stored_short), (short, longer, stored_longer)
