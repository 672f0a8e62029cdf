"""Source files that change during reading, or with equal size and time."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from affwild2_tree import write_video
from PIL import Image
from tiny_extraction import run

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.datasets import open_dataset
from vaflow.datasets.clip import Clip
from vaflow.extract import worker
from vaflow.extract.audio import Blocks
from vaflow.extract.decoding_pool import Done, Failed, Job, Message
from vaflow.extract.worker import run_job
from vaflow.timeline import Grid

NOTHING = ["--visual", "none", "--audio", "none", "--device", "cpu", "--quiet"]


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    """A video of a second with labels."""
    root = tmp_path / "data"
    write_video(root / "a.mp4", np.arange(25) / 25, audio_seconds=1.0)
    (root / "a.csv").write_text("frame,valence,arousal\n0,0.1,0.1\n")
    return open_dataset(root, "videos").clips[0]


def messages(clip: Clip) -> list[Message]:
    sent: list[Message] = []
    run_job(Job(0, clip, Grid(), True, True, "none", (), False), sent.append)
    return sent


def test_labels_edited_during_extraction_fail_the_clip(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edit keeps size and time; only the content differs."""
    real = worker.read_annotation

    def edited(clip: Clip, person: int = 0) -> object:
        assert clip.labels is not None
        before = clip.labels.stat()
        clip.labels.write_text(clip.labels.read_text().replace("0.1,0.1", "0.9,0.9"))
        os.utime(clip.labels, ns=(before.st_atime_ns, before.st_mtime_ns))
        return real(clip, person)

    monkeypatch.setattr(worker, "read_annotation", edited)
    last = messages(clip)[-1]
    assert isinstance(last, Failed)
    assert "labels" in last.message
    assert "changed while" in last.message


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_labels_that_never_end_fail_the_clip(clip: Clip, make: Callable[[Path], None]) -> None:
    assert clip.labels is not None
    clip.labels.unlink()
    make(clip.labels)
    last = messages(clip)[-1]
    assert isinstance(last, Failed)
    assert "regular file" in last.message


def test_a_video_replaced_during_extraction_fails_the_clip(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    real = worker.decode_audio

    def replaced(path: Path, **times: float) -> Blocks:
        result = yield from real(path, **times)
        path.write_bytes(path.read_bytes() + b"x")
        return result

    monkeypatch.setattr(worker, "decode_audio", replaced)
    last = messages(clip)[-1]
    assert isinstance(last, Failed)
    assert "video and audio of 'a' changed while" in last.message


def test_unchanged_files_do_not_fail(clip: Clip) -> None:
    assert isinstance(messages(clip)[-1], Done)


def test_rehash_detects_edited_labels_of_equal_size_and_time(clip: Clip, tmp_path: Path) -> None:
    assert clip.labels is not None
    command = ["extract", str(clip.labels.parent), "--out", str(tmp_path / "cache"), *NOTHING]
    assert main(command) == 0
    before = clip.labels.stat()
    clip.labels.write_text(clip.labels.read_text().replace("0.1,0.1", "0.9,0.9"))
    os.utime(clip.labels, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(command) == 0
    assert open_cache(tmp_path / "cache").read("labels", "a").value[0, 0] == np.float32(0.1)
    assert main([*command, "--rehash"]) == 0
    assert open_cache(tmp_path / "cache").read("labels", "a").value[0, 0] == np.float32(0.9)


def test_rehash_detects_replaced_crops_of_equal_size(tiny_pair: tuple, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_video(root / "a.mp4", np.arange(25) / 25, audio_seconds=0.0)
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(1, 26):
        Image.fromarray(np.full((112, 112, 3), 90, np.uint8)).save(folder / f"{number:05d}.png", compress_level=0)
    dataset = open_dataset(root, "videos")
    with_crops = type(dataset)(
        root, "videos", tuple(Clip(c.id, None, c.id, c.video, c.video, (folder,)) for c in dataset.clips)
    )
    out = tmp_path / "cache"
    assert run(with_crops, out, tiny_pair).extracted == 1
    for path in folder.iterdir():
        Image.fromarray(np.zeros((112, 112, 3), np.uint8)).save(path, compress_level=0)
    assert run(with_crops, out, tiny_pair).done == 1, "names and sizes agree"
    assert run(with_crops, out, tiny_pair, rehash=True).changed == 1
    assert run(with_crops, out, tiny_pair, rehash=True).done == 1


def test_rehash_detects_faces_in_replaced_frames_of_equal_size(
    tiny_pair: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The streams of faces and of their crops state no digest of the images."""
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)

    def draw(level: int) -> None:
        for number in range(2):
            image = Image.fromarray(np.full((64, 64, 3), level, np.uint8))
            image.save(folder / f"{number:05d}.png", compress_level=0)

    draw(90)
    (folder / "a.json").write_text('{"frames": {"00000": {"valence": 1, "arousal": 1}}}')
    dataset, out = open_dataset(tmp_path / "data", "afew-va"), tmp_path / "cache"
    run(dataset, out, tiny_pair)
    attempts = {name: open_cache(out).record(name, "a").attempt for name in ("faces", "crops", "clip-tiny", "labels")}
    draw(0)
    assert run(dataset, out, tiny_pair, rehash=True).changed == 1
    after = open_cache(out)
    replaced = {name for name, attempt in attempts.items() if after.record(name, "a").attempt != attempt}
    assert replaced == {"faces", "crops", "clip-tiny"}

    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "00002.png")
    assert run(dataset, out, (None, None)).changed == 1
    assert "clip-tiny was made from earlier videos of a. Extract or import it again" in caplog.text
