"""The Aff-Wild2 layout on a tree with every quirk. Scanning reads names only, so empty files suffice."""

import os
import shutil
from pathlib import Path

import pytest
from affwild2_tree import Tree, build_affwild2, spoil_affwild2

from vaflow.datasets import Clip, Dataset, open_dataset
from vaflow.errors import UsageError


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return build_affwild2(tmp_path_factory.mktemp("affwild2"), seconds=0.5)


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def clips_of(root: Path) -> dict[str, Clip]:
    dataset = open_dataset(root, "affwild2")
    return {clip.id: clip for clip in dataset.clips}


def codes(dataset: Dataset) -> list[str]:
    return [note.code for note in dataset.notes]


TRAIN = "VA_Estimation_Challenge/Train_Set"
VAL = "VA_Estimation_Challenge/Validation_Set"


def test_trials_have_their_split_video_and_crops(tree: Tree) -> None:
    dataset = open_dataset(tree.root)
    assert dataset.layout == "affwild2"
    assert [clip.id for clip in dataset.clips] == sorted(tree.trials)
    for clip in dataset.clips:
        trial = tree.trials[clip.id]
        assert (clip.split, clip.group, clip.video, clip.audio) == (trial.split, trial.group, trial.video, trial.video)
        assert (clip.labels is not None) == (trial.labels is not None)
        numbers = {int(path.stem) for folder in clip.crops for path in folder.glob("*.jpg")}
        assert numbers == set(trial.crops)
        assert all(folder.name == clip.id for folder in clip.crops)
    assert codes(dataset) == ["no-split"] and "smile" in dataset.notes[0].message


def test_left_and_right_share_a_group(tree: Tree) -> None:
    clips = clips_of(tree.root)
    left, right = clips["video5_left"], clips["video5_right"]
    assert left.group == right.group == "video5"
    assert left.video == right.video and left.audio == right.audio
    assert left.labels != right.labels and left.crops != right.crops


def test_a_video_named_like_the_trial_keeps_the_suffix(tree: Tree) -> None:
    clip = clips_of(tree.root)["solo_left"]
    assert clip.group == "solo_left" and clip.video is not None and clip.video.stem == "solo_left"


def test_crop_archives_are_merged(tree: Tree) -> None:
    archives = [folder.parent.name for folder in clips_of(tree.root)["video7"].crops]
    assert archives == ["cropped_aligned", "cropped_aligned_new_50_vids"]


@pytest.mark.parametrize(
    "under", ["VA_Estimation_Challenge", "VA_Set", "6th ABAW Annotations/VA_Estimation_Challenge", "."]
)
def test_annotations_are_discovered_in_any_archive_layout(tmp_path: Path, under: str) -> None:
    touch(tmp_path, f"{under}/Train_Set/a.txt", f"{under}/Validation_Set/b.txt", "raw_videos/a.mp4", "batch1/x/b.AVI")
    clips = clips_of(tmp_path)
    assert {name: clip.split for name, clip in clips.items()} == {"a": "train", "b": "val"}
    assert clips["b"].video == tmp_path / "batch1/x/b.AVI" and clips["b"].crops == ()


def test_nested_and_unaligned_crop_archives_are_recognized(tmp_path: Path) -> None:
    touch(tmp_path, "cropped_aligned/cropped_aligned/a/00001.jpg", "cropped/a/00001.jpg", f"{TRAIN}/a.txt")
    (tmp_path / "cropped_aligned_2" / "nobody").mkdir(parents=True)
    dataset = open_dataset(tmp_path)
    clips = {clip.id: clip for clip in dataset.clips}
    assert clips["a"].crops == (tmp_path / "cropped_aligned/cropped_aligned/a",)
    assert clips["nobody"].crops == (tmp_path / "cropped_aligned_2/nobody",), (
        "an empty crop folder means no face in any frame"
    )
    assert "crops-not-aligned" in codes(dataset)


def test_unlabelled_trials_without_a_list_are_test_trials(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", "raw_videos/a.mp4", "raw_videos/b.mp4", "raw_videos/c.mp4", "raw_videos/d.mp4")
    touch(tmp_path, "cropped_aligned/c_left/00001.jpg", "cropped_aligned/c_right/00001.jpg")
    touch(tmp_path, "AU_Detection_Challenge/Train_Set/d.txt")
    splits = {name: clip.split for name, clip in clips_of(tmp_path).items()}
    assert splits == {"a": "train", "b": "test", "c_left": "test", "c_right": "test", "d": None}


def test_the_sample_submission_lists_test_trials(tmp_path: Path, tree: Tree) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree.root, root)
    (root / "VA_test_set_release.txt").unlink()
    clips = clips_of(root)
    assert {name for name, clip in clips.items() if clip.split == "test"} == {"video20", "video21_right"}
    assert clips["smile"].split is None


def test_unrelated_text_files_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", "raw_videos/a.mp4", "raw_videos/b.mp4")
    (tmp_path / "latest.txt").write_text("These files were downloaded\nin the latest version\nb\n")
    (tmp_path / "some_test_sample.txt").write_text("image_location,Neutral,Anger\nb/00001.jpg,0,1\n")
    dataset = open_dataset(tmp_path)
    assert {clip.id: clip.split for clip in dataset.clips} == {"a": "train", "b": "test"}
    assert codes(dataset) == ["not-a-list"]


def test_split_lists_may_contain_missing_trials(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", "raw_videos/a.mp4", "raw_videos/b.mp4", "raw_videos/c.mp4")
    (tmp_path / "test_set.txt").write_text("b.mp4\nc\n\ngone\n")
    clips = clips_of(tmp_path)
    assert {name for name, clip in clips.items() if clip.split == "test"} == {"b", "c", "gone"}
    assert clips["gone"].video is None


def test_labels_without_a_video_belong_to_the_right_group(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a_left.txt", f"{TRAIN}/a_right.txt")
    clips = clips_of(tmp_path)
    assert {clip.group for clip in clips.values()} == {"a"}
    assert all(clip.video is None and clip.audio is None for clip in clips.values())


def test_the_first_of_two_videos_with_one_name_is_used_with_a_note(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", "batch2/a.mp4", "batch1/a.mp4", "batch1/a.avi")
    dataset = open_dataset(tmp_path)
    assert [clip.video for clip in dataset.clips] == [tmp_path / "batch1/a.avi"]
    assert codes(dataset) == ["two-videos"] and "batch2/a.mp4" in dataset.notes[0].message


def test_a_trial_in_both_splits_is_excluded_with_an_error(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", f"{VAL}/a.txt", "raw_videos/a.mp4")
    dataset = open_dataset(tmp_path)
    assert [clip.split for clip in dataset.clips] == ["val"]
    assert [(note.severity, note.code) for note in dataset.notes] == [("error", "two-splits")]


def test_broken_trials_are_listed(tmp_path: Path) -> None:
    tree = build_affwild2(tmp_path, seconds=0.5)
    wrong = spoil_affwild2(tree)
    clips = clips_of(tmp_path)
    assert set(clips) == set(tree.trials) | set(wrong)
    assert clips["novideo"].video is None and clips["video5"].group == clips["video5_left"].group


def test_symlinks_are_followed_without_cycles(tmp_path: Path) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    touch(disk, "videos/a.mp4", "crops/a/00001.jpg")
    touch(root, f"{TRAIN}/a.txt")
    (root / "raw_videos").symlink_to(disk / "videos")
    (root / "cropped_aligned").symlink_to(disk / "crops")
    (root / "again").symlink_to(root)
    clip = clips_of(root)["a"]
    assert clip.video == root / "raw_videos/a.mp4" and clip.crops == (root / "cropped_aligned/a",)
    assert codes(open_dataset(root)) == []


def test_undecodable_names_are_skipped_with_a_note(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", "raw_videos/a.mp4")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/raw_videos/b\xff.mp4"))).touch()
    except OSError:
        pytest.skip("this file system allows only names that are text")
    dataset = open_dataset(tmp_path)
    assert [clip.id for clip in dataset.clips] == ["a"] and codes(dataset) == ["unusable-name"]


def test_a_binary_split_list_is_reported(tmp_path: Path) -> None:
    touch(tmp_path, f"{TRAIN}/a.txt", "raw_videos/a.mp4")
    (tmp_path / "test_set.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"test_set\.txt"):
        open_dataset(tmp_path)


def test_scanning_reads_neither_labels_nor_crop_folders(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanning must not list crop folders, which can hold half a million files."""
    scanned: list[str] = []
    scandir = os.scandir

    class Counting:
        def __init__(self, path: str) -> None:
            self.path, self.read = str(path), 0
            self.entries = scandir(path)

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                self.read += 1
                scanned.append(self.path)
                yield entry

    opened: list[str] = []
    plain_open = Path.open

    def spy(self: Path, *args, **kwargs):
        opened.append(self.name)
        return plain_open(self, *args, **kwargs)

    monkeypatch.setattr(os, "scandir", Counting)
    monkeypatch.setattr(Path, "open", spy)
    open_dataset(tree.root, "affwild2")
    of_crops = [path for path in scanned if Path(path).parent.name.startswith("cropped")]
    assert len(of_crops) == len(set(of_crops)) * 2, "detect and scan each read one entry of every folder of crops"
    assert set(opened) == {"VA_test_set_release.txt", "VA_test_set_sample.txt"}
