"""Unusable files are rejected with one paragraph; unusual files are accepted."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_media import AudioTrack, VideoTrack, cut, read_number, tones, write_media

from vaflow.errors import MediaError
from vaflow.extract.container import frame_times
from vaflow.extract.durations import promised_size
from vaflow.extract.video import frames_at, probe

EVEN = tuple(range(0, 2000, 40))
ALL_KEYFRAMES = {"g": "1"}


def heavy(**settings: Any) -> VideoTrack:
    """Incompressible noise, so that truncation removes frames rather than indexes."""
    return VideoTrack(EVEN, noise=60, **settings)


WHOLE = {
    "front.mp4": (heavy(options=ALL_KEYFRAMES), {"movflags": "faststart"}),
    "front.mov": (heavy(options={"g": "10"}), {"movflags": "faststart"}),
    "fragments.mp4": (heavy(options={"g": "5"}), {"movflags": "frag_keyframe+empty_moov"}),
    "clip.mkv": (heavy(options=ALL_KEYFRAMES), {}),
    "clip.webm": (heavy(codec="libvpx", options={"deadline": "realtime", "cpu-used": "8"}), {}),
    "clip.avi": (heavy(codec="mpeg4", rate=25), {}),
    "h264.avi": (heavy(rate=25, options={"bf": "2"}), {}),
}


@pytest.mark.parametrize("share", [0.5, pytest.param(0.9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_audio", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", WHOLE)
def test_a_truncated_file_reports_its_length(tmp_path: Path, name: str, with_audio: bool, share: float) -> None:
    video_track, options = WHOLE[name]
    codec = {"webm": "libopus", ".avi": "libmp3lame"}.get(name[-4:], "aac")
    audio_track = AudioTrack(tones(2.0, 48000), rate=48000, codec=codec) if with_audio else None
    whole = write_media(tmp_path / name, video_track, audio_track, options)
    assert len(frame_times(whole)) == len(EVEN)
    with pytest.raises(MediaError, match=r"Expected: .* Got: ") as error:
        frame_times(cut(whole, tmp_path / f"cut-{name}", share))
    assert "\n" not in str(error.value)


def test_a_truncated_file_reports_present_and_expected_frames(tmp_path: Path) -> None:
    whole = write_media(tmp_path / "whole.mp4", WHOLE["front.mp4"][0], None, {"movflags": "faststart"})
    with pytest.raises(MediaError, match=r"truncated.*Expected: 50 frames\. Got: \d+ frames, up to \d\.\d+ s"):
        frame_times(cut(whole, tmp_path / "cut.mp4", 0.7))


def test_a_file_cut_before_its_index_cannot_be_opened(tmp_path: Path) -> None:
    whole = write_media(tmp_path / "whole.mp4", VideoTrack(EVEN))
    with pytest.raises(MediaError, match="truncated before its index"):
        probe(cut(whole, tmp_path / "cut.mp4", 0.7))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm", "clip.avi", "front.mp4", "fragments.mp4"])
def test_containers_state_their_expected_size(tmp_path: Path, name: str) -> None:
    video_track, options = WHOLE[name]
    whole = write_media(tmp_path / name, video_track, None, options)
    size = whole.stat().st_size
    assert promised_size(whole) == size
    promised = promised_size(cut(whole, tmp_path / "cut", 0.6))
    assert promised is not None
    assert promised > int(size * 0.6)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.mp4", b"This is a text.\n" * 40),
        ("playlist.mp4", b"#EXTM3U\n#EXTINF:10,\nsegment.ts\n"),
        ("subtitles.mp4", b"1\n00:00:01,000 --> 00:00:02,000\nHello\n"),
        ("bytes.mp4", bytes(range(256)) * 16),
        ("empty.mp4", b""),
    ],
)
def test_non_media_files_are_rejected(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for ask in (probe, frame_times):
        with pytest.raises(MediaError, match=name):
            ask(path)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    write_media(tmp_path / "other.mp4", VideoTrack(EVEN))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(MediaError, match="playlist"):
        probe(tmp_path / "list.mp4")


def test_directories_and_missing_files_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.mp4"):
        with pytest.raises(MediaError, match="is not a file"):
            probe(path)


def test_a_name_with_a_colon_is_read_as_a_file(tmp_path: Path) -> None:
    path = write_media(tmp_path / "12:30 é.mp4", VideoTrack(EVEN))
    assert len(frame_times(path)) == len(EVEN)


def zero_out(source: Path, target: Path, begin: float, end: float) -> Path:
    data = bytearray(source.read_bytes())
    a, b = int(len(data) * begin), int(len(data) * end)
    data[a:b] = bytes(b - a)
    target.write_bytes(bytes(data))
    return target


def test_decoding_that_ends_early_is_an_error(tmp_path: Path) -> None:
    """The file has its full length and index, but the second half of its frames is zeroed."""
    whole = write_media(tmp_path / "whole.mp4", heavy(options=ALL_KEYFRAMES), None, {"movflags": "faststart"})
    path = zero_out(whole, tmp_path / "hollow.mp4", 0.6, 1.0)
    times = frame_times(path)
    assert len(times) == len(EVEN)
    numbers_read = []
    with pytest.raises(MediaError, match="cannot be decoded at frame 49"):
        for number, image in frames_at(path, np.array([0, 5, 49]), times):
            numbers_read.append((number, read_number(image)))
    assert numbers_read == [(0, 0), (5, 5)]


def test_a_damaged_frame_is_replaced_without_shifting_others(tmp_path: Path) -> None:
    video_track = heavy(codec="libx265", options={"g": "1", "x265-params": "log-level=none:keyint=1"})
    whole = write_media(tmp_path / "whole.mp4", video_track, None, {"movflags": "faststart"})
    path = zero_out(whole, tmp_path / "holes.mp4", 0.50, 0.54)
    times = frame_times(path)
    numbers = [read_number(image) for _, image in frames_at(path, np.arange(len(times)), times)]
    wrong = [number for number, got in enumerate(numbers) if number != got]
    assert 0 < len(wrong) <= 4
    assert [numbers[number] for number in wrong] == [wrong[0] - 1] * len(wrong)


def test_decoding_uses_one_thread(tmp_path: Path) -> None:
    path = write_media(tmp_path / "clip.mp4", VideoTrack(EVEN))
    before = count_threads()
    for _ in frames_at(path, np.array([0, 20, 40]), frame_times(path)):
        assert count_threads() == before
    assert threading.active_count() >= 1


def count_threads() -> int:
    """Count threads of this process in /proc; FFmpeg's threads are not Python threads."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the kernel does not say how many threads there are")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("Threads:"))
