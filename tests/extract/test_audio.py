"""Decoded audio is placed by its timestamps for any rate and channel count; the summary is correct."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from coded_clips import audio_at, banks, lateness
from make_media import AudioTrack, VideoTrack, strongest_tone, tones, write_media

from vaflow.errors import MediaError
from vaflow.extract.audio import RATE, AudioSummary, decode_audio
from vaflow.extract.video import probe

EVEN = tuple(range(0, 4000, 40))


def decode(path: Path, duration: float, start: float | None = None) -> tuple[np.ndarray, AudioSummary]:
    """Return all blocks concatenated, and the summary."""
    blocks = decode_audio(path, start=probe(path).start if start is None else start, duration=duration)
    got = []
    while True:
        try:
            got.append(next(blocks))
        except StopIteration as end:
            samples = np.concatenate(got) if got else np.zeros(0, np.float32)
            assert samples.dtype == np.float32
            assert samples.size == end.value.samples
            return samples, end.value


def click(times: list[float], rate: int, seconds: float = 3.0, channels: int = 1) -> np.ndarray:
    samples = np.zeros((channels, round(seconds * rate)))
    samples[:, [round(time * rate) for time in times]] = 0.9
    return samples


CODECS = [("pcm_s16le", "wav"), ("flac", "mkv"), ("aac", "mp4"), ("libmp3lame", "mkv")]


@pytest.mark.parametrize("rate", [48000, 44100, 22050, 16000, 8000])
@pytest.mark.parametrize(("codec", "container"), CODECS)
def test_a_click_is_located_within_a_millisecond(tmp_path: Path, codec: str, container: str, rate: int) -> None:
    clicks = [0.3, 1.2345, 2.75]
    path = write_media(tmp_path / f"click.{container}", None, AudioTrack(click(clicks, rate), rate=rate, codec=codec))
    with av.open(str(path)) as file:  # delay stored by the container (MP3 has an encoder delay)
        first = next(file.decode(audio=0))
        base = file.streams.audio[0].time_base
        assert first.pts is not None
        assert base is not None
        offset = float(first.pts * base) - (file.start_time or 0) / 1e6
    samples, summary = decode(path, 3.0)
    assert summary.status == "ok"
    assert abs(offset) < 0.06
    for time in clicks:
        near = slice(round((time - 0.1) * RATE), round((time + 0.15) * RATE))
        click_time = (near.start + np.abs(samples[near]).argmax()) / RATE
        assert click_time == pytest.approx(time, abs=1e-3 + (0.06 if codec == "libmp3lame" else 0))


@pytest.mark.parametrize("channels", ["mono", "stereo", "5.1", "7.1"])
@pytest.mark.parametrize("codec", ["pcm_s16le", "flac"])
def test_mono_is_the_mean_of_the_channels(tmp_path: Path, channels: str, codec: str) -> None:
    count = av.AudioLayout(channels).nb_channels
    level = np.linspace(-0.7, 0.9, count)
    time = np.arange(2 * RATE) / RATE
    source = level[:, None] * np.sin(2 * np.pi * 440 * time)
    path = write_media(tmp_path / "c.mkv", None, AudioTrack(source, rate=RATE, codec=codec, layout=channels))
    samples, summary = decode(path, 2.0)
    np.testing.assert_allclose(samples, source.mean(axis=0), atol=1e-4)
    assert (summary.channels, summary.rate, summary.status) == (count, RATE, "ok")
    assert summary.peak == pytest.approx(abs(level.mean()), abs=1e-3)


def test_planar_samples_are_read_as_channels(tmp_path: Path) -> None:
    """Planar audio: reading one plane too many would read foreign memory."""
    level = np.linspace(-0.7, 0.9, 8)
    time = np.arange(2 * RATE) / RATE
    source = level[:, None] * np.sin(2 * np.pi * 440 * time)
    path = write_media(tmp_path / "c.mp4", None, AudioTrack(source, rate=RATE, codec="aac", layout="7.1"))
    with av.open(str(path)) as container:
        frame = next(container.decode(audio=0))
        assert frame.format.is_planar and frame.layout.nb_channels == 8
    samples, summary = decode(path, 2.0)
    inside = slice(RATE // 4, RATE)
    np.testing.assert_allclose(samples[inside], source.mean(axis=0)[inside], atol=0.02)
    assert (summary.channels, summary.damaged) == (8, 0)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_all_sample_formats_share_one_full_scale(tmp_path: Path, codec: str) -> None:
    source = tones(1.0, RATE)
    samples, _ = decode(write_media(tmp_path / "c.wav", None, AudioTrack(source, rate=RATE, codec=codec)), 1.0)
    np.testing.assert_allclose(samples, source[0], atol=1.5 / 128 if codec == "pcm_u8" else 1e-4)


def test_resampling_preserves_the_waveform(tmp_path: Path) -> None:
    """Resampling equals the same sine sampled at 16 kHz: no shift, no level change."""
    time = np.arange(2 * 44100) / 44100
    path = write_media(
        tmp_path / "c.wav", None, AudioTrack(0.8 * np.sin(2 * np.pi * 1000 * time)[None], codec="pcm_s16le")
    )
    samples, _ = decode(path, 2.0)
    expected = 0.8 * np.sin(2 * np.pi * 1000 * np.arange(2 * RATE) / RATE)
    middle = slice(RATE // 10, -RATE // 10)
    np.testing.assert_allclose(samples[middle], expected[middle], atol=2e-3)


@pytest.mark.parametrize("container", ["mp4", "mkv", "mov"])
def test_each_half_second_contains_the_written_audio(tmp_path: Path, container: str) -> None:
    path = write_media(tmp_path / f"c.{container}", VideoTrack(EVEN), AudioTrack(tones(4.0, 44100)))
    samples, summary = decode(path, 4.0)
    assert summary.status == "ok"
    for half in range(8):
        assert strongest_tone(samples[half * 8000 + 1000 : half * 8000 + 7000], RATE) == half


@pytest.mark.parametrize("start", [0.7, 1.25])
def test_audio_that_starts_late_is_preceded_by_zeros(tmp_path: Path, start: float) -> None:
    audio_track = AudioTrack(tones(2.0, 48000), rate=48000, codec="pcm_s16le", start=start)
    path = write_media(tmp_path / "c.mkv", VideoTrack(EVEN), audio_track)
    samples, summary = decode(path, 4.0)
    assert summary.status == "short"
    assert not samples[: round(start * RATE)].any()
    np.testing.assert_allclose(summary.covered, [[start, start + 2]], atol=2e-3)
    np.testing.assert_allclose(
        samples[round(start * RATE) + 200 : round(start * RATE) + 7000],
        tones(0.5, RATE)[0, 200:7000],
        atol=0.03,  # Matroska stores milliseconds: up to half a one's shift
    )


def test_audio_before_the_video_is_dropped(tmp_path: Path) -> None:
    """With a start of 0.5 s, the first half second of audio is before time 0."""
    path = write_media(tmp_path / "c.wav", None, AudioTrack(tones(3.0, 44100), codec="pcm_s16le"))
    samples, summary = decode(path, 2.5, start=0.5)
    np.testing.assert_allclose(summary.covered, [[0, 2.5]], atol=1e-3)
    assert [strongest_tone(samples[k * 8000 + 500 : k * 8000 + 7500], RATE) for k in range(5)] == [1, 2, 3, 4, 5]


def write_pieces(path: Path, pieces: list[tuple[float, np.ndarray]], rate: int) -> Path:
    """Raw audio packets with the given start times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for start, samples in pieces:
            frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start * rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_gaps_are_zero_filled_and_not_marked_covered(tmp_path: Path) -> None:
    rate = 22050
    wave = tones(3.0, rate)[0]
    pieces = [(k / 10, wave[k * rate // 10 : (k + 1) * rate // 10]) for k in range(30) if not 10 <= k < 14]
    samples, summary = decode(write_pieces(tmp_path / "c.mkv", pieces, rate), 3.0)
    assert summary.status == "short"
    np.testing.assert_allclose(np.array(summary.covered), np.array([[0, 1], [1.4, 3]]), atol=2e-3)
    assert not samples[RATE + 50 : round(1.4 * RATE) - 50].any()
    assert strongest_tone(samples[24500:31500], RATE) == 3


def test_timestamp_jitter_does_not_split_the_audio(tmp_path: Path) -> None:
    rate = 16000
    wave = tones(3.0, rate)[0]
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, 30)
    jitter[0] = 0
    pieces = [(k / 10 + jitter[k], wave[k * 1600 : (k + 1) * 1600]) for k in range(30)]
    samples, summary = decode(write_pieces(tmp_path / "c.mkv", pieces, rate), 3.0)
    np.testing.assert_allclose(samples, wave, atol=1e-3)
    assert len(summary.covered) == 1


@pytest.mark.parametrize("percent", [0.3, -0.3])
def test_audio_clock_drift_is_followed(tmp_path: Path, percent: float) -> None:
    """Twenty seconds at a wrong sample rate: without correction 60 ms off at the end."""
    rate = 16000
    fast = rate * (1 + percent / 100)
    wave = audio_at(np.arange(round(20 * fast)) / fast)
    pieces = [(begin / fast, wave[begin : begin + 800]) for begin in range(0, len(wave), 800)]
    samples, summary = decode(write_pieces(tmp_path / "c.mkv", pieces, rate), 20.0)
    assert len(summary.covered) == 1 and samples.size == pytest.approx(20 * rate, abs=0.006 * rate)
    for second in range(0, 20, 2):
        part = samples[second * rate : second * rate + rate]
        assert abs(lateness(banks(part), second * 100, 0.0)) <= 0.01, second


def test_repeated_audio_is_used_once(tmp_path: Path) -> None:
    rate = 16000
    wave = tones(2.0, rate)[0]
    pieces = [(0.0, wave[:16000]), (0.8, wave[12800:])]
    samples, summary = decode(write_pieces(tmp_path / "c.mkv", pieces, rate), 2.0)
    assert samples.size == 32000
    np.testing.assert_allclose(samples, wave, atol=2e-3)
    assert summary.status == "ok"


def test_audio_is_cut_at_the_end_of_the_clip(tmp_path: Path) -> None:
    path = write_media(tmp_path / "c.wav", None, AudioTrack(tones(3.0, 44100), codec="pcm_s16le"))
    samples, summary = decode(path, 1.23)
    assert samples.size == round(1.23 * RATE)
    np.testing.assert_allclose(summary.covered, [[0, 1.23]], atol=1e-4)
    assert summary.status == "ok"


def test_absent_audio_has_a_status(tmp_path: Path) -> None:
    samples, summary = decode(write_media(tmp_path / "c.mp4", VideoTrack(EVEN)), 4.0)
    assert samples.size == 0
    assert summary == AudioSummary("absent")


@pytest.mark.parametrize(("level", "status"), [(0.0, "silent"), (5e-5, "silent"), (3e-3, "ok")])
def test_digital_silence_has_a_status(tmp_path: Path, level: float, status: str) -> None:
    path = write_media(tmp_path / "c.wav", None, AudioTrack(tones(2.0, 44100) * 2 * level, codec="pcm_s16le"))
    samples, summary = decode(path, 2.0)
    assert summary.status == status
    assert samples.size == 2 * RATE
    np.testing.assert_allclose(summary.covered, [[0, 2]])


@pytest.mark.parametrize(("length", "status"), [(3.95, "ok"), (3.8, "short")])
def test_short_audio_has_a_status(tmp_path: Path, length: float, status: str) -> None:
    audio_track = AudioTrack(tones(length, 44100), codec="pcm_s16le")
    samples, summary = decode(write_media(tmp_path / "c.mkv", VideoTrack(EVEN), audio_track), 4.0)
    assert summary.status == status
    assert samples.size == pytest.approx(length * RATE, abs=20)


def damaged(source: Path, target: Path, begin: float, end: float) -> Path:
    data = bytearray(source.read_bytes())
    a, b = int(len(data) * begin), int(len(data) * end)
    data[a:b] = np.random.default_rng(0).integers(0, 256, b - a, np.uint8).tobytes()
    target.write_bytes(bytes(data))
    return target


def test_damage_does_not_shift_the_following_audio(tmp_path: Path) -> None:
    whole = write_media(tmp_path / "c.mp4", None, AudioTrack(tones(6.0, 44100)), {"movflags": "faststart"})
    samples, summary = decode(damaged(whole, tmp_path / "d.mp4", 0.55, 0.60), 6.0)
    clean, _ = decode(whole, 6.0)
    assert summary.damaged > 0
    assert samples.size == clean.size
    np.testing.assert_allclose(samples[-RATE:], clean[-RATE:], atol=0.05)
    np.testing.assert_allclose(samples[:RATE], clean[:RATE], atol=1e-6)


def test_undecodable_audio_has_a_status(tmp_path: Path) -> None:
    """A track of FLAC packets that hold noise."""
    path = tmp_path / "c.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), "s16", "mono")
        frame.sample_rate = 44100
        for packet in stream.encode(frame):
            broken = av.Packet(b"\x01" * packet.size)
            broken.stream, broken.pts, broken.dts, broken.time_base = stream, packet.pts, packet.dts, packet.time_base
            container.mux(broken)
    samples, summary = decode(path, 1.0, start=0.0)
    assert summary.status == "unreadable"
    assert samples.size == 0
    assert summary.codec == "flac"


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.mp4").write_text("no media")
    with pytest.raises(MediaError, match=r"c\.mp4"):
        next(decode_audio(tmp_path / "c.mp4", start=0.0, duration=1.0))


def test_audio_blocks_have_bounded_size(tmp_path: Path) -> None:
    """Blocks are at most ten seconds long, even across a gap."""
    rate = 16000
    pieces = [(0.0, np.full(1600, 0.1)), (60.0, np.full(1600, 0.1))]
    path = write_pieces(tmp_path / "c.mkv", pieces, rate)
    sizes = [block.size for block in decode_audio(path, start=0.0, duration=61.0)]
    assert max(sizes) <= 10 * RATE
    assert sum(sizes) == pytest.approx(60.1 * RATE, abs=20)


EXPECTED = {
    "obama.mp4": "ok",
    "wolfgang.mp4": "silent",
    "carphone.mp4": "absent",
    "face_noface.mov": "short",
    "single_face.mp4": "ok",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_clips_have_the_expected_status(clips: Path, name: str) -> None:
    info = probe(clips / name)
    assert info.video is not None
    assert info.video.duration is not None
    samples, summary = decode(clips / name, info.video.duration)
    assert summary.status == EXPECTED[name]
    assert samples.size <= round(info.video.duration * RATE)
    if info.audio is not None and summary.covered:
        assert summary.covered[0][0] == pytest.approx(info.audio.start, abs=1e-3)
