"""Video with non-square pixels is scaled to its display shape before faces are detected."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_extraction import run

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.datasets.clip import Clip
from vaflow.extract import plan, streams, video
from vaflow.extract.container import frame_times
from vaflow.extract.doctor.facts import media_facts
from vaflow.extract.doctor.findings import media_findings
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.video import frames_at, probe

FRAMES = 16


def squeezed(source: Path, path: Path, aspect: Fraction, in_container: bool) -> Path:
    """The first frames of a clip, stored `aspect` times narrower and declared to have pixels of that aspect."""
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        stream = written.add_stream("libx264", rate=25, options={"crf": "12"})
        for number, frame in enumerate(read.decode(video=0)):
            if number == FRAMES:
                break
            width, height = round(frame.width / aspect) // 2 * 2, frame.height
            if number == 0:
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.sample_aspect_ratio = aspect
                if in_container:
                    stream.sample_aspect_ratio = aspect
            small = frame.reformat(width, height, "yuv420p")
            small.pts, small.time_base = number, Fraction(1, 25)
            written.mux(stream.encode(small))
        written.mux(stream.encode(None))
    return path


def face_count(path: Path) -> int:
    times = frame_times(path)
    detector = CenterFace()
    return sum(bool(detector.detect(image)) for _, image in frames_at(path, np.arange(len(times)), times))


@pytest.mark.parametrize(
    ("aspect", "name", "in_container"), [(Fraction(4, 3), "clip.mp4", True), (Fraction(2), "clip.ts", False)]
)
def test_faces_are_detected_at_any_pixel_aspect(
    clips: Path, tmp_path: Path, aspect: Fraction, name: str, in_container: bool
) -> None:
    path = squeezed(clips / "obama.mp4", tmp_path / name, aspect, in_container)
    info = probe(path).video
    original = probe(clips / "obama.mp4").video
    assert info is not None
    assert original is not None
    assert info.pixel_aspect == aspect
    assert abs(info.width - original.width) <= 2 * aspect
    assert face_count(path) == FRAMES


def test_tall_pixels_are_stretched_in_height(clips: Path, tmp_path: Path) -> None:
    path = squeezed(clips / "obama.mp4", tmp_path / "tall.mp4", Fraction(1, 2), True)
    (image,) = (image for _, image in frames_at(path, np.array([0]), frame_times(path)))
    info = probe(path).video
    assert info is not None
    assert image.shape[:2] == (info.height, info.width)
    original = probe(clips / "obama.mp4").video
    assert original is not None
    assert info.height == 2 * original.height


def test_clips_misread_by_the_previous_version_are_extracted_again(
    clips: Path, tmp_path: Path, tiny_pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "data", tmp_path / "cache"
    root.mkdir()
    squeezed(clips / "obama.mp4", root / "wide.mp4", Fraction(2), True)
    squeezed(clips / "obama.mp4", root / "square.mp4", Fraction(1), True)
    with monkeypatch.context() as earlier:
        for module in (video, streams, plan):
            earlier.setattr(module, "READING", 1)
        assert run(open_dataset(root, "videos"), out, tiny_pair).extracted == 2
    before = open_cache(out).fingerprint("clip-tiny")

    summary = run(open_dataset(root, "videos"), out, tiny_pair)
    assert (summary.extracted, summary.changed, summary.done) == (1, 1, 1)
    assert open_cache(out).fingerprint("clip-tiny") == before
    assert open_cache(out).record("clip-tiny", "wide").meta["reading"] == video.READING
    assert run(open_dataset(root, "videos"), out, tiny_pair).done == 2


@pytest.mark.parametrize(("name", "transfer"), [("PQ", 16), ("HLG", 18)])
def test_high_dynamic_range_is_recorded_and_reported_by_check(tmp_path: Path, name: str, transfer: int) -> None:
    path = tmp_path / "hdr.mp4"
    with av.open(str(path), "w") as written:
        stream = written.add_stream("libx265", rate=25, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p10le"
        stream.codec_context.color_trc = transfer
        for number in range(3):
            image = np.full((128, 128, 3), 100, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p10le")
            frame.color_trc, frame.pts, frame.time_base = transfer, number, Fraction(1, 25)
            written.mux(stream.encode(frame))
        written.mux(stream.encode(None))
    info = probe(path).video
    assert info is not None
    assert info.transfer == name
    facts, _ = media_facts(path)
    (note,) = (note for note in media_findings(Clip("hdr", None, "hdr", path), facts, 0.1) if note.code == "hdr")
    assert note.severity == "warning"
    assert name in note.message
