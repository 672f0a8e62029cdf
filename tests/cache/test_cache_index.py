"""The index speeds up opening and never changes results."""

import os
import time
from pathlib import Path

import pytest
from cache_toys import arrays, small_cache, stream

from vaflow.cache import commit as commit_module
from vaflow.cache import open_cache
from vaflow.cache.commit import load_record
from vaflow.errors import CacheError, CorruptError


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of record files that are read."""
    calls: list[str] = []

    def noting(layout: object, path: Path) -> object:
        calls.append(path.name)
        return load_record(layout, path)  # type: ignore[arg-type]

    monkeypatch.setattr("vaflow.cache.commit.load_record", noting)
    return calls


@pytest.fixture(params=["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """The index holds records, not arrays."""
    return str(request.param)


def forbid_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make listing a record directory fail the test."""
    real = os.scandir

    def guarded(path: Path | int) -> object:  # a handle: pytest deletes the directory
        if not isinstance(path, int) and "records" in Path(path).parts:
            pytest.fail("the folder was listed")
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)


def test_a_saved_index_avoids_reading_records(tmp_path, store, reads):
    cache = small_cache(tmp_path / "cache", store)
    cache.refresh_index()
    del reads[:]
    reader = open_cache(cache.path)
    assert reader.items() == ["a/b", "c"]
    assert reader.items("train", "visual") == ["a/b"]
    assert reader.info() == cache.info()
    assert reads == []


def test_a_trusted_directory_is_not_listed(tmp_path, store, monkeypatch):
    cache = small_cache(tmp_path / "cache", store)
    cache.refresh_index()
    forbid_listing(monkeypatch)
    assert open_cache(cache.path).items("val", "visual") == ["c"]


def test_a_missing_index_is_not_an_error(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    assert not cache.layout.index.exists()
    assert open_cache(cache.path).items("val") == ["c"]
    assert not cache.layout.index.exists()  # a reader writes nothing


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: data.replace(b'"val"', b'"vxl"'),
        lambda data: b"[]",
        lambda data: b"\xff\xfe",
        lambda data: b'{"crc32c":0,"index":{}}\n',
    ],
)
def test_a_damaged_index_is_ignored_and_rebuilt(tmp_path, damage):
    cache = small_cache(tmp_path / "cache", "hdf5")
    cache.refresh_index()
    good = cache.layout.index.read_bytes()
    cache.layout.index.write_bytes(damage(good))
    reader = open_cache(cache.path)
    assert reader.items("val", "visual") == ["c"]
    again = open_cache(cache.path, writable=True)
    again.refresh_index()
    assert cache.layout.index.read_bytes() == good


def test_a_flipped_bit_in_the_index_changes_no_result(tmp_path):
    cache = small_cache(tmp_path / "cache", "hdf5")
    cache.refresh_index()
    good = cache.layout.index.read_bytes()
    expected = cache.info()
    for position in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[position] ^= 1 << (position % 8)
        cache.layout.index.write_bytes(flipped)
        assert open_cache(cache.path).info() == expected, position


def test_only_changed_records_are_read(tmp_path, store, reads):
    cache = small_cache(tmp_path / "cache", store, ("a", "b", "c", "d"))
    cache.refresh_index()
    cache.write("labels", "b", arrays(stream("labels")), meta={"split": "test"})
    cache.write("labels", "e", arrays(stream("labels")), meta={"split": "test"})
    cache.drop("labels", "d")
    del reads[:]
    reader = open_cache(cache.path)
    assert reader.items() == ["a", "b", "c", "e"]
    assert reader.items("test") == ["b", "e"]
    assert sorted(set(reads)) == ["b.json", "e.json"]


def test_commits_of_other_writers_are_visible_immediately(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    cache.refresh_index()
    reader = open_cache(cache.path)
    assert reader.items() == ["a/b", "c"]
    cache.write("labels", "d", arrays(stream("labels")))
    assert reader.items() == ["a/b", "c", "d"]
    cache.drop("labels", "c")
    assert reader.items() == ["a/b", "d"]


def test_a_change_within_one_clock_tick_is_detected(tmp_path, monkeypatch):
    """The directory changes after it was listed, within the same modification time."""
    cache = small_cache(tmp_path / "cache", "hdf5")
    folder = cache.layout.records("labels")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # save immediately, while the directory time is recent
    now = time.time_ns()
    os.utime(folder, ns=(now, now))
    cache.refresh_index()
    reader = open_cache(cache.path)
    assert reader.items() == ["a/b", "c"]
    cache.write("labels", "d", arrays(stream("labels")))
    os.utime(folder, ns=(now, now))
    assert folder.stat().st_mtime_ns == now
    assert reader.items() == ["a/b", "c", "d"]
    assert open_cache(cache.path).items() == ["a/b", "c", "d"]


def test_the_index_is_saved_once_the_directory_time_has_settled(tmp_path, monkeypatch):
    cache = small_cache(tmp_path / "cache", "hdf5")
    waited: list[float] = []
    real = time.sleep

    def noting(seconds: float) -> None:
        waited.append(seconds)
        real(seconds)

    monkeypatch.setattr(time, "sleep", noting)
    cache.refresh_index()
    assert len(waited) == 1
    assert 0.05 < waited[0] <= 2.5
    forbid_listing(monkeypatch)
    assert open_cache(cache.path).items() == ["a/b", "c"]


def test_coarse_file_times_use_a_wider_margin():
    second = 1_700_000_000_000_000_000
    assert commit_module.is_past(second + 1, second + 200_000_000)
    assert not commit_module.is_past(second, second + 200_000_000)
    assert commit_module.is_past(second, second + 2_100_000_000)
    assert not commit_module.is_past(second + 500, second)


def test_an_index_does_not_hide_damage(tmp_path, store):
    cache = small_cache(tmp_path / "cache", store)
    cache.refresh_index()
    record = cache.layout.record("labels", "c")
    data = record.read_bytes()
    record.write_bytes(data[:-5] + b"9" + data[-4:])
    with pytest.raises(CorruptError):
        open_cache(cache.path).meta("c")
    record.unlink()
    record.write_bytes(data[:40])
    with pytest.raises(CorruptError):
        open_cache(cache.path).items()
    cache.refresh_index()  # saves known records without trusting the directory
    with pytest.raises(CorruptError):
        open_cache(cache.path).items()


def test_a_long_run_saves_the_index_periodically(tmp_path, store, reads, monkeypatch):
    """After a kill, only records written since the last save are read again."""
    monkeypatch.setattr(commit_module, "EVERY", 0.05)
    cache = small_cache(tmp_path / "cache", store)
    with cache.indexed():
        deadline = time.monotonic() + 30
        while not cache.layout.index.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr("vaflow.cache.cache.Index.save", lambda *_: None)  # simulates a kill: no further saves
        cache.write("labels", "late", arrays(stream("labels")))
        del reads[:]
        assert open_cache(cache.path).items() == ["a/b", "c", "late"]
        assert reads == ["late.json"]


def test_a_failed_index_write_is_ignored(tmp_path, store, monkeypatch):
    tries = []

    def refuse(*_: object) -> None:
        tries.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit_module, "EVERY", 0.01)
    monkeypatch.setattr(commit_module, "SHARE", 0)
    cache = small_cache(tmp_path / "cache", store)
    with monkeypatch.context() as patch, pytest.raises(CacheError), cache.indexed():
        patch.setattr("vaflow.cache.cache.Index.save", refuse)
        while len(tries) < 3:
            time.sleep(0.01)
    assert open_cache(cache.path).items() == ["a/b", "c"]
