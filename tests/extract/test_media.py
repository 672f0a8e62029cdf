"""Frame numbers and times equal a full decode and the written file."""

from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_media import AudioTrack, VideoTrack, copy_from_keyframe, read_number, tones, write_media

from vaflow.errors import MediaError
from vaflow.extract.container import frame_times
from vaflow.extract.video import decoder_identity, frames_at, probe, to_rgb

# Milliseconds between frames from 20 to 300: no frame rate fits.
UNEVEN = tuple(np.cumsum(np.random.default_rng(0).choice([20, 33, 40, 120, 300], 40)).tolist())
EVEN = tuple(range(0, 1600, 40))

FILES = {
    "h264.mp4": VideoTrack(UNEVEN, options={"bf": "3"}),
    "h264.mkv": VideoTrack(UNEVEN, options={"bf": "3"}),
    "h264.mov": VideoTrack(UNEVEN),
    "hevc.mp4": VideoTrack(UNEVEN, codec="libx265", options={"bf": "3"}),
    "vp9.webm": VideoTrack(
        UNEVEN, codec="libvpx-vp9", options={"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}
    ),
    "vp8.webm": VideoTrack(UNEVEN, codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mpeg4.mp4": VideoTrack(EVEN, codec="mpeg4", rate=25, options={"bf": "2"}),
    "mpeg4.avi": VideoTrack(EVEN, codec="mpeg4", rate=25),
    "late.mp4": VideoTrack(tuple(time + 1500 for time in UNEVEN)),
    "late.mkv": VideoTrack(tuple(time + 1500 for time in UNEVEN)),
    "stream.ts": VideoTrack(UNEVEN, options={"bf": "2"}),
}


def decoded_times(path: Path) -> np.ndarray:
    """Reference: decode everything with PyAV."""
    with av.open(str(path)) as container:
        start = (container.start_time or 0) / 1_000_000
        base = float(container.streams.video[0].time_base or 0)
        return np.array([frame.pts for frame in container.decode(video=0)], np.float64) * base - start


@pytest.mark.parametrize("name", FILES)
def test_header_times_equal_decoded_and_written_times(tmp_path: Path, name: str) -> None:
    video_track = FILES[name]
    path = write_media(tmp_path / name, video_track)
    times = frame_times(path)
    np.testing.assert_allclose(times, decoded_times(path), atol=1e-6)
    written = np.array(video_track.times) / 1000
    np.testing.assert_allclose(times, written - written[0], atol=1e-3)
    assert times.dtype == np.float64


@pytest.mark.parametrize("name", FILES)
def test_frames_are_read_by_number(tmp_path: Path, name: str) -> None:
    path = write_media(tmp_path / name, FILES[name])
    times = frame_times(path)
    every = list(frames_at(path, np.arange(len(times)), times))
    assert [number for number, _ in every] == list(range(len(times)))
    assert [read_number(image) for _, image in every] == list(range(len(times)))


@pytest.mark.parametrize("b_frames", [0, 3])
def test_avi_frames_without_times_are_counted(tmp_path: Path, b_frames: int) -> None:
    """FFmpeg's times of H.264 in AVI are one frame late, and with B-frames do not even ascend."""
    path = write_media(tmp_path / "clip.avi", VideoTrack(EVEN, rate=25, options={"bf": str(b_frames)}))
    times = frame_times(path)
    np.testing.assert_allclose(times, np.array(EVEN) / 1000, atol=1e-9)
    got = [(number, read_number(image)) for number, image in frames_at(path, np.array([0, 7, 8, 39]), times)]
    assert got == [(0, 0), (7, 7), (8, 8), (39, 39)]


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg", "libx264"])
def test_dropped_avi_frames_do_not_shift_the_others(tmp_path: Path, codec: str) -> None:
    """AVI stores an empty chunk where a frame is left out: the next one keeps its time."""
    times = tuple(time for time in EVEN if time not in (80, 120, 400, 1480))
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    video_track = VideoTrack(times, codec=codec, pixel_format=pixel_format, rate=25, options={"bf": "0"})
    path = write_media(tmp_path / "clip.avi", video_track)
    read = frame_times(path)
    np.testing.assert_allclose(read, np.array(times) / 1000, atol=1e-9)
    numbers = [read_number(image) for _, image in frames_at(path, np.arange(len(read)), read)]
    assert numbers == list(range(len(times)))


@pytest.mark.parametrize("options", [{"live": "1"}, {"reserve_index_space": "4096"}])
def test_matroska_without_sizes_or_duration_is_read_completely(tmp_path: Path, options: dict[str, str]) -> None:
    audio_track = AudioTrack(tones(3.0, 44100))  # longer than the video
    path = write_media(tmp_path / "live.mkv", VideoTrack(UNEVEN), audio_track, options)
    np.testing.assert_allclose(np.diff(frame_times(path)), np.diff(UNEVEN) / 1000, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(requested=st.sets(st.integers(0, 39)))
def test_requested_frames_are_returned_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, requested: set[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "wanted.mp4"
    if not path.exists():
        write_media(path, FILES["h264.mp4"])
    got = [(n, read_number(image)) for n, image in frames_at(path, np.array(sorted(requested)), frame_times(path))]
    assert got == [(number, number) for number in sorted(requested)]


@pytest.mark.parametrize("requested", [[3, 2], [2, 2], [-1, 0], [40]])
def test_requested_frame_numbers_must_ascend_within_the_clip(tmp_path: Path, requested: list[int]) -> None:
    path = write_media(tmp_path / "clip.mp4", FILES["h264.mp4"])
    with pytest.raises(ValueError, match=r"ascend within 0 \.\. 39"):
        list(frames_at(path, np.array(requested), frame_times(path)))


def test_hidden_packets_are_not_frames(tmp_path: Path) -> None:
    """A stream copy from an open group of pictures starts with frames whose references are missing."""
    options = {"g": "10", "bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1"}
    whole = write_media(tmp_path / "whole.mkv", VideoTrack(EVEN, options=options))
    for name in ("cut.mkv", "cut.mp4"):
        path = copy_from_keyframe(whole, tmp_path / name, 1)
        times = frame_times(path)
        np.testing.assert_allclose(times, decoded_times(path), atol=1e-6)
        numbers = [read_number(image) for _, image in frames_at(path, np.arange(len(times)), times)]
        assert numbers == list(range(40 - len(numbers), 40))


def test_the_clock_starts_at_the_file_start_not_the_video_start(tmp_path: Path) -> None:
    """Audio starts at 0 s and video at 0.6 s: the first frame is at 0.6 s of the clip."""
    video_track = VideoTrack(tuple(time + 600 for time in EVEN))
    path = write_media(tmp_path / "late.mkv", video_track, AudioTrack(tones(2.2, 44100)))
    times = frame_times(path)
    np.testing.assert_allclose(times, decoded_times(path), atol=1e-6)
    # The encoder delay shifts the audio, and so the file start, one AAC frame earlier.
    np.testing.assert_allclose(times[0], 0.6, atol=1024 / 44100 + 1e-3)


def test_probe_describes_both_streams(tmp_path: Path) -> None:
    audio_track = AudioTrack(tones(2.0, 48000, 2), rate=48000, layout="stereo", start=0.25)
    path = write_media(tmp_path / "clip.mp4", VideoTrack(EVEN), audio_track)
    info = probe(path)
    assert info.video is not None
    assert info.audio is not None
    assert (info.video.width, info.video.height, info.video.codec, info.video.frames) == (160, 120, "h264", 40)
    assert info.video.duration == pytest.approx(1.6, abs=0.05)
    assert info.video.average_rate == pytest.approx(25, rel=0.05)
    assert (info.audio.codec, info.audio.rate, info.audio.channels) == ("aac", 48000, 2)
    assert info.audio.start == pytest.approx(0.25, abs=0.03)
    assert info.audio.duration == pytest.approx(2.0, abs=0.05)


def test_an_audio_file_has_no_frames(tmp_path: Path) -> None:
    path = write_media(tmp_path / "sound.mp4", None, AudioTrack(tones(1.0, 44100)))
    assert probe(path).video is None
    with pytest.raises(MediaError, match="no video stream"):
        frame_times(path)


def test_a_cover_image_is_not_video(tmp_path: Path) -> None:
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        audio_stream = container.add_stream("aac", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(64, 64, "yuvj420p")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), "s16", "mono")
        frame.sample_rate = 44100
        container.mux([*audio_stream.encode(frame), *audio_stream.encode(None)])
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1, "the file must look as if it had video"
    assert probe(path).video is None
    with pytest.raises(MediaError, match=r"no video stream.*cover image") as error:
        frame_times(path)
    assert "video" not in str(error.value).partition("Got: ")[2], "the message denies a video stream"


def test_decoder_identity_lists_the_decoding_libraries() -> None:
    identity = decoder_identity()
    assert identity["backend"] == "pyav"
    assert identity["version"] == av.__version__
    assert identity["libavcodec"].startswith(f"{av.library_versions['libavcodec'][0]}.")


REAL = ["obama.mp4", "wolfgang.mp4", "single_face.mp4", "carphone.mp4", "no_face.mp4", "face_noface.mov", "park.mp4"]


LONG = ("wolfgang.mp4", "face_noface.mov")  # decoding them takes as long as all others


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in LONG else x for x in REAL])
def test_real_clips_agree_with_a_full_decode(clips: Path, name: str) -> None:
    times = frame_times(clips / name)
    np.testing.assert_allclose(times, decoded_times(clips / name), atol=1e-6)
    assert (np.diff(times) > 0).all()
    requested = np.arange(0, len(times), 11)
    chosen = dict(frames_at(clips / name, requested, times))
    info = probe(clips / name)
    assert info.video is not None
    with av.open(str(clips / name)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in chosen:
                np.testing.assert_array_equal(chosen.pop(number), to_rgb(frame, info.video.pixel_aspect))
    assert not chosen
