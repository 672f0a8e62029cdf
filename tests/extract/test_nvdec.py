"""`--decoder nvdec` without a GPU: a stand-in for torchcodec that decodes with PyAV.

What is tested is ours: which frames are asked for and how they are checked, the comparison, the fingerprint, the
errors. NVDEC itself has not run.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from lab import Lab, assert_printed
from make_media import VideoTrack, read_number, write_media

from vaflow.datasets.clip import Clip
from vaflow.errors import MediaError, UsageError, VaflowError
from vaflow.extract import video
from vaflow.extract.config import ExtractConfig
from vaflow.extract.container import frame_times
from vaflow.extract.decoding_pool import Face, Failed, Job
from vaflow.extract.streams import stream_infos
from vaflow.extract.video import AT_ONCE, check_parity, frames_on_gpu, import_torchcodec, require_nvdec, to_rgb
from vaflow.extract.worker import run_job

CUDA = "cuda:0"


class StandIn:
    """Behave as torchcodec.decoders.VideoDecoder (0.17): return the frame played at a stream time."""

    brighter = 0  # grey levels
    late = 0.0  # offset in seconds added to the returned frame times
    cpu_fallback = ""
    indexes: list[int] = []  # noqa: RUF012 - of all of them

    def __init__(self, source: str, *, stream_index: int, dimension_order: str, device: str) -> None:
        assert (dimension_order, device) == ("NHWC", CUDA)
        with av.open(source) as container:
            stream = container.streams[stream_index]
            assert isinstance(stream, av.VideoStream)
            frames = list(container.decode(stream))
            self.times = np.array([float(frame.pts * stream.time_base) for frame in frames])  # type: ignore[operator]
            self.images = [to_rgb(frame) for frame in frames]

    def get_frames_played_at(self, seconds: list[float]) -> SimpleNamespace:
        assert len(seconds) <= AT_ONCE
        self.indexes.append(len(seconds))
        chosen = np.searchsorted(self.times, seconds, side="right") - 1
        data = np.stack([self.images[k] for k in chosen]).astype(np.int16) + self.brighter
        times = torch.from_numpy(self.times[chosen] + self.late)
        return SimpleNamespace(data=torch.from_numpy(data.clip(0, 255).astype(np.uint8)), pts_seconds=times)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    class Recording(StandIn):
        indexes: list[int] = []  # noqa: RUF012

    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.__dict__.update(__version__="0.17.0", ffmpeg_major_version=7, decoders=decoders, __path__=[])
    decoders.__dict__.update(VideoDecoder=Recording, set_cuda_backend=lambda name: _Backend(name))
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    return Recording


class _Backend:
    def __init__(self, name: str) -> None:
        assert name in ("beta", "nvdec")

    def __enter__(self) -> None:
        """Acts only as a context manager."""

    def __exit__(self, *_: object) -> None:
        """No cleanup."""


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Forty numbered frames at an uneven rate, starting at 0.5 s."""
    times = np.cumsum(np.random.default_rng(0).integers(20, 90, 40)) + 500
    return write_media(tmp_path / "numbered.mp4", VideoTrack(tuple(times.tolist())))


def test_frames_are_matched_by_presentation_time(stand_in: type[StandIn], numbered: Path) -> None:
    times = frame_times(numbered)
    requested = np.array([0, 1, 5, 6, 7, 12, 20, 21, 22, 23, 30, 39])
    shown = list(frames_on_gpu(numbered, requested, times, CUDA))
    assert [number for number, _ in shown] == requested.tolist()
    assert [read_number(image) for _, image in shown] == requested.tolist()
    assert stand_in.indexes == [8, 4], "a few at once"
    assert list(frames_on_gpu(numbered, requested[:0], times, CUDA)) == []


def test_a_frame_with_another_time_is_rejected(stand_in: type[StandIn], numbered: Path) -> None:
    stand_in.late = 0.04
    with pytest.raises(MediaError, match=r"instead of.*--decoder pyav"):
        list(frames_on_gpu(numbered, np.arange(4), frame_times(numbered), CUDA))


def test_codecs_without_hardware_decoding_are_rejected(stand_in: type[StandIn], numbered: Path) -> None:
    stand_in.cpu_fallback = "Falling back due to: Video not supported"
    with pytest.raises(MediaError, match="Video not supported"):
        list(frames_on_gpu(numbered, np.arange(4), frame_times(numbered), CUDA))


def test_library_errors_fail_the_clip(stand_in: type[StandIn], numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, seconds: list[float]) -> None:
        raise RuntimeError("Could not seek\nlong trace")

    monkeypatch.setattr(stand_in, "get_frames_played_at", fail)
    with pytest.raises(MediaError, match="Could not seek"):
        list(frames_on_gpu(numbered, np.arange(4), frame_times(numbered), CUDA))


@pytest.mark.parametrize(("brighter", "agrees"), [(0, True), (3, True), (4, False), (20, False)])
def test_the_comparison_reports_pixel_differences(
    brighter: int, agrees: bool, stand_in: type[StandIn], numbered: Path
) -> None:
    """The drawn pixel values are far from 0 and 255, so the mean difference equals the added offset."""
    stand_in.brighter = brighter
    if agrees:
        assert check_parity(numbered, CUDA) == pytest.approx(brighter, abs=0.01)
    else:
        with pytest.raises(VaflowError, match=rf"at most 3 grey levels.*Got: {brighter}\.00"):
            check_parity(numbered, CUDA)


def test_nvdec_is_used_for_frames_only(stand_in: type[StandIn], numbered: Path) -> None:
    grid = ExtractConfig(window=1.0, stride=0.5, frames=4).grid
    clip = Clip("numbered", None, "numbered", numbered)
    arguments: list[Any] = []
    for device in ("", CUDA):
        run_job(Job(0, clip, grid, True, True, "none", (), True, device), arguments.append)
    assert not [m for m in arguments if isinstance(m, Failed)]
    faces = [m.sample for m in arguments if isinstance(m, Face)]
    assert faces[: len(faces) // 2] == faces[len(faces) // 2 :], "the same samples by both"
    assert sum(stand_in.indexes) > 0


def test_the_fingerprint_includes_nvdec_for_frame_streams(stand_in: type[StandIn], tiny_pair: tuple) -> None:
    visual, audio = tiny_pair
    names = {"visual": ("clip-tiny",), "audio": ("ast-tiny",), "pixels": True}
    ours, theirs = (
        stream_infos(ExtractConfig(**names, decoder=decoder), [visual], [audio])  # type: ignore[arg-type]
        for decoder in ("pyav", "nvdec")
    )
    changed = {name for name in ours if ours[name].identity != theirs[name].identity}
    assert changed == {"clip-tiny", "crops", "faces", "pixels"}, "audio and labels stay the same"
    used = theirs["clip-tiny"].identity["picture"]["decoder"]
    assert (used["backend"], used["version"], used["clock"]["backend"]) == (
        "torchcodec nvdec",
        "0.17.0",
        "pyav",
    )


def test_a_missing_gpu_package_or_ffmpeg_is_reported(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    require_nvdec("cuda:0")
    with pytest.raises(UsageError, match="--device cuda"):
        require_nvdec("cpu")
    sys.modules["torchcodec"].__dict__["ffmpeg_major_version"] = None
    with pytest.raises(UsageError, match="FFmpeg"):
        import_torchcodec()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UsageError, match=r"nvdec\]"):
        video.nvdec_identity()


def test_the_command_line_option_works(lab: Lab, tmp_path: Path, numbered: Path) -> None:
    for choice, word in (("nvdec", ".[nvdec]"), ("cuvid", "nvdec, pyav")):
        arguments = ["extract", tmp_path, "--out", tmp_path / "cache", "--decoder", choice]
        assert_printed(lab.run(arguments, "import sys; sys.modules['torchcodec'] = None"), 2, word)
    assert not (tmp_path / "cache").exists()
