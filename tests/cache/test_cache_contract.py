"""Contract of every cache store, run over all of them."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import create_cache, open_cache, stores
from vaflow.cache.commit import load_record
from vaflow.cache.schema import KINDS, STORES, StreamInfo
from vaflow.cache.verify import leftovers, verify
from vaflow.errors import CacheError, CorruptError, DataError, FingerprintError, MissingError, UsageError

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


def test_optional_arrays_may_be_absent(tmp_path, store):
    info = stream("visual")
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(info)
    expected = arrays(info)
    del expected["frame"]
    cache.write("visual", "clip", expected)
    assert_same(dict(cache.read("visual", "clip").arrays), expected)
    with pytest.raises(AttributeError, match=r"array 'frame'.*is not loaded.*'embedding', 'time', 'valid'"):
        _ = cache.read("visual", "clip").frame
    with pytest.raises(MissingError, match=r"Got: frame\. Choices: embedding, time, valid"):
        cache.read("visual", "clip", ["frame"])


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


def test_arrays_need_not_be_contiguous(tmp_path, store):
    info = stream("visual", "float32")
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(info)
    expected = arrays(info, 8)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in expected.items()}
    strided["embedding"] = np.asfortranarray(expected["embedding"])
    cache.write("visual", "clip", strided)
    assert_same(dict(cache.read("visual", "clip").arrays), expected)


def test_zarr_and_hdf5_store_equal_arrays(tmp_path):
    caches = [small_cache(tmp_path / name, name) for name in STORES]
    for item in ("a/b", "c"):
        first, second = (cache.read("visual", item) for cache in caches)
        assert_same(dict(first.arrays), dict(second.arrays))
    assert caches[0].fingerprint("visual") == caches[1].fingerprint("visual")


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


def test_zarr_and_h5py_read_the_files_directly(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    expected = arrays(stream("visual"), seed=1)
    record = cache.record("visual", "c")
    folder = cache.path / "visual" / "c"
    if store == "zarr":
        group = zarr.open_group(folder / record.attempt, mode="r")
        members = dict(group.arrays())
        assert all(array.compressors == () and array.metadata.zarr_format == 3 for array in members.values())
        got = {name: np.asarray(array[...]) for name, array in members.items()}
    else:
        with h5py.File(folder / f"{record.attempt}.h5") as file:
            got = {name: file[name][()] for name in file}
    assert_same(got, expected)


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_features_are_rejected(tmp_path, store, value):
    cache = small_cache(tmp_path / "cache", store)
    wrong = arrays(stream("visual"))
    wrong["embedding"][2, 3] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        cache.write("visual", "new", wrong)


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


def test_stream_identities_are_compared_as_json(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(StreamInfo("v", "visual", 4, "float16", {"size": (224, 224), "kinds": {1: "x"}}))
    cache.declare(StreamInfo("v", "visual", 4, "float16", {"kinds": {"1": "x"}, "size": [224, 224]}))
    with pytest.raises(FingerprintError, match=r"identity.size: cache has \[224, 224\], now \[224, 225\]"):
        cache.declare(StreamInfo("v", "visual", 4, "float16", {"kinds": {"1": "x"}, "size": [224, 225]}))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (StreamInfo("v", "video", 4, "float16"), "Choices: audio, faces, labels"),  # type: ignore[arg-type]
        (StreamInfo("v", "visual", -1, "float64"), "dim is -1.*dtype is 'float64', not float16 or float32"),
        (StreamInfo("", "visual", 4, "float16"), "needs a name"),
        (StreamInfo("v", "visual", 4, "float16", {"scale": float("nan")}), "not plain JSON"),
        (StreamInfo("v", "visual", 4, "float16", {"mean": np.zeros(3)}), "not plain JSON"),
    ],
)
def test_invalid_stream_declarations_are_rejected(tmp_path, store, info, message):
    with pytest.raises(UsageError, match=message):
        create_cache(tmp_path / "cache", store=store).declare(info)


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


def test_clips_without_a_split_are_listed_as_none(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(stream("labels"))
    cache.write("labels", "a", arrays(stream("labels")), meta={"split": None})
    cache.write("labels", "b", arrays(stream("labels")))
    assert cache.items("none") == ["a", "b"]
    assert cache.info()["splits"] == {"none": 2}
    with pytest.raises(UsageError, match=r"Got: train.*none = clips without a split; to assign: `vaflow cache splits"):
        cache.items("train")


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


def test_info_counts_the_bytes_on_disk(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store, ("d", "a/b", "c"))
    info = json.loads(json.dumps(cache.info()))
    assert {key: info[key] for key in ("schema_version", "store", "items", "splits")} == {
        "schema_version": 1,
        "store": store,
        "items": 3,
        "splits": {"train": 2, "val": 1},
    }
    visual = info["streams"]["visual"]
    on_disk = sum(path.stat().st_size for path in (cache.path / "visual").rglob("*") if path.is_file())
    assert visual["bytes"] == on_disk > 0
    assert (visual["kind"], visual["dim"], visual["dtype"], visual["items"]) == ("visual", 6, "float16", 3)
    assert visual["encoder"] == "toy-visual"
    assert visual["fingerprint"] == cache.fingerprint("visual")


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


def test_an_open_reader_sees_a_replaced_item(tmp_path, store, monkeypatch):
    cache = small_cache(tmp_path / "cache", store)
    reader = open_cache(cache.path)
    newer = arrays(stream("visual"), 9, seed=5)
    stale = reader.record("visual", "c")
    records = [stale]
    monkeypatch.setattr(
        reader,
        "record",
        lambda *names: records.pop() if records else load_record(cache.layout, cache.layout.record(*names)),
    )
    cache.write("visual", "c", newer)
    assert_same(dict(reader.read("visual", "c").arrays), newer)


def test_a_failed_write_leaves_no_files(tmp_path, store, monkeypatch):
    cache = small_cache(tmp_path / "cache", store)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vaflow.files.sync_all", full)
    with pytest.raises(CacheError, match=r"No space left on device.*Free disk space"):
        cache.write("visual", "new", arrays(stream("visual")))
    assert leftovers(cache) == []
    assert not cache.has("visual", "new")


def test_records_are_created_exclusively_without_hard_links(tmp_path, store, monkeypatch):
    def unknown(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unknown)
    cache = small_cache(tmp_path / "cache", store)
    assert verify(cache) == []
    assert leftovers(cache) == []
    assert cache.items() == ["a/b", "c"]


def test_a_read_only_cache_rejects_writes(tmp_path, store):
    small_cache(tmp_path / "cache", store)
    reader = open_cache(tmp_path / "cache")
    for change in (
        lambda: reader.write("visual", "x", arrays(stream("visual"))),
        lambda: reader.drop("visual", "c"),
        lambda: reader.declare(stream("audio")),
    ):
        with pytest.raises(UsageError, match="opened for reading"):
            change()


def test_source_and_meta_must_be_plain_json(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    with pytest.raises(UsageError, match="meta is not plain JSON"):
        cache.write("visual", "x", arrays(stream("visual")), meta={"duration": np.float32(1)})
    assert not cache.has("visual", "x")


def test_record_paths_must_stay_inside_the_attempt(tmp_path, store):
    from vaflow.cache.documents import seal, unseal

    cache = small_cache(tmp_path / "cache", store)
    path: Path = cache.layout.record("visual", "c")
    document = unseal(path.read_bytes())
    for change in (
        {"attempt": ".."},
        {"attempt": "../../labels"},
        {"files": {"../c/x": {"size": 0, "crc32c": 0}}},
        {"files": {f"{document['attempt']}/../../x": {"size": 0, "crc32c": 0}}},
    ):
        path.write_bytes(seal({**document, **change}))
        with pytest.raises(CorruptError):
            cache.read("visual", "c")
    cache.drop("visual", "c")
    assert cache.has("visual", "a/b")
    assert verify(cache) == []
