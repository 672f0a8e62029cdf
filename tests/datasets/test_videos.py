"""The layout `videos` and layout selection. Scanning reads names only, so empty files suffice."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaflow.datasets import LAYOUTS, Dataset, log_left_out, open_dataset, read_annotation
from vaflow.datasets import labels as label_files
from vaflow.datasets.files import LeftOut, read_splits, walk
from vaflow.datasets.videos import item_ids, read_csv
from vaflow.errors import DataError, UsageError


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def ids(dataset: Dataset) -> list[str]:
    return [clip.id for clip in dataset.clips]


def codes(dataset: Dataset) -> list[str]:
    return [note.code for note in dataset.notes]


def test_item_ids_are_relative_video_paths(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "sub/deep/er/a.MOV", "c.webm", "d.mkv", "e.avi", ".hidden.mp4", ".git/x.mp4")
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "videos" and ids(dataset) == ["b", "c", "d", "e", "sub/deep/er/a"]
    for clip in dataset.clips:
        assert clip.group == clip.id and clip.video == clip.audio and clip.split is None and clip.labels is None
    assert dataset.clips[-1].video == tmp_path / "sub/deep/er/a.MOV"
    assert dataset.notes == ()


CONTAINERS = [
    "mpg",
    "mpeg",
    "m4v",
    "wmv",
    "ts",
    "flv",
    "3gp",
    "mts",
    "m2ts",
    "ogv",
    "mxf",
    "mp4",
    "avi",
    "mov",
    "mkv",
    "webm",
]


def test_every_container_that_ffmpeg_opens_is_a_video(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{suffix}.{suffix.upper()}" for suffix in CONTAINERS))
    dataset = open_dataset(tmp_path)
    assert ids(dataset) == sorted(CONTAINERS) and all(clip.video is not None for clip in dataset.clips)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac", "m4a", "ogg", "aac"])
def test_an_audio_file_is_a_clip_without_video(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a.{suffix}", "a.csv")
    [clip] = open_dataset(tmp_path).clips
    assert (clip.id, clip.video, clip.audio) == ("a", None, tmp_path / f"a.{suffix}")
    assert clip.labels == tmp_path / "a.csv"


def test_audio_next_to_a_video_of_the_same_name_is_not_an_item(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "a.mp4", "a.wav", "b.wav"))
    assert ids(dataset) == ["a", "b"] and codes(dataset) == ["audio-beside-video"]
    assert dataset.clips[0].audio == tmp_path / "a.mp4" and "a.wav" in dataset.notes[0].message


def test_unused_files_are_counted_and_listed(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "a.mp4", "notes.txt", "sub/b.TXT", "c.xyz", "README"))
    assert codes(dataset) == ["ignored-files"]
    message = dataset.notes[0].message
    assert ".txt: 2" in message and "no extension: 1" in message and "c.xyz" in message


def test_skipped_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.mp4", "b.docx")
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    log_left_out(open_dataset(tmp_path))
    for name in ("b.docx", "linked", "loop.mp4"):
        assert name in caplog.text


def test_ids_keep_the_extension_if_they_would_collide(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a.avi", "b.mp4", "sub/a.mp4")
    assert ids(open_dataset(tmp_path)) == ["a.avi", "a.mp4", "b", "sub/a"]


@given(st.sets(st.from_regex(r"[ab]{1,2}(\.(mp4|avi)){1,3}", fullmatch=True), min_size=1))
def test_ids_are_unique_and_as_short_as_possible(paths: set[str]) -> None:
    names = item_ids(sorted(paths))
    assert len(set(names)) == len(paths)
    for path, name in zip(sorted(paths), names, strict=True):
        stem = path.rpartition(".")[0]
        alone = sum(other.rpartition(".")[0] == stem for other in paths) == 1 and stem not in paths
        assert name == (stem if alone else path)


def test_labels_are_read_from_beside_the_video(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a.csv", "sub/a.mp4", "b.mp4", "sub/b.CSV", "c.csv")
    dataset = open_dataset(tmp_path)
    labels = {clip.id: clip.labels for clip in dataset.clips}
    assert labels == {"a": tmp_path / "a.csv", "b": None, "sub/a": None}
    assert {clip.label_format for clip in dataset.clips} == {"csv", "none"}
    assert codes(dataset) == ["table-without-video"]


def test_tables_of_persons_beside_an_audio_file_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a#2.csv", "talk.wav", "talk.csv", "talk#2.csv")
    (note,) = [note for note in open_dataset(tmp_path).notes if note.code == "table-without-video"]
    assert note.message.endswith(": talk#2")


def test_one_table_beside_two_videos_is_a_warning(tmp_path: Path) -> None:
    dataset = open_dataset(touch(tmp_path, "a.mp4", "a.avi", "a.csv"))
    assert [clip.labels for clip in dataset.clips] == [tmp_path / "a.csv"] * 2
    assert codes(dataset) == ["shared-labels"] * 2


def test_splits_by_id_or_by_path(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "sub/c.mp4", "d.mp4", "e.mp4", "e.avi")
    (tmp_path / "splits.csv").write_text(
        "name,split\na,train\nb.mp4,val\nsub/c,Test\ne.mp4,train\ngone,val\n\na,train\n", encoding="utf-8-sig"
    )
    dataset = open_dataset(tmp_path)
    splits = {clip.id: clip.split for clip in dataset.clips}
    assert splits == {"a": "train", "b": "val", "d": None, "e.avi": None, "e.mp4": "train", "sub/c": "test"}
    messages = {note.code: note.message for note in dataset.notes}
    assert set(messages) == {"split-unknown-name", "split-missing"}
    assert "gone" in messages["split-unknown-name"] and "d, e.avi" in messages["split-missing"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_splits_are_separated_by_commas_semicolons_or_tabs(tmp_path: Path, separator: str) -> None:
    (tmp_path / "splits.csv").write_text(f"name{separator}split\na{separator}val\n")
    assert read_splits(tmp_path / "splits.csv")["split"] == {"a": "val"}


def test_the_split_list_may_contain_groups(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "splits.csv").write_text("name;split;Group;age\na;train;ann;31\nb.mp4;train;ann;\nc;val;;7\n")
    dataset = open_dataset(tmp_path)
    assert {clip.id: clip.group for clip in dataset.clips} == {"a": "ann", "b": "ann", "c": "c"}
    assert codes(dataset) == ["split-unknown-column"] and "age" in dataset.notes[0].message
    (tmp_path / "splits.csv").write_text("name,group\na,ann\na,bob\n")
    with pytest.raises(UsageError, match="puts 'a' into bob"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["an empty file"]),
        ("a,train\n", ["name,split"]),
        ("name,split\na,training\nb,\na,train,1\n", ["line 2", "'training'", "line 3", "line 4", "test, train, val"]),
        ("name,split\na,train\na,val\n", ["line 3", "'a'"]),
        ("name,split\na,train\na.mp4,val\n", ["'a' in train", "'a.mp4' in val"]),
    ],
)
def test_errors_in_the_split_list_are_reported_together(tmp_path: Path, text: str, parts: list[str]) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(UsageError) as caught:
        open_dataset(tmp_path)
    for part in ["splits.csv", *parts]:
        assert part in str(caught.value)


def test_symlinked_files_are_used_and_symlinked_directories_skipped(tmp_path: Path) -> None:
    root, other = tmp_path / "root", touch(tmp_path / "other", "x.mp4", "y.mp4")
    touch(root, "a.mp4")
    (root / "linked.mp4").symlink_to(other / "x.mp4")
    (root / "folder").symlink_to(other)
    (root / "circle").symlink_to(root)
    (root / "broken.mp4").symlink_to(tmp_path / "gone.mp4")
    dataset = open_dataset(root)
    assert ids(dataset) == ["a", "linked"] and codes(dataset) == ["linked-folder", "unusable-name"]
    assert "folder" in dataset.notes[0].message and "broken.mp4" in dataset.notes[1].message


def test_names_with_a_backslash_are_skipped_with_a_note(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b\\c.mp4")  # no prediction could have its name
    dataset = open_dataset(tmp_path)
    assert ids(dataset) == ["a"] and codes(dataset) == ["unusable-name"]


def test_undecodable_names_are_skipped_with_a_note(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.mp4"))).touch()
    except OSError:
        pytest.skip("this file system allows only names that are text")
    dataset = open_dataset(tmp_path)
    assert ids(dataset) == ["a"] and codes(dataset) == ["unusable-name"]


# --- choosing a layout


def refusal(root: Path, layout: str = "auto") -> str:
    with pytest.raises(UsageError) as caught:
        open_dataset(root, layout)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_root_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.mp4")
    message = refusal(tmp_path / "date" / "deeper")
    assert "does not exist" in message and "data/" in message


def test_a_file_as_root_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    message = refusal(tmp_path / "a.mp4")
    assert "not a folder" in message and str(tmp_path) in message


def test_an_empty_directory_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, ".DS_Store")
    assert "is empty" in refusal(tmp_path)


def test_a_directory_with_unusable_names_only_is_rejected_with_the_reason(tmp_path: Path) -> None:
    message = refusal(touch(tmp_path, "a\\b.mp4"))
    assert "has no file that can be used" in message and "with a backslash: a\\b.mp4. Rename" in message


def test_caches_and_runs_in_the_data_set_are_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "c/manifest.json", "c/streams/labels.json", "c/crops/a/x", "d/run/b.csv")
    touch(tmp_path, "d/run/config.toml", "d/run/clips.json", "config.toml", "clips.json")
    dataset = open_dataset(tmp_path)
    assert ids(dataset) == ["a"] and codes(dataset) == ["outputs", "ignored-files"]
    assert dataset.notes[0].message == "Caches, runs and pages in the data set are not searched: c, d/run"
    left_out = LeftOut(tmp_path)
    assert [folder.name for folder, _ in walk(tmp_path, left_out)] == [tmp_path.name, "d"]
    assert left_out.outputs == ["c", "d/run"]


def test_files_of_predictions_beside_the_videos_are_not_clips(tmp_path: Path) -> None:
    touch(tmp_path, "a.avi", "a.csv", "a.overlay.mp4", "b.overlay.mp4")
    touch(tmp_path, "view/index.html", "view/clips/0001.js", "view/media/0001-60007af5.mp4")
    dataset = open_dataset(tmp_path)
    assert ids(dataset) == ["a", "b.overlay"]
    assert [note.message for note in dataset.notes] == [
        "Caches, runs and pages in the data set are not searched: view",
        "Files that are not used (.mp4: 1): a.overlay.mp4",
    ]


def test_no_layout_fits(tmp_path: Path) -> None:
    message = refusal(touch(tmp_path, "a.txt", "sub/b.jpg"))
    for part in ("No layout fits", "a.txt", "sub/", "(videos)", "(affwild2)"):
        assert part in message


def test_an_unknown_layout_error_lists_the_choices(tmp_path: Path) -> None:
    message = refusal(touch(tmp_path, "a.mp4"), "affwild")
    assert "Did you mean 'affwild2'?" in message and "videos" in message


def test_a_wrong_layout_error_names_the_right_one(tmp_path: Path) -> None:
    message = refusal(touch(tmp_path, "a.mp4"), "affwild2")
    assert "VA_Estimation_Challenge" in message and "'videos' fits" in message


def test_every_layout_describes_its_files() -> None:
    assert "auto" not in LAYOUTS
    assert all(layout.looks_for for layout in LAYOUTS.values())


def test_a_missing_split_is_logged_for_extraction_but_not_for_prediction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "splits.csv").write_text("name,split\na,train\n")
    dataset = open_dataset(tmp_path, "videos")
    log_left_out(dataset, skip=("split-missing",))
    assert caplog.messages == []
    log_left_out(dataset)
    assert "gives no split to: b" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_tables_in_utf_16_with_a_mark_are_read_as_excel_writes_them(tmp_path: Path, encoding: str) -> None:
    text = "\ufeffframe\tvalence\tarousal\r\n0\t0,5\t-0,25\r\n1\t\t0\r\n"
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    (tmp_path / "splits.csv").write_bytes("\ufeffname\tsplit\r\na\tval\r\n".encode(encoding))
    (tmp_path / "a.mp4").touch()
    [clip] = open_dataset(tmp_path).clips
    labels = read_annotation(clip)
    assert clip.split == "val" and labels is not None
    np.testing.assert_array_equal(labels.value, np.array([[0.5, -0.25], [np.nan, 0]], np.float32))


def test_damaged_utf_16_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftime,valence\n0,1\n".encode("utf-16-le")[:-1])
    with pytest.raises(DataError, match=r"damaged UTF-16 text\. Correct the file"):
        read_csv(tmp_path / "a.csv")


def test_a_table_with_two_clocks_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("frame,time,valence\n0,0,0\n2,0.5,0.1\n3,?,0.2\n")
    calls = []
    split = label_files.split_cells

    def counted(line: str, separator: str = ",") -> list[str]:
        calls.append(line)
        return split(line, separator)

    monkeypatch.setattr(label_files, "split_cells", counted)
    labels = read_csv(tmp_path / "a.csv")
    np.testing.assert_array_equal(labels.stated, [0, 0.5, np.nan])
    assert len(calls) == 3


def test_the_table_of_a_person_wins_over_that_of_the_clip(tmp_path: Path) -> None:
    for name, value in (("a", 0.1), ("a#2", 0.2)):
        (tmp_path / f"{name}.csv").write_text(f"frame,valence\n0,{value}\n")
    (tmp_path / "a.mp4").touch()
    [clip] = open_dataset(tmp_path).clips
    values = [read_annotation(clip, person).value[0, 0] for person in (0, 1, 2)]  # type: ignore[union-attr]
    np.testing.assert_allclose(values, [0.1, 0.1, 0.2], rtol=1e-6)


def test_a_cache_or_a_run_as_root_is_named_as_such(tmp_path: Path) -> None:
    touch(tmp_path, "cache/manifest.json", "cache/streams/labels.json", "run/config.toml", "run/clips.json")
    for name, kind in (("cache", "a cache"), ("run", "a run directory")):
        with pytest.raises(UsageError, match=rf"/{name} is {kind}\. Expected: the folder of a data set"):
            open_dataset(tmp_path / name)
