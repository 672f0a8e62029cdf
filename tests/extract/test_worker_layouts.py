"""Every further layout through the decoding worker: correct labels, frames and audio."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from affwild2_tree import decode_number
from other_trees import BUILDERS, Tree, expected_value
from PIL import Image

from vaflow.cli import main
from vaflow.datasets import Clip, open_dataset
from vaflow.encoders.preprocessing import Preparation
from vaflow.errors import MediaError
from vaflow.extract.decoding_pool import AudioBlock, AudioEnd, Clock, Done, Face, FacesEnd, Failed, Job, Message
from vaflow.extract.doctor import check_dataset
from vaflow.extract.source_files import list_stills, open_stills, stills_at, stills_identity
from vaflow.extract.worker import run_job
from vaflow.timeline import Grid

GRID = Grid(window=2.0, stride=0.6, frames=10)
PREPARATION = Preparation(64)


def work(clip: Clip, *, faces: str = "none") -> list[Message]:
    sent: list[Message] = []
    run_job(Job(0, clip, GRID, True, True, faces, (PREPARATION,), True), sent.append)
    return sent


def only(kind: type, sent: list[Message]) -> list:
    return [message for message in sent if isinstance(message, kind)]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tree]]:
    built = {}
    for layout, build in BUILDERS.items():
        root = tmp_path_factory.mktemp(layout)
        built[layout] = (root, build(root))
    return built


@pytest.mark.parametrize("layout", BUILDERS)
def test_labels_apply_to_their_frames(layout: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[layout]
    for clip in open_dataset(root, layout).clips:
        written, sent = tree[clip.id], work(clip)
        assert isinstance(sent[-1], Done), sent[-1]
        (clock,) = only(Clock, sent)
        np.testing.assert_allclose(clock.labels["time"], written.times, atol=1e-6)
        assert clock.facts["split"] == written.split and clock.facts["frames"] == written.times.size
        expected = expected_value(layout, written)
        np.testing.assert_allclose(clock.labels["value"], expected, atol=1e-6)
        np.testing.assert_array_equal(clock.labels["valid"], np.isfinite(expected))


@pytest.mark.parametrize("layout", BUILDERS)
def test_every_sample_shows_the_frame_of_its_time(layout: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[layout]
    for clip in open_dataset(root, layout).clips:
        written, sent = tree[clip.id], work(clip)
        (end,) = only(FacesEnd, sent)
        samples = GRID.sample_times(float(written.times[-1]) + 0.04)
        expected = [int(np.argmin(np.abs(written.times - time))) for time in samples]
        assert end.frame.tolist() == expected
        shown = {face.sample: decode_number(np.asarray(Image.open(BytesIO(face.jpeg)))) for face in only(Face, sent)}
        assert shown == {k: frame + 1 for k, frame in enumerate(expected) if frame in written.frame_numbers}


@pytest.mark.parametrize("layout", BUILDERS)
def test_a_separate_audio_file_takes_precedence(layout: str, trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees[layout]
    for clip in open_dataset(root, layout).clips:
        written, sent = tree[clip.id], work(clip)
        (end,) = only(AudioEnd, sent)
        audio_seconds = sum(message.samples.size for message in only(AudioBlock, sent)) / 16_000
        assert end.facts["audio"] == ("ok" if audio_seconds else "absent") or audio_seconds < float(written.times[-1])
        assert audio_seconds == pytest.approx(min(written.audio_seconds, float(written.times[-1]) + 0.04), abs=0.07)
        assert ("audio" in only(Clock, sent)[0].sources) == (layout != "afew-va")


@pytest.mark.parametrize("layout", BUILDERS)
def test_check_counts_the_written_frames_and_labels(
    layout: str, trees: dict[str, tuple[Path, Tree]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, tree = trees[layout]
    assert main(["check", str(root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == layout and set(report["items"]) == set(tree)
    for name, item in report["items"].items():
        written = tree[name]
        assert item["media"]["frames"] == written.times.size and item["split"] == written.split
        if written.rows:
            rows = {stamp for values in written.rows.values() for stamp in values}
            assert item["labels"]["rows"] == len(rows)


def test_an_unreadable_separate_audio_file_fails_only_its_clip(tmp_path: Path) -> None:
    BUILDERS["sewa"](tmp_path)
    (tmp_path / "audio" / "Train_01.WAV").write_text("no sound")
    outcomes = {clip.id: work(clip)[-1] for clip in open_dataset(tmp_path).clips}
    failed = outcomes.pop("Train_01")
    assert isinstance(failed, Failed) and failed.stage == "audio" and "Train_01.WAV" in failed.message
    assert all(isinstance(outcome, Done) for outcome in outcomes.values())


# --- image folders


def stills_clip(folder: Path) -> Clip:
    return Clip("a", None, "a", None, frames=folder, frame_rate=25.0)


def test_images_are_read_by_frame_number(tmp_path: Path) -> None:
    for name in ("00002.png", "7.jpg", "00007.png", "x3.png", "3.txt", "-1.png"):
        Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / name, "png")
    assert {number: path.name for number, path in list_stills(tmp_path).items()} == {2: "00002.png", 7: "00007.png"}
    info, times = open_stills(stills_clip(tmp_path))
    assert info.video is not None and (info.video.width, info.video.height) == (8, 6)
    np.testing.assert_array_equal(times, [k / 25 for k in range(8)])
    assert [number for number, *_ in stills_at(tmp_path, np.arange(8))] == [2, 7]


def test_a_damaged_image_is_a_missing_face_and_is_counted(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:30])
    sent = work(stills_clip(tmp_path))
    (end,) = only(FacesEnd, sent)
    assert isinstance(sent[-1], Done) and end.facts["unreadable_frames"] == 1
    samples_with_face = {face.sample for face in only(Face, sent)}
    assert samples_with_face == {k for k, frame in enumerate(end.frame.tolist()) if frame != 5} and 5 in end.frame


def test_faces_are_detected_in_images_as_in_video(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
    sent = work(stills_clip(tmp_path), faces="auto")
    assert isinstance(sent[-1], Done) and only(Face, sent) == [], "a black image must have no face"


@pytest.mark.parametrize("name", ["", "x.png", "123456789012345678.png"])
def test_image_folders_without_frame_numbers_fail(tmp_path: Path, name: str) -> None:
    if name:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (failed,) = work(stills_clip(tmp_path))
    assert isinstance(failed, Failed) and failed.stage == "open" and "00000.png" in failed.message
    assert check_dataset_of(stills_clip(tmp_path))


def check_dataset_of(clip: Clip) -> bool:
    from vaflow.extract.doctor import check_clip

    return [note.code for note in check_clip(clip).findings if note.severity == "error"] == ["unreadable"]


def test_image_folder_identity_depends_on_images_and_rate(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    before = stills_identity(tmp_path, 25.0)
    assert stills_identity(tmp_path, 25.0) == before != stills_identity(tmp_path, 30.0)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert stills_identity(tmp_path, 25.0) != before
    with pytest.raises(MediaError, match="no frames"):
        stills_identity(tmp_path / "gone", 25.0)


def test_missing_images_are_noted(trees: dict[str, tuple[Path, Tree]]) -> None:
    root, tree = trees["afew-va"]
    report = check_dataset(open_dataset(root))
    notes = {note.item: note.message for note in report.findings if note.code == "frames-missing"}
    assert set(notes) == {name for name, written in tree.items() if len(written.frame_numbers) < written.times.size}
    assert all(message.startswith("1 of 30 frames") for message in notes.values())
