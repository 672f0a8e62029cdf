"""Caches on object stores satisfy the contract for machines that share only the store."""

import json
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from cache_toys import arrays, assert_same, small_cache, stream
from store_contract import (  # noqa: F401 - run here on an object store
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

from vaflow.cache import create_cache, open_cache
from vaflow.cache.copy import convert, merge
from vaflow.cache.export import pack
from vaflow.cache.maintenance import repair, verify
from vaflow.cache.remote import VARIABLE, url_of
from vaflow.cache.schema import StoreName
from vaflow.cache.stores import STORES
from vaflow.cli import main
from vaflow.errors import CacheError, CorruptError, SchemaError, UsageError
from vaflow.train.scores import failed_items


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path on an object store; each open_cache call acts as another machine with an empty disk."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("vaflow.cache.remote.temporary_folder", lambda: tmp_path_factory.mktemp("machine"))
    name = token_hex(8)
    yield Path(f"memory:/{name}")
    memory().store.clear()


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


def memory() -> Any:
    return fsspec.filesystem("memory")


def objects(path: Path) -> dict[str, bytes]:
    """Name below `path` -> bytes of everything on the store."""
    top = str(path).removeprefix("memory:")
    fs = memory()
    return {key.removeprefix(top).lstrip("/"): fs.cat_file(key) for key in fs.find(top)}


def test_a_second_machine_reads_the_stored_items(tmp_path, store):
    written = small_cache(tmp_path / "cache", store)
    read = open_cache(tmp_path / "cache")
    assert read.path != written.path
    assert read.place == f"memory://{tmp_path.name}/cache"
    assert read.items() == ["a/b", "c"]
    assert read.info()["store"] == store
    for name in ("visual", "labels"):
        for item in ("a/b", "c"):
            assert_same(dict(read.read(name, item).arrays), dict(written.read(name, item).arrays))
            assert read.record(name, item) == written.record(name, item)
    assert verify(read) == []


def test_the_object_store_has_the_documented_layout(tmp_path, store, disk):
    """Assert that the store contains exactly the files of a directory."""
    small_cache(tmp_path / "cache", store)
    for name, data in objects(tmp_path / "cache").items():
        (disk / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / "copy" / name).write_bytes(data)
    local = open_cache(disk / "copy")
    assert verify(local) == []
    assert_same(dict(local.read("visual", "c").arrays), arrays(stream("visual"), seed=1))
    files = {f"visual/c/{name}" for name in local.record("visual", "c").files}
    assert {name for name in objects(tmp_path / "cache") if name.startswith("visual/c/")} == files
    if store == "zarr":
        path = f"memory:/{tmp_path.name}/cache/visual/c/{local.record('visual', 'c').attempt}"
        group = zarr.open_group(path.replace("memory:/", "memory://"), mode="r")
        np.testing.assert_array_equal(np.asarray(group["time"]), arrays(stream("visual"), seed=1)["time"])


def test_the_record_is_uploaded_after_its_arrays(tmp_path, store, monkeypatch):
    cache = small_cache(tmp_path / "cache", store)
    fs, steps = memory(), []
    real = type(fs).pipe_file

    def note(self: Any, path: str, value: bytes, **options: Any) -> None:
        steps.append((path.split("/cache/")[1], options.get("mode")))
        real(self, path, value, **options)

    monkeypatch.setattr(type(fs), "pipe_file", note)
    record = cache.write("visual", "new", arrays(stream("visual")))
    assert steps[-1] == ("records/visual/new.json", "create")
    assert {name for name, _ in steps[:-1]} == {f"visual/new/{name}" for name in record.files}
    steps.clear()
    cache.write("visual", "new", arrays(stream("visual"), seed=7))
    assert steps[-1][0] == "records/visual/new.json"
    assert not any(name.startswith(f"visual/new/{record.attempt}") for name in objects(tmp_path / "cache"))


def test_the_first_commit_of_two_machines_wins(tmp_path, store: StoreName, monkeypatch):
    one = small_cache(tmp_path / "cache", store)
    two = open_cache(tmp_path / "cache", writable=True)
    inner = type(STORES[store]).write_attempt
    raced: list[str] = []

    def write_then_lose(self: Any, folder: Path, attempt: str, given: Any) -> list[str]:
        names = inner(self, folder, attempt, given)
        if not raced:
            raced.append(attempt)
            raced.append(two.write("visual", "new", arrays(stream("visual"), seed=2)).attempt)
        return names

    monkeypatch.setattr(type(STORES[store]), "write_attempt", write_then_lose)
    assert one.write("visual", "new", arrays(stream("visual"), seed=1)).attempt == raced[1]
    assert_same(dict(one.read("visual", "new").arrays), arrays(stream("visual"), seed=2))
    assert not any(raced[0] in name for name in objects(tmp_path / "cache"))


def test_a_failed_write_leaves_no_files(tmp_path, store, monkeypatch):
    cache = small_cache(tmp_path / "cache", store)
    before = objects(tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise OSError("slow down")

    with monkeypatch.context() as patch, pytest.raises(CacheError, match=r"slow down.*run the same command again"):
        patch.setattr("vaflow.cache.remote.Remote.create", refuse)  # arrays without a record
        cache.write("visual", "new", arrays(stream("visual")))
    assert objects(tmp_path / "cache") == before
    assert not cache.has("visual", "new")
    with monkeypatch.context() as patch, pytest.raises(CacheError, match="slow down"):
        patch.setattr("vaflow.cache.remote.Remote.pull", refuse)
        cache.refresh_index()


def test_two_machines_can_declare_the_same_stream(tmp_path, store):
    one, two = (create_cache(tmp_path / "cache", store=store) for _ in range(2))
    one.declare(stream("visual"))
    two.declare(stream("visual"))
    assert one.fingerprint("visual") == two.fingerprint("visual")
    with pytest.raises(CacheError, match="dtype"):
        open_cache(tmp_path / "cache", writable=True).declare(stream("visual", "float32"))


def test_refresh_shows_changes_by_other_machines(tmp_path, store):
    one = small_cache(tmp_path / "cache", store)
    two = open_cache(tmp_path / "cache")
    two.read("visual", "c")
    one.write("labels", "new", arrays(stream("labels")), meta={"split": "val"})
    one.drop("labels", "a/b")
    one.write("visual", "c", arrays(stream("visual"), 9, seed=9))
    assert_same(dict(two.read("labels", "c").arrays), arrays(stream("labels"), seed=1))
    two.refresh_index()
    assert two.items() == ["c", "new"]
    assert_same(dict(two.read("visual", "c").arrays), arrays(stream("visual"), 9, seed=9))
    assert len(list((two.path / "visual" / "c").iterdir())) == 1  # the old arrays are deleted


def test_an_open_reader_sees_a_replaced_item(tmp_path, store):
    one = small_cache(tmp_path / "cache", store)
    two = open_cache(tmp_path / "cache")
    one.write("visual", "c", arrays(stream("visual"), 9, seed=9))
    assert_same(dict(two.read("visual", "c").arrays), arrays(stream("visual"), 9, seed=9))


def test_each_item_is_downloaded_once_into_the_local_folder(tmp_path, store, disk, monkeypatch):
    small_cache(tmp_path / "cache", store)
    monkeypatch.setenv(VARIABLE, str(disk))
    calls: list[str] = []
    real = type(memory()).cat

    def note(self: Any, path: Any, *args: Any, **options: Any) -> Any:
        calls.extend(path)
        return real(self, path, *args, **options)

    monkeypatch.setattr(type(memory()), "cat", note)
    first = open_cache(tmp_path / "cache")
    assert first.path.parent == disk
    first.read("visual", "c")
    files = {name for name in calls if "/visual/c/" in name}
    assert len(files) == len(first.record("visual", "c").files)
    calls.clear()
    again = open_cache(tmp_path / "cache")
    again.read("visual", "c")
    first.read("visual", "c")
    assert calls == []  # neither arrays nor records: nothing has changed


def test_another_cache_at_the_same_url_replaces_the_local_copy(tmp_path, disk, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(disk / "local"))
    url, top = str(tmp_path), str(tmp_path).removeprefix("memory:")
    for number, items in enumerate([("a/b", "c"), ("c", "d", "e")]):
        pack(small_cache(disk / f"{number}", "zarr", items), disk / f"packed{number}")
        if number:
            memory().rm(top, recursive=True)
        memory().put(str(disk / f"packed{number}"), top, recursive=True)
        packed = open_cache(url)
        assert_same(dict(packed.read("visual", "c").arrays), arrays(stream("visual"), seed=1 - number))
        assert verify(packed) == []  # downloads every file


@pytest.mark.parametrize("url", ["s3://bucket/a[1].cache", "s3://bucket/*", "memory://a?", "s3://bucket/a::b"])
def test_urls_that_match_other_caches_are_rejected(url: str) -> None:
    for function in (open_cache, create_cache):
        with pytest.raises(UsageError, match="contains a wildcard"):
            function(url)


def test_a_damaged_local_copy_is_downloaded_again(tmp_path, store):
    small_cache(tmp_path / "cache", store)
    cache = open_cache(tmp_path / "cache")
    cache.read("visual", "c")
    for path in [p for p in (cache.path / "visual" / "c").rglob("*") if p.is_file()]:
        path.write_bytes(b"torn")
    assert_same(dict(cache.read("visual", "c").arrays), arrays(stream("visual"), seed=1))


def test_damage_on_the_object_store_is_detected_and_repaired(tmp_path, store):
    small_cache(tmp_path / "cache", store)
    cache = open_cache(tmp_path / "cache", writable=True)
    cache.read("visual", "c")
    name = next(name for name in objects(tmp_path / "cache") if name.startswith("visual/c/"))
    memory().pipe_file(f"/{tmp_path.name}/cache/{name}", b"torn")
    assert [problem.item for problem in verify(cache)] == ["c"]  # although the local copy was intact
    with pytest.raises(CorruptError, match=f"memory://{tmp_path.name}/cache"):
        open_cache(tmp_path / "cache").read("visual", "c")
    repair(cache)
    after = open_cache(tmp_path / "cache")
    assert verify(after) == []
    assert not after.has("visual", "c")
    assert not any(name.startswith("visual/c/") for name in objects(tmp_path / "cache"))


def test_caches_convert_and_merge_to_and_from_the_store(tmp_path, store, disk):
    local = small_cache(disk / "local", store)
    convert(local, tmp_path / "there", "zarr")
    remote = open_cache(tmp_path / "there")
    part = small_cache(disk / "part", "zarr", ("d", "e"))
    assert merge(tmp_path / "there", [part]).copied == 4
    summary = convert(open_cache(tmp_path / "there"), disk / "back", "hdf5")
    assert summary.copied == 8
    back = open_cache(disk / "back")
    assert back.items() == ["a/b", "c", "d", "e"]
    assert back.record("visual", "c").source == local.record("visual", "c").source
    assert_same(dict(back.read("visual", "c").arrays), dict(remote.read("visual", "c").arrays))
    with pytest.raises(UsageError, match="Choose another folder"):
        convert(remote, tmp_path / "there" / "inside", "zarr")


def test_lists_of_failures_are_shared(tmp_path, store):
    one = small_cache(tmp_path / "cache", store)
    line = {"item": "lost", "stage": "open", "error": "E", "message": "m", "split": "val"}
    (one.path / "failures-1-of-2.jsonl").write_text(json.dumps(line) + "\n")
    one.refresh_index()
    assert failed_items(open_cache(tmp_path / "cache"), "val") == ["lost"]
    (one.path / "failures-1-of-2.jsonl").write_text("")
    one.refresh_index()
    assert failed_items(open_cache(tmp_path / "cache"), "val") == []


def test_object_names_cannot_escape_the_local_folder(tmp_path, store):
    small_cache(tmp_path / "cache", store)
    fs = memory()
    for name in ("records/visual/../../../evil.json", "../evil.json", "records//evil.json"):
        fs.store[f"/{tmp_path.name}/cache/{name}"] = type(fs.store[next(iter(fs.store))])(fs, name, b"{}")
    cache = open_cache(tmp_path / "cache")
    assert cache.items() == ["a/b", "c"]
    assert not list(cache.path.parent.rglob("evil.json"))


def test_a_directory_without_a_cache_is_rejected(tmp_path, capsys):
    with pytest.raises(UsageError, match=f"memory://{tmp_path.name}/cache is not a cache"):
        open_cache(tmp_path / "cache")
    memory().pipe_file(f"/{tmp_path.name}/mine/notes.txt", b"mine")
    with pytest.raises(SchemaError, match=r"neither empty nor a cache.*notes\.txt"):
        create_cache(tmp_path / "mine")
    assert main(["cache", "info", f"memory://{tmp_path.name}/cache"]) == 2
    assert "is not a cache" in capsys.readouterr().err


def test_commands_accept_urls(tmp_path, store, capsys):
    small_cache(tmp_path / "cache", store)
    url = f"memory://{tmp_path.name}/cache"
    assert main(["cache", "info", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == url
    assert main(["cache", "verify", url]) == 0


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        (Path("gs://bucket") / "a", "gs://bucket/a"),
        ("memory://x", "memory://x"),
        ("/data/cache", None),
        ("cache", None),
        ("C:/cache", None),
        ("s3", None),
        ("other://x", None),
    ],
)
def test_urls_are_distinguished_from_paths(path, url):
    assert url_of(path) == url


def test_a_missing_library_is_named(monkeypatch):
    def missing(*_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[s3\]'"):
        open_cache("s3://bucket/cache")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a local S3 server."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]: pip install 'moto[server]' s3fs")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def test_s3(bucket, disk, monkeypatch):
    """Declare, commit twice, replace, drop, read from another machine, damage, deny access."""
    monkeypatch.setenv(VARIABLE, str(disk / "one"))
    url = f"s3://{bucket}/some/cache"
    one = create_cache(url)
    one.declare(stream("labels"))
    monkeypatch.setenv(VARIABLE, str(disk / "two"))
    two = open_cache(url, writable=True)
    first = one.write("labels", "a/b", arrays(stream("labels"), seed=1), meta={"split": "val"})
    assert two.write("labels", "a/b", arrays(stream("labels"), seed=2)).attempt == first.attempt
    assert_same(dict(two.read("labels", "a/b").arrays), arrays(stream("labels"), seed=1))
    one.write("labels", "a/b", arrays(stream("labels"), seed=3), meta={"split": "val"})
    assert_same(dict(open_cache(url).read("labels", "a/b").arrays), arrays(stream("labels"), seed=3))
    assert verify(one) == []
    one.write("labels", "gone", arrays(stream("labels")))
    one.drop("labels", "gone")
    two.refresh_index()
    assert two.items() == ["a/b"]
    with pytest.raises(UsageError, match="cannot be written"):
        create_cache("s3://no-such-bucket-here/cache")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UsageError, match="cannot be read"):
        open_cache(url)


@pytest.mark.parametrize("url", ["file:///tmp/cache", "sftp://host/cache", "S3://bucket/cache"])
def test_urls_of_other_schemes_do_not_become_folders(
    url: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("urls")
    monkeypatch.chdir(folder)
    for function in (open_cache, create_cache):
        with pytest.raises(UsageError, match="is not a URL scheme that a cache can have"):
            function(Path(url))
    assert main(["cache", "info", url]) == 2
    assert not list(folder.iterdir())
    Path("sub:").mkdir()
    assert create_cache("sub:/cache").path == folder / "sub:" / "cache"
