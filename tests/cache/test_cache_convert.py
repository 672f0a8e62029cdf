"""Conversion between stores: lossless, resumable, and without damaged items."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.copy import COPY_OF, convert
from vaflow.cache.maintenance import leftovers, repair, verify
from vaflow.cache.schema import STORES, Kind
from vaflow.cli import main
from vaflow.errors import CacheError, FingerprintError, SchemaError, UsageError
from vaflow.train.scores import failed_items

ODD_NAMES = ("a/b", "é", "x" * 300)


@pytest.fixture(params=["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """The store to convert from: every conversion reads one store and writes the other."""
    return str(request.param)


@pytest.fixture
def other(store: str) -> str:
    """The store to convert to."""
    return next(name for name in STORES if name != store)


@pytest.fixture(scope="module")
def full_caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache per store: a stream of every kind; items with odd names, without rows, and of zeros only."""
    folder = tmp_path_factory.mktemp("full")
    for store in STORES:
        cache = create_cache(folder / store, store=store)
        for kind in get_args(Kind):
            info = stream(kind)
            cache.declare(info)
            for number, item in enumerate(ODD_NAMES):
                facts = {"split": "val", "duration": 2.5} if kind == "labels" else {"audio": "silent"}
                made = arrays(info, number * 2, seed=number, zeros=number == 2)
                cache.write(kind, item, made, source={"video": {"size": number, "blake2b": "0a"}}, meta=facts)
    return {store: folder / store for store in STORES}


@pytest.fixture
def source(full_caches: dict[str, Path], store: str, tmp_path: Path) -> Cache:
    """A copy of the full cache, which tests may damage."""
    shutil.copytree(full_caches[store], tmp_path / "source")
    return open_cache(tmp_path / "source", writable=True)


def assert_copy(source: Cache, copy: Cache) -> None:
    """Assert that both caches have equal items: arrays, source, facts and creation time."""
    assert copy.streams() == source.streams()
    assert len(copy.record_files()) == len(source.record_files()) > 0
    for name in source.streams():
        assert copy.fingerprint(name) == source.fingerprint(name)
        for path in sorted(source.layout.records(name).glob("*.json")):
            item = json.loads(path.read_bytes())["item"]
            one, two = source.record(name, item), copy.record(name, item)
            assert {key: getattr(one, key) for key in COPY_OF} == {key: getattr(two, key) for key in COPY_OF}
            assert_same(dict(copy.read(name, item).arrays), dict(source.read(name, item).arrays))
    assert verify(copy) == []


def attempts(cache: Cache) -> dict[str, str]:
    return {path.name + path.parent.name: json.loads(path.read_bytes())["attempt"] for path in cache.record_files()}


def damage(cache: Cache, name: str, item: str) -> None:
    """Flip a bit of an array's bytes."""
    folder = cache.layout.item(name, item)
    file = max((folder / name for name in cache.record(name, item).files), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_round_trip_between_stores_gives_the_same_cache(source, tmp_path, store, other):
    done = convert(source, tmp_path / "other", other)
    assert (done.copied, done.there, done.replaced, done.failures) == (len(source.record_files()), 0, 0, ())
    copy = open_cache(tmp_path / "other")
    assert copy.store == other
    assert_copy(source, copy)
    convert(copy, tmp_path / "back", store)
    back = open_cache(tmp_path / "back")
    assert_copy(source, back)
    for name in source.streams():  # the same store writes the same files, except for attempt names
        for item in ODD_NAMES:
            one, two = source.record(name, item), back.record(name, item)
            plain = [{path.replace(r.attempt, "-"): f for path, f in r.files.items()} for r in (one, two)]
            assert plain[0] == plain[1]


def test_current_copies_are_not_written_again(source, tmp_path, store, other):
    convert(source, tmp_path / "other", other)
    before = attempts(open_cache(tmp_path / "other"))
    source.write("visual", "é", arrays(stream("visual"), 9, seed=9), source={"video": {"size": 9}})
    source.write("audio", "new", arrays(stream("audio")))
    done = convert(source, tmp_path / "other", other)
    assert (done.copied, done.replaced, done.there) == (2, 1, len(before) - 1)
    copy = open_cache(tmp_path / "other")
    assert_copy(source, copy)
    after = attempts(copy)
    assert {name for name in before if after[name] != before[name]} == {"%C3%A9.jsonvisual"}
    assert leftovers(copy) == []


def test_an_interrupted_conversion_resumes(source, tmp_path, store, other, monkeypatch):
    real, count = Cache.adopt, 0
    monkeypatch.setattr("vaflow.cache.copy.THREADS", 1)

    def few(self, *args):
        nonlocal count
        count += 1
        if count > 7:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cache, "adopt", few)
        convert(source, tmp_path / "other", other)
    half = open_cache(tmp_path / "other")
    before = attempts(half)
    assert len(before) == 7
    assert half.items() == []  # labels are copied last, so that no incomplete clip looks complete
    done = convert(source, tmp_path / "other", other)
    assert (done.there, done.copied) == (7, len(source.record_files()) - 7)
    copy = open_cache(tmp_path / "other")
    assert_copy(source, copy)
    assert before.items() <= attempts(copy).items()


def test_a_killed_conversion_resumes(source, tmp_path, store, other):
    """Kill the process while it writes the tenth item."""
    code = (
        "import os, signal, sys\n"
        "from vaflow.cache import Cache, open_cache\n"
        "from vaflow import files\n"
        "from vaflow.cache.copy import convert\n"
        "real, seen = files.sync_all, []\n"
        "def sync_all(*args):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*args)\n"
        "files.sync_all = sync_all\n"
        "convert(open_cache(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    args = [sys.executable, "-c", code, str(source.path), str(tmp_path / "other"), other]
    assert subprocess.run(args, env=env, check=False).returncode == -9
    half = open_cache(tmp_path / "other")
    assert verify(half) == []
    before = attempts(half)
    assert 0 < len(before) < 10
    convert(source, tmp_path / "other", other)
    copy = open_cache(tmp_path / "other")
    assert_copy(source, copy)
    assert before.items() <= attempts(copy).items()


def test_damaged_items_are_listed_and_the_others_converted(source, tmp_path, store, other, capsys):
    damage(source, "visual", "a/b")
    source.layout.record("labels", "é").write_bytes(b"{}")
    args = ["cache", "convert", str(source.path), "--out", str(tmp_path / "other"), "--store", other]
    assert main(args) == 3
    assert "2 items could not be read" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "other" / "failures.jsonl").read_text().splitlines()]
    contents = {
        (line["item"], line["stream"], line["stage"], line["error"], line.get("split", "unknown")) for line in lines
    }
    assert contents == {
        ("a/b", "visual", "convert", "CorruptError", "val"),
        ("é", "labels", "convert", "CorruptError", "unknown"),
    }
    copy = open_cache(tmp_path / "other")
    assert len(copy.record_files()) == len(source.record_files()) - 2
    assert verify(copy) == []
    assert failed_items(copy, "val") == ["é"]  # evaluation reports the lost clip
    repair(open_cache(source.path, writable=True))
    streams = source.streams()
    for name, item in (("visual", "a/b"), ("labels", "é")):
        source.write(name, item, arrays(streams[name]), meta={"split": "val"})
    assert main(args) == 0
    assert_copy(source, open_cache(tmp_path / "other"))
    assert not (tmp_path / "other" / "failures.jsonl").exists()
    assert failed_items(open_cache(tmp_path / "other"), "val") == []


def test_items_with_a_missing_stream_file_are_listed(source, tmp_path, store, other):
    source.layout.stream("visual").unlink()
    done = convert(open_cache(source.path), tmp_path / "other", other)
    assert {(failure.details["stream"], failure.item) for failure in done.failures} >= {
        ("visual", "a/b"),
        ("visual", "é"),
    }
    assert len(done.failures) == len(ODD_NAMES)
    assert "streams/visual.json" in done.failures[0].message
    assert "visual" not in open_cache(tmp_path / "other").streams()


def test_convert_fails_if_every_item_is_damaged(tmp_path, store, other):
    source = small_cache(tmp_path / "source", store)
    for path in source.record_files():
        path.write_bytes(b"")
    args = ["cache", "convert", str(source.path), "--out", str(tmp_path / "other"), "--store", other]
    assert main(args) == 1


def test_arrays_outside_the_schema_are_not_copied(tmp_path, store, other, monkeypatch):
    source = small_cache(tmp_path / "source", store)
    wrong = arrays(stream("visual"))
    wrong["time"] = wrong["time"][::-1].copy()
    with monkeypatch.context() as patch:
        patch.setattr("vaflow.cache.cache.array_problems", lambda *_: [])
        source.write("visual", "c", wrong)
    (failure,) = convert(source, tmp_path / "other", other).failures
    assert (failure.item, failure.error) == ("c", "DataError")
    assert "time does not ascend" in failure.message


def test_failure_lists_are_copied(tmp_path, store, other):
    """Failure lists are copied until the copy contains the items."""
    source = small_cache(tmp_path / "source", store)
    lost = {"item": "lost", "stage": "open", "error": "MediaError", "message": "cut off", "split": "val"}
    (source.path / "failures-1-of-2.jsonl").write_text(json.dumps(lost) + "\n" + "half a li")
    convert(source, tmp_path / "other", other)
    convert(source, tmp_path / "other", other)
    copy = open_cache(tmp_path / "other")
    assert failed_items(copy, "val") == ["lost"]
    carried = (copy.path / "failures-carried.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in carried] == [lost]
    source.write("labels", "lost", arrays(stream("labels")), meta={"split": "val"})
    convert(source, tmp_path / "other", other)
    assert not (copy.path / "failures-carried.jsonl").exists()


def test_a_full_disk_stops_the_conversion_with_a_remedy(tmp_path, store, other, monkeypatch):
    source = small_cache(tmp_path / "source", store)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CacheError, match="run the same command again"):
        patch.setattr("vaflow.files.sync_all", full)
        convert(source, tmp_path / "other", other)
    assert convert(source, tmp_path / "other", other).failures == ()
    assert_copy(source, open_cache(tmp_path / "other"))


def test_unusable_destinations_are_rejected(tmp_path, store, other):
    source = small_cache(tmp_path / "source", store)
    for path in (source.path, source.path / "inside"):
        with pytest.raises(UsageError, match="Choose another folder"):
            convert(source, path, other)
    (tmp_path / "link").symlink_to(source.path)
    with pytest.raises(UsageError, match="Choose another folder"):
        convert(source, tmp_path / "link", store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SchemaError, match=r"neither empty nor a cache"):
        convert(source, tmp_path / "mine", other)
    with pytest.raises(UsageError, match=r"Got: zip\. Choices: hdf5, zarr"):
        convert(source, tmp_path / "new", "zip")
    create_cache(tmp_path / "third", store=other).declare(stream("visual", "float32"))
    with pytest.raises(FingerprintError, match="dtype: cache has 'float32', now 'float16'"):
        convert(source, tmp_path / "third", other)


def test_json_and_the_example_in_the_help(tmp_path, capsys, monkeypatch):
    small_cache(tmp_path / "cache", "zarr")
    assert main(["cache", "convert", "--help"]) == 0
    example = re.search(r"Example: vaflow ([^\n]+)", capsys.readouterr().out)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    assert main([*example[1].split(), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out)["copied"] == 4
