"""Detection of AFEW-VA, RECOLA, SEWA and MuSe, and the facts of their clips."""

import os
from pathlib import Path

import pytest
from affwild2_tree import build_affwild2
from other_trees import BUILDERS, Tree, write_text

from vaflow.datasets import LAYOUTS, Clip, Dataset, open_dataset
from vaflow.errors import UsageError


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tree]]:
    built = {}
    for layout, build in BUILDERS.items():
        root = tmp_path_factory.mktemp(layout)
        built[layout] = (root, build(root))
    return built


def by_id(dataset: Dataset) -> dict[str, Clip]:
    return {clip.id: clip for clip in dataset.clips}


def codes(dataset: Dataset) -> list[str]:
    return [note.code for note in dataset.notes]


@pytest.mark.parametrize("layout", BUILDERS)
def test_each_layout_is_detected_unambiguously(layout: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[layout]
    dataset = open_dataset(root)
    assert dataset.layout == layout and set(by_id(dataset)) == set(tree)
    others = set(LAYOUTS) - {layout, "videos"}  # every folder of videos can be read as one
    assert [name for name in others if LAYOUTS[name].detect(root)] == []


def test_other_datasets_match_none_of_these_layouts(tmp_path: Path) -> None:
    build_affwild2(tmp_path / "affwild2", seconds=0.5)
    assert open_dataset(tmp_path / "affwild2").layout == "affwild2"
    plain = tmp_path / "plain"
    write_text(plain / "labels" / "a.csv", "time,valence,arousal", "0,0,0")
    write_text(plain / "arousal" / "a.csv", "time,arousal", "0,0")
    write_text(plain / "thumbs" / "info.json", '{"size": 3}')
    (plain / "thumbs" / "1.png").touch()
    (plain / "a.mp4").touch()
    assert open_dataset(plain).layout == "videos"


@pytest.mark.parametrize("layout", BUILDERS)
def test_clips_have_their_split_media_and_labels(layout: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[layout]
    for name, clip in by_id(open_dataset(root, layout)).items():
        written = tree[name]
        assert (clip.split, clip.group) == (written.split, name)
        assert (clip.labels is not None) == bool(written.rows) == (clip.label_format == layout)
        if layout == "afew-va":
            assert clip.video is None and clip.audio is None and clip.frames == root / name and clip.frame_rate == 25
            continue
        assert clip.video is not None and clip.video.stem == name and clip.frames is None
        assert clip.audio is not None and (clip.audio.suffix.lower() == ".wav") == written.separate_audio
        assert clip.audio == clip.video or clip.audio.stem == name


def test_only_gold_standard_label_files_are_read(trees: dict[str, tuple[Path, Tree]]) -> None:
    for layout in ("recola", "muse"):
        root, tree = trees[layout]
        for name, clip in by_id(open_dataset(root)).items():
            assert {target for target, _ in clip.dimensions} == set(tree[name].rows)
            for target, path in clip.dimensions:
                assert path.parent.name == target and path.stem == name
                assert "features" not in str(path) and "individual" not in str(path)
    dataset = open_dataset(trees["recola"][0])
    assert [(note.code, note.item) for note in dataset.notes] == [("one-dimension", "P16")]


def test_the_partition_list_may_contain_missing_clips(trees: dict[str, tuple[Path, Tree]]) -> None:
    dataset = open_dataset(trees["muse"][0])
    assert codes(dataset) == ["split-unknown-name"] and "11" in dataset.notes[0].message


@pytest.mark.parametrize("separator", [";", "\t"])
def test_the_partition_list_may_have_semicolons_or_tabs(tmp_path: Path, separator: str) -> None:
    write_text(tmp_path / "arousal" / "1.csv", "timestamp,value,segment_id", "0,0,1")
    write_text(tmp_path / "partition.csv", f"Id{separator}Proposal", f"1{separator}devel")
    touch(tmp_path, "video/1.mp4")
    assert by_id(open_dataset(tmp_path))["1"].split == "val"


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_a_split_list_overrides_the_layout(tmp_path: Path) -> None:
    write_text(tmp_path / "labels" / "Train_01.csv", "0;0;0;0")
    touch(tmp_path, "x/TRAIN_01.mp4", "x/Test_02.mp4", "x/03.mp4", "x/04.mp4")
    write_text(tmp_path / "splits.csv", "name,split", "Train_01,val", "03,train")
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "sewa"
    assert {n: c.split for n, c in by_id(dataset).items()} == {
        "Train_01": "val",
        "Test_02": "test",
        "03": "train",
        "04": None,
    }
    clip = by_id(dataset)["Train_01"]
    assert clip.video == tmp_path / "x/TRAIN_01.mp4", "upper and lower case are the same"
    assert codes(dataset) == ["split-missing"] and "04" in dataset.notes[0].message


def test_afew_va_splits_come_from_the_list_only(tmp_path: Path) -> None:
    for name in ("001", "002"):
        write_text(tmp_path / name / f"{name}.json", '{"frames": {}}')
        touch(tmp_path, f"{name}/00000.png")
    write_text(tmp_path / "splits.csv", "name,split", "002,test")
    assert {n: c.split for n, c in by_id(open_dataset(tmp_path)).items()} == {"001": None, "002": "test"}


def test_the_first_of_several_equally_named_files_is_used_with_a_warning(tmp_path: Path) -> None:
    for task in ("c1", "c2"):
        write_text(tmp_path / task / "arousal" / "1.csv", "timestamp,value,segment_id", "0,0,1")
        write_text(tmp_path / task / "partition.csv", "Id,Proposal", f"1,{'train' if task == 'c1' else 'test'}")
    touch(tmp_path, "video/1.mp4", "video/1.avi")
    dataset = open_dataset(tmp_path)
    clip = by_id(dataset)["1"]
    assert clip.dimensions == (("arousal", tmp_path / "c1/arousal/1.csv"),) and clip.split == "train"
    assert clip.video == tmp_path / "video/1.avi"
    assert sorted(codes(dataset)) == ["one-dimension", "several-files", "several-files", "several-partitions"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["an empty file"]),
        ("name,split\n1,train\n", ["Id,Proposal"]),
        ("Id,Proposal\n1,training\n2\n1,train\n1,test\n", ["line 2", "'training'", "line 3", "line 5", "devel"]),
    ],
)
def test_errors_in_the_partition_list_are_reported(tmp_path: Path, text: str, parts: list[str]) -> None:
    write_text(tmp_path / "arousal" / "1.csv", "timestamp,value,segment_id", "0,0,1")
    (tmp_path / "partition.csv").write_text(text)
    with pytest.raises(UsageError) as caught:
        open_dataset(tmp_path)
    assert all(part in str(caught.value) for part in ["partition.csv", *parts])


def test_symlink_cycles_terminate(tmp_path: Path) -> None:
    write_text(tmp_path / "labels" / "Train_01.csv", "0;0;0;0")
    (tmp_path / "labels" / "again").symlink_to(tmp_path)
    touch(tmp_path, "Train_01.mp4")
    assert [clip.id for clip in open_dataset(tmp_path).clips] == ["Train_01"]


@pytest.mark.parametrize("layout", [*BUILDERS, "affwild2", "videos"])
def test_looping_and_dangling_symlinks_become_a_note(layout: str, tmp_path: Path) -> None:
    if layout == "affwild2":
        build_affwild2(tmp_path, seconds=0.5)
    elif layout == "videos":
        touch(tmp_path, "a.mp4")
    else:
        BUILDERS[layout](tmp_path)
    before = open_dataset(tmp_path)
    assert before.layout == layout
    for name in ("zz_loop.mp4", "zz_folder"):
        (tmp_path / name).symlink_to(tmp_path / name)
    (tmp_path / "zz_gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    after = open_dataset(tmp_path)
    assert after.layout == layout and by_id(after) == by_id(before)
    if layout != "afew-va":  # folders of frames: a video file is not looked at
        assert "unusable-name" in codes(after)


@pytest.mark.parametrize("layout", [*BUILDERS, "affwild2", "videos"])
def test_an_unreadable_directory_becomes_a_note(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout == "affwild2":
        build_affwild2(tmp_path, seconds=0.5)
    elif layout == "videos":
        touch(tmp_path, "a.mp4")
    else:
        BUILDERS[layout](tmp_path)
    before = open_dataset(tmp_path)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    after = open_dataset(tmp_path)
    assert by_id(after) == by_id(before)
    assert next(note.message for note in after.notes if note.code == "unreadable-folder").endswith("closed")
