"""Power cuts and reordering file systems: a commit depends only on flushed data."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kills import toy_cache
from lab import EXTRACT, Lab, assert_printed, assert_same_cache, attempts
from syscalls import Call, parse, trace

from vaflow.cache import open_cache
from vaflow.cache.maintenance import verify
from vaflow.errors import CorruptError
from vaflow.train.config import TrainConfig
from vaflow.train.train_run import train_run

FLUSHES = ("fsync", "fdatasync")
NAMINGS = ("link", "linkat", "rename", "renameat", "renameat2")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_cache(tmp_path_factory.mktemp("toys") / "cache", 3)


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_a_record_is_renamed_after_its_files_are_flushed(toys: Path, tmp_path: Path, store: str) -> None:
    """Order of system calls: files, their directories, the record's bytes, then the record's name."""
    out = tmp_path / "cache"
    calls = trace(["cache", "convert", toys, "--out", out, "--store", store], tmp_path / "log")
    cache = open_cache(out)
    for record_file in cache.record_files():
        stream, item = record_file.parent.name, record_file.stem
        record = cache.record(stream, item)
        named = next(c for c in calls if c.name in NAMINGS and c.path == record_file)
        folder = cache.layout.item(record.stream, record.item)
        for name in record.files:
            flushed = _last(calls, FLUSHES, folder / name)
            assert flushed.ended < named.began, f"{name} was flushed after the record was named"
            wrote = [c for c in calls if c.name in ("write", "pwrite64") and c.path == folder / name]
            assert all(c.ended < flushed.began for c in wrote), f"{name} was written to after it was flushed"
            for parent in (folder / name).parents:
                if parent.is_relative_to(out / stream):
                    in_time = [c for c in calls if c.name in FLUSHES and c.path == parent and c.ended < named.began]
                    assert any(c.began > flushed.began for c in in_time), f"the names in {parent} were not flushed"
        after = [c for c in calls if c.name in FLUSHES and c.path == record_file.parent and c.began > named.ended]
        assert after, "a commit that has returned survives a power cut"


def _last(calls: list[Call], names: tuple[str, ...], path: Path) -> Call:
    matching = [call for call in calls if call.name in names and call.path == path]
    assert matching, f"{path} was never flushed"
    return matching[-1]


def test_strace_output_is_parsed() -> None:
    """Parse interleaved calls of several threads; failed calls are dropped."""
    log = (
        '7 fsync(5</a/file> <unfinished ...>\n8 write(6</a/b c>, "x"..., 10) = 10\n7 <... fsync resumed>) = 0\n'
        '7 link("/a/.tmp", "/a/record") = 0\n7 link("/a/.tmp", "/a/record") = -1 EEXIST (File exists)\n'
    )
    assert parse(log) == [
        Call("write", Path("/a/b c"), 1, 1),
        Call("fsync", Path("/a/file"), 0, 2),
        Call("link", Path("/a/record"), 3, 3),
    ]


def test_a_run_is_marked_done_after_all_files_are_flushed(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`metrics.json` marks the run as done and is written last; the checkpoint is deleted after it."""
    steps: list[tuple[str, Path]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def note_flush(handle: int) -> None:
        fsync(handle)
        steps.append(("flush", Path(f"/proc/self/fd/{handle}").readlink()))

    def note_replace(source: Path, target: Path) -> None:
        assert ("flush", Path(source)) in steps, f"{source} was not flushed before it was put in its place"
        replace(source, target)
        steps.append(("name", Path(target)))

    def note_unlink(path: Path, **named: object) -> None:
        unlink(path, **named)  # type: ignore[arg-type]
        steps.append(("gone", Path(path)))

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "unlink", note_unlink)
    out = tmp_path / "run"
    config = TrainConfig(hidden=16, epochs=2, device="cpu")
    train_run(open_cache(toys), config, out, tensorboard=False, figures=False, keep_checkpoint=False)
    done = steps.index(("name", out / "metrics.json"))
    for file in [out / "model.safetensors", out / "config.toml", *(out / "predictions" / "val").glob("*.csv")]:
        named = steps.index(("name", file))
        assert named < done
        assert ("flush", file.parent) in steps[named:done], f"the name of {file.name} was not flushed"
    gone = steps.index(("gone", out / "checkpoint.safetensors"))
    assert ("flush", out) in steps[done:gone]


def hidden(file: Path) -> Callable[[], object]:
    """The file does not exist yet."""
    aside = file.with_name(f"{file.name}.hidden")
    file.rename(aside)
    return lambda: aside.rename(file)


def empty(file: Path) -> Callable[[], object]:
    """The file exists but is empty."""
    data = file.read_bytes()
    file.write_bytes(b"")
    return lambda: file.write_bytes(data)


def short(file: Path) -> Callable[[], object]:
    """The file is truncated."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    return lambda: file.write_bytes(data)


def zeros(file: Path) -> Callable[[], object]:
    """The file has its full length but zero bytes."""
    data = file.read_bytes()
    file.write_bytes(bytes(len(data)))
    return lambda: file.write_bytes(data)


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def converted(lab: Lab, toys: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A copy of the toy cache in each store; tests restore the files that they damage."""
    out = tmp_path_factory.mktemp("converted") / "cache"
    assert_printed(lab.run(["cache", "convert", toys, "--out", out, "--store", request.param]), 0)
    return out


@pytest.mark.parametrize("late", [hidden, empty, short, zeros])
def test_a_record_visible_before_its_arrays_is_never_read_as_valid(
    toys: Path, converted: Path, late: Callable[[Path], Callable[[], object]]
) -> None:
    """Simulate a reordering network file system: an error until all files exist, then the correct arrays."""
    cache, truth = open_cache(converted), open_cache(toys)
    item = truth.items()[0]
    for stream in truth.streams():
        name = item if item in truth.items(stream=stream) else truth.items(stream=stream)[0]
        record = cache.record(stream, name)
        for file in record.files:
            appear = late(cache.layout.item(stream, name) / file)
            with pytest.raises(CorruptError, match="repair"):
                cache.read(stream, name)
            assert cache.has(stream, name)
            assert verify(open_cache(converted))
            appear()
            for array, value in truth.read(stream, name).arrays.items():
                np.testing.assert_array_equal(cache.read(stream, name).arrays[array], value, strict=True)
    assert verify(open_cache(converted)) == []


def test_training_stops_at_a_clip_with_missing_arrays(lab: Lab, toys: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", toys, tmp_path / "cache"], check=True)
    cache = open_cache(tmp_path / "cache")
    item = cache.items(split="train")[0]
    hidden(cache.layout.item("toy-eyes", item) / next(iter(cache.record("toy-eyes", item).files)))
    ended = lab.run(["train", tmp_path / "cache", "--out", tmp_path / "run", "--set", "hidden=16", "--device", "cpu"])
    assert_printed(ended, 1, item, "repair")


def test_only_damaged_items_are_extracted_again(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    """verify detects one flipped bit, repair drops that item, extract restores it: the cache is as before."""
    out = tmp_path / "cache"
    subprocess.run(["cp", "-a", whole, out], check=True)
    record = open_cache(out).record("clip-tiny", "clip2")
    file = open_cache(out).layout.item("clip-tiny", "clip2") / max(record.files, key=lambda n: record.files[n]["size"])
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    before = attempts(out)
    ended = lab.run(["cache", "verify", out])
    assert ended.code == 1
    assert "'clip2' of stream 'clip-tiny'" in ended.out + ended.err
    assert_printed(lab.run(["cache", "repair", out]), 0)
    assert_printed(lab.run(["extract", media, "--out", out, *EXTRACT]), 0)
    after = attempts(out)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"records/clip-tiny/clip2.json"}
    assert after.keys() == before.keys()
    assert lab.run(["cache", "verify", out]).code == 0
    assert_same_cache(out, whole)
