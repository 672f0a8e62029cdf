"""Contract of every cache store, run over all of them."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from cache_toys import arrays, assert_same, small_cache, stream
from store_contract import (  # noqa: F401 - tests that run here on folders
    test_a_missing_item_error_suggests_similar_ids,
    test_all_problems_of_arrays_are_reported_together,
    test_arrays_are_read_back_unchanged,
    test_arrays_can_be_read_individually,
    test_dropping_an_item_removes_its_files,
    test_images_are_stored_byte_for_byte,
    test_items_are_the_clips_of_the_labels_stream,
    test_large_arrays_are_split_along_their_first_axis,
    test_streams_are_stored_separately,
    test_writing_an_item_again_removes_the_old_files,
)

from vaflow.cache import create_cache, open_cache, stores
from vaflow.cache.commit import load_record
from vaflow.cache.maintenance import leftovers, verify
from vaflow.cache.schema import DTYPES, STORES, StreamInfo
from vaflow.errors import CacheError, CorruptError, DataError, FingerprintError, MissingError, UsageError


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


def test_arrays_need_not_be_contiguous(tmp_path, store):
    info = stream("visual", "float32")
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(info)
    expected = arrays(info, 8)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in expected.items()}
    strided["embedding"] = np.asfortranarray(expected["embedding"])
    cache.write("visual", "clip", strided)
    assert_same(dict(cache.read("visual", "clip").arrays), expected)


def test_an_attempt_has_the_bytes_that_zarr_writes(tmp_path, monkeypatch):
    """Every dtype, one and several chunks (the last one padded), one to four axes, and arrays without values."""
    monkeypatch.setattr(stores, "LARGEST_CHUNK", 100)
    rng = np.random.default_rng(0)
    shapes = [(7,), (31,), (0,), (5, 3), (9, 4), (0, 3), (4, 0), (3, 2, 2), (11, 2, 3, 2)]
    written = {
        f"{dtype}-{number}": (rng.random(shape) * 2).astype(dtype)
        for dtype in sorted(DTYPES)
        for number, shape in enumerate(shapes)
    }
    names = stores.ZarrStore().write_attempt(tmp_path, "ours", written)
    zarr.create_group(store=tmp_path / "theirs", zarr_format=3)
    for name, array in written.items():
        chunks = stores.chunk_shape(array)
        made = zarr.create_array(
            tmp_path / "theirs" / name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunks,
            filters=None,
            compressors=None,
            config={"write_empty_chunks": True},
        )
        made[...] = array
    ours, theirs = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "ours", tmp_path / "theirs")
    )
    assert ours == theirs
    assert names == sorted(f"ours/{name}" for name in ours)


def test_zarr_and_hdf5_store_equal_arrays(tmp_path):
    caches = [small_cache(tmp_path / name, name) for name in STORES]
    for item in ("a/b", "c"):
        first, second = (cache.read("visual", item) for cache in caches)
        assert_same(dict(first.arrays), dict(second.arrays))
    assert caches[0].fingerprint("visual") == caches[1].fingerprint("visual")


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_features_are_rejected(tmp_path, store, value):
    cache = small_cache(tmp_path / "cache", store)
    wrong = arrays(stream("visual"))
    wrong["embedding"][2, 3] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        cache.write("visual", "new", wrong)


def test_stream_identities_are_compared_as_json(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(StreamInfo("v", "visual", 4, "float16", {"size": (224, 224), "kinds": {1: "x"}}))
    cache.declare(StreamInfo("v", "visual", 4, "float16", {"kinds": {"1": "x"}, "size": [224, 224]}))
    with pytest.raises(FingerprintError, match=r"identity.size: cache has \[224, 224\], now \[224, 225\]"):
        cache.declare(StreamInfo("v", "visual", 4, "float16", {"kinds": {"1": "x"}, "size": [224, 225]}))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (StreamInfo("v", "video", 4, "float16"), "Choices: audio, crops, faces, labels"),  # type: ignore[arg-type]
        (StreamInfo("v", "visual", -1, "float64"), "dim is -1.*dtype is 'float64', not float16 or float32"),
        (StreamInfo("", "visual", 4, "float16"), "needs a name"),
        (StreamInfo("v", "visual", 4, "float16", {"scale": float("nan")}), "not plain JSON"),
        (StreamInfo("v", "visual", 4, "float16", {"mean": np.zeros(3)}), "not plain JSON"),
    ],
)
def test_invalid_stream_declarations_are_rejected(tmp_path, store, info, message):
    with pytest.raises(UsageError, match=message):
        create_cache(tmp_path / "cache", store=store).declare(info)


def test_clips_without_a_split_are_listed_as_none(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(stream("labels"))
    cache.write("labels", "a", arrays(stream("labels")), meta={"split": None})
    cache.write("labels", "b", arrays(stream("labels")))
    assert cache.items("none") == ["a", "b"]
    assert cache.info()["splits"] == {"none": 2}
    with pytest.raises(UsageError, match=r"Got: train.*none = clips without a split; to assign: `vaflow cache splits"):
        cache.items("train")


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
    with pytest.raises(UsageError, match=r"source is not plain JSON.*nested deeper"):
        cache.write("visual", "x", arrays(stream("visual")), source=json.loads('{"a": ' * 100 + "1" + "}" * 100))
    assert not cache.has("visual", "x")


def test_record_paths_must_stay_inside_the_attempt(tmp_path, store):
    from vaflow.cache.layout import seal, unseal

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
