"""`vaflow cache drop` and `vaflow cache splits` change only the named clips."""

import json
from pathlib import Path

import pytest
from cache_toys import arrays, assert_same, small_cache, stream

from vaflow.cache import Cache, open_cache
from vaflow.cache.maintenance import change_splits, drop_clips, leftovers, verify
from vaflow.cli import main
from vaflow.errors import UsageError

CLIPS = ("a/b", "c", "d e", "zarr.json")


@pytest.fixture(params=["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """Editing changes records only."""
    return str(request.param)


@pytest.fixture
def cache(tmp_path: Path, store: str) -> Cache:
    made = small_cache(tmp_path / "cache", store, CLIPS)
    made.declare(stream("text"))
    made.write("text", "c", arrays(stream("text")))  # a prompt set that has the name of a clip
    made.write("visual", "stray", arrays(stream("visual")))  # without labels, as after a killed extraction
    return made


def contents(cache: Cache) -> dict[tuple[str, str], dict]:
    fresh = open_cache(cache.path)
    names = {name: fresh.items(stream=name) for name in fresh.streams()}
    return {(name, item): dict(fresh.read(name, item).arrays) for name, items in names.items() for item in items}


def test_named_clips_are_dropped_from_every_stream(cache, capsys):
    before = contents(cache)
    assert main(["cache", "drop", str(cache.path), "c", "a/b"]) == 0
    printed = capsys.readouterr().out
    assert "c: labels, visual" in printed
    assert "2 clips removed" in printed
    after = contents(cache)
    assert after.keys() == {("labels", "d e"), ("labels", "zarr.json"), ("visual", "d e"), ("visual", "zarr.json")} | {
        ("text", "c")
    }
    for key, kept in after.items():
        assert_same(kept, before[key])
    assert verify(open_cache(cache.path)) == []
    assert leftovers(open_cache(cache.path)) == []
    assert not (cache.path / "visual" / "c").exists()


def test_drop_rejects_an_unknown_clip_and_drops_nothing(cache, capsys):
    before = contents(cache)
    assert main(["cache", "drop", str(cache.path), "c", "d"]) == 2
    error = capsys.readouterr().err
    assert "has no such clip. Got: d." in error
    assert main(["cache", "drop", str(cache.path), ""]) == 2  # an unset variable of the shell
    assert "Got: an empty name." in capsys.readouterr().err
    assert contents(cache).keys() == before.keys()


def test_a_killed_drop_is_finished_by_the_same_command(cache, monkeypatch):
    real, calls = Cache.drop, []

    def killed(self: Cache, stream: str, item: str) -> None:
        calls.append(item)
        if len(calls) == 4:  # the first clip is gone, the second has lost its labels
            raise KeyboardInterrupt
        real(self, stream, item)

    monkeypatch.setattr(Cache, "drop", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_clips(open_cache(cache.path, writable=True), ["c", "a/b"])
    monkeypatch.setattr(Cache, "drop", real)
    assert main(["cache", "drop", str(cache.path), "c", "a/b"]) == 0
    assert {item for _, item in contents(cache)} == {"c", "d e", "zarr.json"}  # c: the prompt set
    assert not (cache.path / "visual" / "a%2Fb").exists()
    assert main(["cache", "drop", str(cache.path), "c"]) == 2


def test_clips_missing_from_the_dataset_are_dropped(cache, tmp_path, capsys):
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    for name in ("a/b.mp4", "d e.mp4", "new.mp4"):
        (root / name).write_bytes(b"")
    args = ["cache", "drop", str(cache.path), "--absent", str(root), "--layout", "videos", "--json"]
    assert main([*args, "--dry-run"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dropped"] == {"c": ["labels", "visual"], "stray": ["visual"], "zarr.json": ["labels", "visual"]}
    assert len(open_cache(cache.path).items()) == len(CLIPS)
    assert main(args) == 0
    assert open_cache(cache.path).items() == ["a/b", "d e"]
    assert not cache.has("visual", "stray")
    assert json.loads(capsys.readouterr().out)["dropped"] == report["dropped"]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {}


def test_drop_rejects_another_dataset(cache, tmp_path, capsys):
    """A mistyped ROOT would remove every clip."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.mp4").write_bytes(b"")
    assert main(["cache", "drop", str(cache.path), "--absent", str(tmp_path / "other")]) == 2
    assert "the data set of this cache" in capsys.readouterr().err
    assert len(open_cache(cache.path).items()) == len(CLIPS)


@pytest.mark.parametrize("args", [[], ["c", "--absent", "."]])
def test_drop_requires_either_names_or_a_dataset(cache, args, capsys):
    assert main(["cache", "drop", str(cache.path), *args]) == 2
    assert "ITEM... or --absent ROOT" in capsys.readouterr().err


def test_editing_splits_changes_only_splits(cache, tmp_path, capsys):
    before, records = contents(cache), {item: cache.record("labels", item) for item in CLIPS}
    visual = {path: path.read_bytes() for path in (cache.path / "visual").rglob("*") if path.is_file()}
    (tmp_path / "splits.csv").write_text("name,split\na/b,test\nc,val\nunknown,train\n")
    args = ["cache", "splits", str(cache.path), str(tmp_path / "splits.csv")]
    assert main([*args, "--dry-run"]) == 0
    assert "1 clip to change, 1 unchanged, 2 not listed" in capsys.readouterr().out
    assert open_cache(cache.path).info()["splits"] == {"train": 2, "val": 2}
    assert main(args) == 0
    printed = capsys.readouterr()
    assert "a/b: train -> test" in printed.out
    assert "1 clip changed" in printed.out
    assert "1 name that the cache does not contain: unknown" in printed.err
    changed = open_cache(cache.path)
    assert changed.info()["splits"] == {"test": 1, "train": 1, "val": 2}
    assert changed.items("test") == ["a/b"]
    for key, arrays_before in before.items():
        assert_same(contents(cache)[key], arrays_before)
    assert all(path.read_bytes() == data for path, data in visual.items())
    for item, record in records.items():
        now = changed.record("labels", item)
        assert (now.source, now.created, now.arrays) == (record.source, record.created, record.arrays)
        assert (now.attempt == record.attempt) == (item != "a/b")
    assert verify(changed) == []
    assert leftovers(changed) == []


def test_a_split_list_without_known_clips_is_rejected(cache):
    with pytest.raises(UsageError, match="names no clip"):
        change_splits(cache, {"x": "train"})


def test_a_split_list_without_a_split_column_is_rejected(cache, tmp_path, capsys):
    (tmp_path / "groups.csv").write_text("name,group\na/b,one\n")
    assert main(["cache", "splits", str(cache.path), str(tmp_path / "groups.csv")]) == 2
    assert "the columns name and split" in capsys.readouterr().err


def test_edit_rejects_a_read_only_cache(cache):
    reader = open_cache(cache.path)
    with pytest.raises(UsageError):
        drop_clips(reader, ["c"])
    with pytest.raises(UsageError):
        change_splits(reader, {"c": "test"})
