"""Media of a page: unsupported formats are transcoded with equal times; levels and speech follow the audio."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered_clip import read_number, write_clip, write_predictions
from until import until

from vaflow.errors import UsageError
from vaflow.viewer import PredictedClip
from vaflow.viewer.clip_data import HOP, RATE, MediaIndex, audio_level, detect_boxes, probe, speech_spans
from vaflow.viewer.page import ViewConfig, write_viewer
from vaflow.viewer.video import transcode

OpenPage = Callable[..., Any]
CONSTANT = [k / 25 for k in range(150)]
VARIABLE = np.round(np.cumsum(np.random.default_rng(8).choice([0.02, 0.05, 0.1], 120)), 3).tolist()
FORMATS = {
    "mpeg1.mpg": ("mpeg1video", "mpeg", CONSTANT),
    "mpeg4.avi": ("mpeg4", "avi", CONSTANT),
    "variable.mkv": ("libx264", "matroska", VARIABLE),
    "hevc.mp4": ("libx265", "mp4", CONSTANT),
}


def frame_times(path: Path) -> list[float]:
    """Seconds on the clip clock: from the container's start."""
    with av.open(str(path)) as media:
        start = (media.start_time or 0) / 1e6
        return [frame.time - start for frame in media.decode(video=0) if frame.time is not None]


@pytest.fixture(scope="module")
def unplayable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/media with clips that browsers cannot play, and DIR/predictions."""
    root = tmp_path_factory.mktemp("unplayable")
    (root / "media").mkdir()
    for name, (codec, container, times) in FORMATS.items():
        write_clip(root / "media" / name, times, codec=codec, format=container)
        write_predictions(root / "predictions" / f"{name.split('.')[0]}.csv", frame_times(root / "media" / name))
    return root


@pytest.mark.parametrize("name", list(FORMATS))
def test_transcoding_keeps_every_frame_and_its_time(unplayable: Path, tmp_path: Path, name: str) -> None:
    source = unplayable / "media" / name
    assert not probe(source).playable
    transcode(source, tmp_path / "out.mp4")
    facts = probe(tmp_path / "out.mp4")
    assert facts.playable
    assert facts.audio == "aac"
    before, after = frame_times(source), frame_times(tmp_path / "out.mp4")
    assert len(before) == len(after)
    assert np.abs(np.array(before) - after).max() < 0.003


def test_transcoded_clips_play_at_the_cursor(open_page: OpenPage, unplayable: Path, tmp_path: Path) -> None:
    viewer = write_viewer(unplayable / "predictions", tmp_path, config=ViewConfig([unplayable / "media"]))
    for clip in viewer.clips:
        page = open_page(viewer.page, f"#clip={clip.item}")
        until(page, f"document.documentElement.dataset.ready === '{clip.item}'")
        until(page, "document.getElementById('media').readyState >= 2")
        assert "transcoded copy" in page.inner_text("#notes")
        end = page.evaluate("document.getElementById('media').duration")
        rng = random.Random(1)
        for _ in range(8):
            page.evaluate(f"document.getElementById('seek').value = {rng.uniform(0, end - 0.1)}")
            page.evaluate("document.getElementById('seek').dispatchEvent(new Event('input'))")
            until(page, "!document.getElementById('media').seeking")
            page.wait_for_timeout(60)
            row = int(page.evaluate("document.documentElement.dataset.row"))
            assert abs(row - read_number(page.locator("#media").screenshot())) <= 1


def test_a_clip_is_transcoded_once(unplayable: Path, tmp_path: Path) -> None:
    config = ViewConfig([unplayable / "media"])
    write_viewer(unplayable / "predictions", tmp_path, config=config)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "media").iterdir()}
    write_viewer(unplayable / "predictions", tmp_path, config=config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "media").iterdir()} == made
    assert len(made) == len(FORMATS)


def test_the_waveform_and_speech_follow_the_audio(numbered: Path) -> None:
    level = audio_level(numbered / "media" / "constant.mp4")
    assert level is not None
    peak = level.high.astype(float) / 127
    loud = (np.arange(len(peak)) * HOP / RATE).astype(int) % 2 == 0
    assert np.median(peak[loud]) == pytest.approx(0.5, abs=0.05)
    assert np.median(peak[~loud]) < 0.02
    expected = [(k, k + 1) for k in range(0, 12, 2)]
    assert level.speech == pytest.approx(np.array(expected), abs=0.08)


def test_silence_and_noise_have_no_pauses() -> None:
    assert len(speech_spans(np.zeros(100), 0.02)) == 0
    assert speech_spans(np.full(100, 0.01), 0.02).tolist() == [[0.0, 2.0]]


def test_broken_media_do_not_prevent_the_traces(tmp_path: Path) -> None:
    write_predictions(tmp_path / "predictions" / "clip.csv", CONSTANT)
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 1000)
    viewer = write_viewer(tmp_path / "predictions", tmp_path / "out", config=ViewConfig([tmp_path]))
    assert viewer.clips[0].media is None
    assert any("cannot be decoded" in note for note in viewer.clips[0].facts["notes"])


def test_media_are_found_by_recorded_name_and_size(tmp_path: Path) -> None:
    for folder, text in (("a", b"12345"), ("b", b"1234567")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "video.mp4").write_bytes(text)
    facts = {"name": "video.mp4", "size": 7}
    source = {"records": {"labels": {"source": {"video": facts}}}, "media": None}
    match = MediaIndex([tmp_path]).find(PredictedClip("clip_left", tmp_path / "x.csv", source=source))
    assert match == tmp_path / "b" / "video.mp4"
    other = {"records": {"labels": {"source": {"video": {**facts, "size": 9}}}}}
    assert MediaIndex([tmp_path]).find(PredictedClip("video", tmp_path / "x.csv", source=other)) is None


def test_media_copies_are_stored_beside_the_page(numbered: Path, tmp_path: Path) -> None:
    config = ViewConfig([numbered / "media"], copy=True)
    viewer = write_viewer(numbered / "predictions", tmp_path, config=config)
    assert sorted(clip.facts["media"] for clip in viewer.clips) == ["media/0001.mp4", "media/0002.mp4"]


def test_boxes_of_a_stream_or_of_the_detector_lie_on_the_face(open_page: OpenPage, clips: Path, tmp_path: Path) -> None:
    times = frame_times(clips / "obama.mp4")
    write_predictions(tmp_path / "predictions" / "obama.csv", times)
    plain = write_viewer(tmp_path / "predictions", tmp_path / "plain", config=ViewConfig([clips / "obama.mp4"]))
    assert any("No face boxes" in note for note in plain.clips[0].facts["notes"])
    config = ViewConfig([clips / "obama.mp4"], boxes=True)
    page = open_page(write_viewer(tmp_path / "predictions", tmp_path / "boxes", config=config).page)
    until(page, "document.getElementById('box').getAttribute('visibility') === 'visible'")
    screen, box = page.locator("#media").bounding_box(), page.locator("#box").bounding_box()
    scale = min(screen["width"] / 320, screen["height"] / 240)  # the clip has 320 by 240 pixels
    left = (box["x"] - screen["x"] - (screen["width"] - 320 * scale) / 2) / scale
    top = (box["y"] - screen["y"] - (screen["height"] - 240 * scale) / 2) / scale
    [face] = [row[1:] for row in detect_boxes(clips / "obama.mp4")[:1]]
    assert [left, top] == pytest.approx(face[:2] * [320, 240], abs=3)
    assert box["height"] / scale == pytest.approx((face[3] - face[1]) * 240, abs=4)


def test_a_clip_without_a_face_is_reported(numbered: Path, tmp_path: Path) -> None:
    config = ViewConfig([numbered / "media"], boxes=True)
    viewer = write_viewer(numbered / "predictions", tmp_path, ["constant"], config)
    assert any("detected no face" in note for note in viewer.clips[0].facts["notes"])


def test_a_page_shows_its_own_clips_after_another_page_in_the_directory(unplayable: Path, tmp_path: Path) -> None:
    config = ViewConfig([unplayable / "media"])
    everything = write_viewer(unplayable / "predictions", tmp_path, config=config)
    assert len(everything.clips) == len(FORMATS)
    for name in ("variable", "mpeg1"):  # both are clip 1 of their page
        [clip] = write_viewer(unplayable / "predictions", tmp_path, [name], config).clips
        expected = frame_times(next((unplayable / "media").glob(f"{name}.*")))
        assert clip.media is not None
        np.testing.assert_allclose(frame_times(clip.media), expected, atol=0.003)
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("clips", "media")] == [1, 1]


@pytest.mark.parametrize("name", ["index.html", "media/0001.mp4", "clips/mine.js"])
def test_other_files_are_not_mixed_with_a_page(numbered: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{tmp_path} holds other files.*Got: {name.partition('/')[0]}"):
        write_viewer(numbered / "predictions", tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_an_interrupted_page_can_be_written_again(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vaflow.viewer.page.asdict", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        write_viewer(numbered / "predictions", tmp_path)
    assert list((tmp_path / "clips").iterdir())
    assert write_viewer(numbered / "predictions", tmp_path).clips
