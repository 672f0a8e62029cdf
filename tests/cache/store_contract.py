"""Contract of a cache on any store: tests that run on folders and on object stores, with the fixtures of each."""

import numpy as np
import pytest
import zarr
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import create_cache, open_cache, stores
from vaflow.cache.maintenance import leftovers, verify
from vaflow.cache.schema import KINDS, StreamInfo
from vaflow.errors import DataError, FingerprintError, MissingError, UsageError

KIND_DTYPES = [
    (kind, dtype)
    for kind, specs in KINDS.items()
    for dtype in (specs["embedding"].dtypes if "embedding" in specs else (None,))
]


@pytest.mark.parametrize(("kind", "dtype"), KIND_DTYPES)
@pytest.mark.parametrize("shape", ["full", "zeros", "empty", "one"])
def test_arrays_are_read_back_unchanged(tmp_path, store, kind, dtype, shape):
    info = stream(kind, dtype)
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(info)
    expected = arrays(info, {"empty": 0, "one": 1}.get(shape, 7), zeros=shape == "zeros")
    cache.write(kind, "clip", expected)
    item = open_cache(tmp_path / "cache").read(kind, "clip")
    assert_same(dict(item.arrays), expected)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in item.arrays.values())
    assert verify(cache) == []


def test_arrays_can_be_read_individually(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    item = cache.read("visual", "c", ["time", "valid"])
    expected = arrays(stream("visual"), seed=1)
    assert_same(dict(item.arrays), {name: expected[name] for name in ("time", "valid")})
    np.testing.assert_array_equal(item.time, expected["time"])


def test_images_are_stored_byte_for_byte(tmp_path, store):
    files = [b"\xff\xd8 first", b"", b"\xff\xd8 third, longer"]
    info = stream("pixels")
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(info)
    cache.write(
        "pixels",
        "clip",
        {
            "data": np.frombuffer(b"".join(files), np.uint8),
            "offset": np.cumsum([0, *map(len, files)]),
            "time": np.arange(3.0),
            "valid": np.array([True, False, True]),
        },
    )
    assert cache.read("pixels", "clip").images == files


def test_large_arrays_are_split_along_their_first_axis(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "LARGEST_CHUNK", 100)
    info = stream("visual", "float32")
    cache = create_cache(tmp_path / "cache", store="zarr")
    cache.declare(info)
    for item, zeros in (("random", False), ("zeros", True)):
        expected = arrays(info, 11, zeros=zeros)
        record = cache.write("visual", item, expected)
        rows = 100 // (4 * info.dim)
        chunks = [name for name in record.files if "/embedding/c/" in name]
        assert len(chunks) == -(-11 // rows)
        assert_same(dict(cache.read("visual", item).arrays), expected)
        folder = cache.layout.item("visual", item) / record.attempt
        np.testing.assert_array_equal(zarr.open_array(folder / "embedding", mode="r")[...], expected["embedding"])


def test_all_problems_of_arrays_are_reported_together(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    wrong = arrays(stream("visual"))
    wrong["embedding"] = wrong["embedding"].astype("float64")[:, :4]
    wrong["valid"] = wrong["valid"][:-1]
    wrong["extra"] = np.zeros(1)
    del wrong["time"]
    with pytest.raises(DataError) as caught:
        cache.write("visual", "new", wrong)
    for part in ("'new'", "embedding is float64", "4 dimensions", "valid has 4", "'extra'", "'time' is missing"):
        assert part in str(caught.value)
    assert not cache.has("visual", "new")
    assert leftovers(cache) == []


def test_streams_are_stored_separately(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    cache.declare(stream("visual"))  # an equal declaration is accepted
    identity = {"encoder": "other", "sampling": {"window": 10.0, "stride": 2.0}, "new": [1]}
    with pytest.raises(FingerprintError) as caught:
        cache.declare(StreamInfo("visual", "visual", 7, "float32", identity))
    for part in (
        "dim: cache has 6, now 7",
        "dtype: cache has 'float16', now 'float32'",
        "identity.encoder: cache has 'toy-visual', now 'other'",
        "identity.sampling.stride: cache has 3.0, now 2.0",
        "identity.new: cache has nothing, now [1]",
        "extract into another cache",
    ):
        assert part in str(caught.value)
    assert "window" not in str(caught.value)


def test_items_are_the_clips_of_the_labels_stream(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store, ("d", "a/b", "c"))
    cache.declare(stream("text", name="prompts"))
    cache.write("prompts", "default", arrays(stream("text")))
    cache.declare(stream("audio"))
    cache.write("audio", "a/b", arrays(stream("audio")))
    cache.write("audio", "without-labels", arrays(stream("audio")))
    for opened in (cache, open_cache(cache.path)):
        assert opened.items() == ["a/b", "c", "d"]
        assert opened.items("train") == ["c", "d"]
        assert opened.items(stream="audio") == ["a/b"]
        assert opened.items("train", "audio") == []
        assert opened.items(stream="prompts") == ["default"]
        assert opened.meta("a/b") == {"split": "val"}
    with pytest.raises(UsageError, match=r"Got: test\. Choices: train, val\."):
        cache.items("test")
    with pytest.raises(UsageError, match=r"Got: auido\..*Did you mean 'audio'"):
        cache.items(stream="auido")


def test_a_missing_item_error_suggests_similar_ids(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store, ("trial_12", "trial_13"))
    with pytest.raises(MissingError, match=r"Got: trial_1\. Similar names: trial_1"):
        cache.read("visual", "trial_1")
    with pytest.raises(MissingError, match="Choices: labels, visual"):
        cache.read("audio", "trial_12")
    with pytest.raises(MissingError, match="no such stream"):
        cache.write("audio", "trial_12", {})
    assert not cache.has("audio", "trial_12")
    assert not cache.has("visual", "trial_1")


def test_writing_an_item_again_removes_the_old_files(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    newer = arrays(stream("visual"), 9, seed=5)
    before = cache.record("visual", "c")
    after = cache.write("visual", "c", newer, source={"size": 99})
    assert after.attempt != before.attempt
    assert cache.record("visual", "c") == after
    assert after.source == {"size": 99}
    assert_same(dict(cache.read("visual", "c").arrays), newer)
    assert leftovers(cache) == []
    assert verify(cache) == []


def test_dropping_an_item_removes_its_files(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    cache.drop("visual", "c")
    cache.drop("visual", "c")
    cache.drop("visual", "never there")
    assert not cache.has("visual", "c")
    assert cache.has("labels", "c")
    assert leftovers(cache) == []
    assert not any(path.is_file() for path in (cache.path / "visual" / "c").rglob("*"))
    assert cache.items(stream="visual") == ["a/b"]
