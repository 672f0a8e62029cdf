"""Dataset names never escape their directory and never emit terminal control sequences."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaflow.datasets import open_dataset
from vaflow.datasets.files import below
from vaflow.datasets.videos import read_csv
from vaflow.errors import DataError, UsageError, explain, visible

ODD = [
    "line\nbreak.mp4",
    "right\u202eto left.mp4",
    "bell\x07 and \x1b[31mred.mp4",
    "zero\u200bwidth.mp4",
    "e\u0301 decomposed.mp4",
    "\u00e9 composed.mp4",
    "日本語.mp4",
    " blank first and last .mp4",
    "%2e%2e%2f.mp4",
    "..hidden? no.mp4"[2:],
    "x" * 240 + ".mp4",
    "-rf.mp4",
    "$(reboot).mp4",
    "con.mp4",
]
OUTSIDE = ["..", "../x", "a/../../x", "/etc/passwd", "", "a//b", "./a", "a\0b", "..\\x", "x" * 300, "\udcff"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_escapes_its_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be that of a file") as error:
        below(tmp_path, name)
    assert str(error.value).isprintable()


@given(st.text(max_size=40))
def test_ordinary_names_stay_below_their_directory(name: str) -> None:
    folder = Path("/data/set")
    try:
        path = below(folder, name)
    except DataError:
        return
    assert Path(os.path.normpath(path)) == path
    assert folder in path.parents
    assert path.relative_to(folder).as_posix() == name


@given(st.text(st.characters(), max_size=80))
def test_messages_contain_no_control_characters(name: str) -> None:
    shown = explain(f"{name} is odd", got=name, choices=[name])
    assert len(shown.splitlines()) <= 1
    categories = {unicodedata.category(character) for character in shown}
    assert not categories & {"Cc", "Cs", "Zl", "Zp"}
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f") & set(shown)
    shown.encode("utf-8")


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=80))
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


def test_unusual_names_are_distinct_items(tmp_path: Path) -> None:
    for name in ODD:
        (tmp_path / name).write_bytes(b"")
    dataset = open_dataset(tmp_path)
    assert {clip.id for clip in dataset.clips} == {name.removesuffix(".mp4") for name in ODD}


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/../../outside"])
def test_a_split_list_names_items_without_opening_files(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"")
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"")
    (root / "splits.csv").write_text(f"name,split\n{name},val\na,train\n")
    dataset = open_dataset(root)
    assert [(clip.id, clip.split) for clip in dataset.clips] == [("a", "train")]
    assert [note.code for note in dataset.notes] == ["split-unknown-name"]


def test_symlinked_directories_are_skipped_and_symlinked_files_used(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"")
    root = tmp_path / "data"
    root.mkdir()
    (root / "linked").symlink_to(outside)
    (root / "chosen.mp4").symlink_to(outside / "secret.mp4")
    (root / "loop").symlink_to(root)
    (root / "nowhere.mp4").symlink_to(tmp_path / "gone")
    dataset = open_dataset(root)
    assert [clip.id for clip in dataset.clips] == ["chosen"]
    assert {note.code for note in dataset.notes} == {"linked-folder", "unusable-name"}


def test_pipes_and_devices_are_ignored(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.csv").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "b.csv")
    dataset = open_dataset(tmp_path)
    assert [clip.id for clip in dataset.clips] == ["a"]
    for name in ("a.csv", "b.csv"):
        with pytest.raises(DataError, match="no regular file"):
            read_csv(tmp_path / name)


def test_text_files_above_the_size_limit_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    for name in ("a.csv", "splits.csv"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
    with pytest.raises(DataError, match="1099511627776 bytes"):
        read_csv(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="1099511627776 bytes"):
        open_dataset(tmp_path)
