"""Cached frames, audio and labels are aligned, end to end, for every kind of file.

A picture is right where no other frame that was written is nearer to the sample's time; sound is right within 10 ms at
the beginning, in the middle and at the end; labels go by the same clock.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from coded_clips import (
    SIZE,
    Case,
    NumberReader,
    ToneReader,
    drifting,
    even,
    label_of,
    lateness,
    numbers_of,
    track,
    transport_stream,
    trim,
    uneven,
)
from make_media import VideoTrack

from vaflow.cache import Cache, open_cache
from vaflow.datasets import open_dataset
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with

WINDOW, STRIDE, FRAMES = 2.0, 0.5, 20  # samples 0.1 s apart, so that many frames are read
AUDIO_TOLERANCE = 0.010  # seconds

NTSC, FILM = Fraction(30000, 1001), Fraction(24000, 1001)
B_FRAMES = {"bf": "3", "g": "12", "b-adapt": "0"}
VP9 = {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}
VP8 = {"auto-alt-ref": "1", "lag-in-frames": "16"}


def film(times, size=SIZE, **options) -> VideoTrack:
    return VideoTrack(times, size, square=True, **options)


def opus(seconds: float = 3.6, start: float = 0.0):
    return track(seconds, rate=48000, codec="libopus", start=start)


CASES = [
    Case("constant.mp4", film(even(25), rate=25), track(), labels="time"),
    Case("variable.mp4", film(uneven()), track(channels=2)),
    Case("variable_time.mkv", film(uneven()), track(codec="flac"), labels="time"),
    Case("film.mp4", film(even(FILM), rate=FILM), track(rate=48000)),
    Case("film_time.mkv", film(even(FILM), rate=FILM), track(codec="flac"), labels="time"),
    Case("ntsc.mov", film(even(NTSC), rate=NTSC), track(rate=48000, channels=2)),
    Case("ntsc_mkv.mkv", film(even(NTSC), rate=NTSC), track(codec="flac")),
    Case("sixty.mp4", film(even(60), rate=60, options=B_FRAMES), track(), labels="time"),
    Case("b_frames.mp4", film(uneven(), options=B_FRAMES), track(rate=22050)),
    Case("b_frames_mkv.mkv", film(uneven(), options=B_FRAMES), track(rate=8000, codec="pcm_s16le")),
    Case("edited.mp4", film(even(25), rate=25), track(), cut=0.4, finish=trim(0.4), labels="time"),
    Case("edited_b.mp4", film(even(25), rate=25, options=B_FRAMES), track(), cut=0.56, finish=trim(0.56)),
    Case("edited_silent.mp4", film(uneven()), None, cut=0.5, finish=trim(0.5)),
    Case("late.mp4", film(uneven(1500)), track(start=1.5), labels="time"),
    Case("late_mkv.mkv", film(uneven(1500)), track(start=1.5, codec="flac"), labels="time"),
    Case("late_ts.mp4", film(uneven(1500), options={"bf": "2"}), track(start=1.5), write=transport_stream),
    Case("stream.mp4", film(uneven(), options={"bf": "2"}), track(codec="mp2"), write=transport_stream),
    Case("sound_later.mp4", film(even(25), rate=25), track(3.0, start=0.37), labels="time"),
    Case("sound_later_mkv.mkv", film(uneven()), track(3.0, start=0.37, codec="pcm_s16le"), labels="time"),
    Case("picture_later.mkv", film(uneven(600)), track(4.2, codec="flac"), labels="time"),
    Case("picture_later_mp4.mp4", film(uneven(600)), track(4.2), labels="time"),
    Case("drift_fast.mkv", film(even(25), rate=25), track(codec="pcm_s16le"), write=drifting(+1.0)),
    Case("drift_slow.mkv", film(even(25), rate=25), track(codec="pcm_s16le"), write=drifting(-1.0)),
    Case("turned_90.mp4", film(uneven(), rotation=90), track()),
    Case("turned_180.mov", film(uneven(), rotation=180), track()),
    Case("turned_270.mp4", film(uneven(), rotation=270), track()),
    Case("odd.webm", film(uneven(), (131, 99), codec="libvpx-vp9", options=VP9), opus()),
    Case("odd_444.mkv", film(uneven(), (131, 99), pixel_format="yuv444p"), track(codec="flac")),
    Case("deep.mp4", film(uneven(), codec="libx265", pixel_format="yuv420p10le"), track()),
    Case("hevc.mp4", film(uneven(), codec="libx265", options={"bf": "3"}), track()),
    Case("hevc_mkv.mkv", film(uneven(), codec="libx265", options={"bf": "3"}), track(channels=6, codec="flac")),
    Case("vp9.webm", film(uneven(), codec="libvpx-vp9", options=VP9), opus()),
    Case("vp9_mp4.mp4", film(uneven(), codec="libvpx-vp9", options=VP9), track()),
    Case("vp9_mkv.mkv", film(uneven(), codec="libvpx-vp9", options=VP9), track(codec="libmp3lame")),
    Case("vp8.webm", film(uneven(), codec="libvpx", options=VP8), opus()),
    Case("mpeg4.mp4", film(even(25), rate=25, codec="mpeg4", options={"bf": "2"}), track(codec="libmp3lame")),
    Case("mpeg4_mkv.mkv", film(even(25), rate=25, codec="mpeg4"), track()),
    Case("mpeg4_avi.avi", film(even(25), rate=25, codec="mpeg4"), track(codec="pcm_s16le")),
    Case("h264_avi.avi", film(even(25), rate=25, options={"bf": "0"}), track(codec="pcm_s16le")),
    Case(
        "dropped.avi", film([t for t in even(25) if not t or t % 280], rate=25, codec="mpeg4"), track(codec="pcm_s16le")
    ),
]
# Further mixes of what the other cases have one by one: containers, codecs, clocks and offsets.
SLOW = [
    "variable.mp4",
    "film_time.mkv",
    "ntsc_mkv.mkv",
    "b_frames_mkv.mkv",
    "edited_silent.mp4",
    "late_mkv.mkv",
    "sound_later_mkv.mkv",
    "picture_later_mp4.mp4",
    "drift_slow.mkv",
    "turned_180.mov",
    "turned_270.mp4",
    "hevc_mkv.mkv",
    "vp9_mp4.mp4",
    "vp9_mkv.mkv",
    "mpeg4.mp4",
    "mpeg4_mkv.mkv",
    "odd_444.mkv",
]


def as_parameters(cases: list[Case]) -> list[Any]:
    return [pytest.param(c, id=c.name, marks=pytest.mark.slow if c.name in SLOW else ()) for c in cases]


ALL, WITH_AUDIO = as_parameters(CASES), as_parameters([case for case in CASES if case.audio_track])


@pytest.fixture(scope="module")
def aligned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Extract the cases that are tested, whole frames, with the decoding encoders."""
    root = tmp_path_factory.mktemp("coded")
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    tested = {item.callspec.params["case"].name for item in items}
    for case in CASES:
        if case.name in tested:
            case.make(root)
    out = root.parent / f"{root.name}.cache"
    config = ExtractConfig(
        visual=("numbers",), audio=("tones",), window=WINDOW, stride=STRIDE, frames=FRAMES, audio_steps=20,
        device="cpu", face_source="none", workers=2, dtype="float32",
    )  # fmt: skip
    summary = extract_with(
        open_dataset(root, "videos"), out, config, [NumberReader()], [ToneReader()], torch.device("cpu")
    )
    assert not summary.failures, summary.failures
    return open_cache(out)


def stem(case: Case) -> str:
    return case.name.rpartition(".")[0]


def origin_of(cache: Cache, case: Case) -> float:
    """The file's clock at the clip's time 0, by the first frame."""
    return float(case.written[case.first] - cache.read("labels", stem(case)).time[0])


@pytest.mark.parametrize("case", ALL)
def test_every_sample_has_the_frame_of_its_time(aligned: Cache, case: Case) -> None:
    visual = aligned.read("numbers", stem(case))
    assert visual.valid.all() and len(visual.time) >= 25
    numbers = numbers_of(visual.embedding)
    np.testing.assert_array_equal(numbers, visual.frame + case.first, "the number that is stored is the frame's own")
    written = case.written - origin_of(aligned, case)
    off = np.abs(written[numbers] - visual.time)
    nearest = np.abs(written[case.first :, None] - visual.time).min(0)
    np.testing.assert_allclose(off, nearest, atol=1.5e-3)  # Matroska and TS round to their clocks


@pytest.mark.parametrize("case", ALL)
def test_sample_times_follow_the_file_clock(aligned: Cache, case: Case) -> None:
    """The clock starts with the first frame or audio sample, within a codec delay; frame distances are kept."""
    times = aligned.read("labels", stem(case)).time
    written = case.written[case.first :]
    np.testing.assert_allclose(np.diff(times), np.diff(written), atol=1.5e-3)
    half_frame = np.median(np.diff(written)) / 2
    assert abs(origin_of(aligned, case) - case.origin) <= max(half_frame, 0.0265)  # MP3's delay is 26 ms
    assert aligned.meta(stem(case))["frames"] == len(written)


@pytest.mark.parametrize("case", ALL)
def test_labels_follow_the_file_clock(aligned: Cache, case: Case) -> None:
    labels, visual = aligned.read("labels", stem(case)), aligned.read("numbers", stem(case))
    numbers = numbers_of(visual.embedding)
    expected = np.array([label_of(number) for number in numbers])
    values = labels.value[visual.frame]
    if case.labels == "frame":
        np.testing.assert_allclose(values, np.stack([expected, -expected], 1), atol=1e-6)
        return
    # Rows by time: the row of the frame that is shown, or of its neighbour where a codec's delay moved the clock.
    known = np.isfinite(values[:, 0])
    assert known.mean() > 0.95
    shift = abs(origin_of(aligned, case) - case.origin)
    written = case.written
    milliseconds = np.rint(values[known, 0] * 1000).astype(int)
    assert (np.abs(written[milliseconds] - written[numbers[known]]) <= 2 * shift + 1.5e-3).all()


@pytest.mark.parametrize("case", WITH_AUDIO)
def test_audio_is_aligned_at_start_middle_and_end(aligned: Cache, case: Case) -> None:
    logmel = aligned.read("logmel", stem(case))
    valid = np.flatnonzero(logmel.valid)
    assert case.audio_track is not None and valid.size > 280
    np.testing.assert_allclose(np.diff(logmel.time), 0.01, atol=1e-9)
    np.testing.assert_allclose(logmel.time[0], 0.0125, atol=1e-9)
    origin = origin_of(aligned, case)
    for part in np.array_split(valid, 4):
        late = lateness(np.asarray(logmel.embedding[part], float), int(part[0]), origin)
        assert abs(late) <= AUDIO_TOLERANCE, f"{1000 * late:.0f} ms late from {part[0] / 100:.2f} s on"


@pytest.mark.parametrize("case", WITH_AUDIO)
def test_every_step_encodes_the_audio_of_its_time(aligned: Cache, case: Case) -> None:
    tones, logmel = aligned.read("tones", stem(case)), aligned.read("logmel", stem(case))
    frames = np.where(logmel.valid[:, None], logmel.embedding, np.nan)
    checked = 0
    for w, start in enumerate(tones.start):
        for s in np.flatnonzero(tones.valid[w]):
            first = round((start + s * WINDOW / FRAMES) * 100)
            expected_frames = frames[first : first + 10]
            if len(expected_frames) == 10 and np.isfinite(expected_frames).all():
                np.testing.assert_allclose(tones.embedding[w, s], expected_frames.mean(0), atol=1e-3)
                np.testing.assert_allclose(tones.time[w, s], logmel.time[first] + 0.0375, atol=0.0126 + 1e-6)
                checked += 1
    assert checked > 60
