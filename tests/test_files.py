"""Files are written atomically, durably, and never through a symlink."""

import os
import signal
import threading
from pathlib import Path

import pytest

from vaflow.errors import VaflowError
from vaflow.files import append_line, create_file, read_document, refuse_links, replace_file, sync, sync_all, write_file


def test_a_failed_write_keeps_the_old_file_without_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_file(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(VaflowError, match=r"Cannot write .*No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    write_file(path, "first")
    write_file(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_symlink_at_the_target_is_replaced_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(outside)
    write_file(link, "new")
    assert outside.read_text() == "mine"
    assert not link.is_symlink()
    assert link.read_text() == "new"


@pytest.mark.parametrize("root", [".", "..", "../top", "sub/../sub", "/"])
def test_links_are_found_below_any_way_to_write_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    (tmp_path / "top" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "top")
    refuse_links(Path(root), Path(root) / "free" / "file")
    for outside in (Path(root) / ".." / "file", Path("elsewhere/../../file"), Path("/", "..", "file")):
        with pytest.raises(OSError, match="outside"):
            refuse_links(Path(root), outside)
    if root != "/":
        (Path(root) / "link").symlink_to(tmp_path)
        with pytest.raises(OSError, match="link"):
            refuse_links(Path(root), Path(root) / "link" / "file")


def test_a_log_rejects_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic links"):
        append_line(tmp_path / "log", "line")
    assert (tmp_path / "outside").read_text() == "mine"


def test_text_that_is_not_unicode_is_written_as_escapes(tmp_path: Path) -> None:
    write_file(tmp_path / "names", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "names").read_bytes() == rb"caf\udce9"


def test_file_and_folder_are_flushed_before_the_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[bool] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        flushed.append(os.path.isdir(f"/proc/self/fd/{handle}"))  # noqa: PTH112
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "file", b"data")
    assert flushed == [False, True]  # the file, then its folder


def test_readers_never_see_partial_files(tmp_path: Path) -> None:
    path, data = tmp_path / "record", b"x" * 2**16
    sizes: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                sizes.add(len(path.read_bytes()))
            except FileNotFoundError:
                continue

    looking = threading.Thread(target=look)
    looking.start()
    assert create_file(path, data)
    assert not create_file(path, b"late")
    for _ in range(20):
        replace_file(path, data)
    stop.set()
    looking.join()
    assert sizes <= {len(data)}
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


def test_documents_must_be_small_regular_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(2**30)
    assert read_document(tmp_path, tmp_path / "file") == b"{}"
    for name in ("link", "folder", "pipe", "huge"):
        with pytest.raises(ValueError, match=r"link|regular|bytes"):
            read_document(tmp_path, tmp_path / name)
    with pytest.raises(ValueError, match="outside the folder"):
        read_document(tmp_path / "folder", tmp_path / "file")


def test_a_folder_is_flushed_without_being_written(tmp_path: Path) -> None:
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")


def test_every_file_and_folder_is_flushed_also_in_a_forked_process(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    names = ["a/b/one", "a/two"]
    for name in names:
        (tmp_path / name).write_text(name)
    flushed: list[Path | str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vaflow.files.sync", flushed.append)
        sync_all(tmp_path, names)
    paths = [tmp_path / name for name in (*names, "a/b", "a", ".")]
    assert sorted(map(Path, flushed)) == sorted(paths)
    assert {Path(path) for path in flushed[:2]} == set(paths[:2]), "files before folders"
    child = os.fork()  # it has none of the threads
    if child == 0:
        signal.alarm(20)
        sync_all(tmp_path, names)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    with pytest.raises(FileNotFoundError):
        sync_all(tmp_path, ["there", "missing"])
