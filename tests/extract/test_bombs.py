"""Files whose headers claim more than they contain are rejected before memory or time is spent."""

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from make_media import AudioTrack, VideoTrack, tones, write_media
from PIL import Image

from vaflow.datasets import Clip
from vaflow.datasets.videos import read_csv
from vaflow.encoders.preprocessing import Preparation
from vaflow.errors import DataError, MediaError
from vaflow.extract.decoding_pool import AudioEnd, Done, Failed, Job, each
from vaflow.extract.importing.feature_files import FeatureFile, read_features, signature
from vaflow.extract.importing.labels import read_targets
from vaflow.extract.source_files import list_crops, open_stills, read_crop
from vaflow.extract.worker import run_job
from vaflow.timeline import Grid

ROOM = 100 * 2**20  # bytes that decoding may add to a process: an ordinary small clip adds less than half of it


def last_words(clip: Clip) -> tuple[Any, list[Any], int]:
    """Read a clip in a child process; return its last message, the ends of its audio and the memory it added."""
    ((_, result),) = each(_last_words, [clip], item_timeout=60)
    assert not isinstance(result, Failed), result
    return result


def _last_words(clip: Clip) -> tuple[Any, list[Any], int]:
    messages: list[Any] = []
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to what is used now
    before = memory_peak()
    run_job(Job(0, clip, Grid(), True, True, "none", (Preparation(32),), False), messages.append)
    return messages[-1], [m for m in messages if isinstance(m, AudioEnd)], memory_peak() - before


def memory_peak() -> int:
    """Most bytes of memory that this process has used."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def refusal(path: Path, audio: Path | None = None) -> str:
    """Return the error message of a rejected video; assert low memory use."""
    last, _, peak = last_words(Clip("c", None, "c", path, audio or path))
    assert isinstance(last, Failed), last
    assert last.error == "MediaError"
    assert peak < ROOM, peak
    return last.message


# --- images


def png(path: Path, width: int, height: int) -> Path:
    """A PNG of any claimed size with one row of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * min(width, 1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def jpeg(path: Path, width: int, height: int) -> Path:
    """A JPEG whose frame header claims any size."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, "JPEG")
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make", [png, jpeg])
@pytest.mark.parametrize("side", [9000, 50_000])
def test_an_image_with_huge_dimensions_is_rejected_by_its_header(
    tmp_path: Path, make: Callable[[Path, int, int], Path], side: int
) -> None:
    path = make(tmp_path / "00001.jpg", side, side)
    with pytest.raises(MediaError, match=f"{side} x {side} pixels|could be decompression bomb"):
        read_crop(path)
    with pytest.raises(MediaError, match=f"{side} x {side} pixels|could be decompression bomb"):
        open_stills(Clip("c", None, "c", None, frames=tmp_path, frame_rate=25.0))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_highly_compressed_image_is_rejected(tmp_path: Path) -> None:
    Image.new("L", (12_000, 12_000)).save(tmp_path / "1.png")
    assert (tmp_path / "1.png").stat().st_size < 200_000
    with pytest.raises(MediaError, match="at most 67108864 pixels"):
        read_crop(tmp_path / "1.png")


def test_a_terabyte_image_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    os.truncate(tmp_path / "1.jpg", 2**40)
    with pytest.raises(MediaError, match="1099511627776 bytes"):
        read_crop(tmp_path / "1.jpg")


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "GIF", "PPM", "WEBP"])
def test_an_unsupported_image_format_is_rejected_for_any_extension(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg", kind)
    with pytest.raises(MediaError, match="whole JPEG or PNG"):
        read_crop(tmp_path / "1.jpg")


def test_crops_with_impossible_numbers_are_ignored(tmp_path: Path) -> None:
    for number in ("1", "10000000", "10000001", "2147483648", "9" * 200):
        (tmp_path / f"{number}.jpg").touch()
    assert list(list_crops([tmp_path])) == [0, 9_999_999]


def test_stills_a_day_apart_are_rejected(tmp_path: Path) -> None:
    for number in ("0", "9999999"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(MediaError, match="too long"):
        open_stills(Clip("c", None, "c", None, frames=tmp_path, frame_rate=25.0))


# --- videos


def test_a_false_frame_size_in_the_header_allocates_no_memory(tmp_path: Path) -> None:
    """MPEG-4 stores the size in its frames; the container's size is ignored."""
    path = write_media(tmp_path / "a.avi", VideoTrack(codec="mpeg4", rate=25))
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 8 + 4  # of the bitmap header: its size, then width and height
    data[at : at + 8] = struct.pack("<II", 16_384, 16_384)
    path.write_bytes(data)
    last, _, peak = last_words(Clip("c", None, "c", path, path))
    assert isinstance(last, Done)
    assert peak < ROOM


def test_a_huge_video_frame_is_not_decoded(tmp_path: Path) -> None:
    """Every Motion JPEG frame has its own JPEG header."""
    path = write_media(tmp_path / "a.avi", VideoTrack(codec="mjpeg", pixel_format="yuvj420p", rate=25))
    data = bytearray(path.read_bytes())
    at = data.find(b"\xff\xc0")
    while at >= 0:
        data[at + 5 : at + 9] = struct.pack(">HH", 16_384, 16_384)
        at = data.find(b"\xff\xc0", at + 1)
    path.write_bytes(data)
    assert refusal(path)


def test_huge_raw_video_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr24"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "bgr24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 12
    data[at : at + 8] = struct.pack("<II", 16_384, 16_384)
    path.write_bytes(data)
    assert refusal(path)


def boxes(data: bytearray, *names: bytes) -> int:
    """Offset of the content of nested MP4 boxes."""
    at = 0
    for name in names:
        at = data.index(name, at) + 4
    return at


@pytest.mark.parametrize("frames", [2**31 - 1, 2**32 - 1, 10**8])
def test_a_container_claiming_billions_of_frames_is_rejected(tmp_path: Path, frames: int) -> None:
    path = write_media(tmp_path / "a.mp4", VideoTrack())
    data = bytearray(path.read_bytes())
    sizes = boxes(data, b"moov", b"stsz") + 4
    data[sizes : sizes + 8] = struct.pack(">II", 1, frames)  # all of one byte
    times = boxes(data, b"moov", b"stts") + 4
    data[times : times + 12] = struct.pack(">III", 1, frames, 1)
    path.write_bytes(data)
    assert refusal(path)


def film_with_times(path: Path, seconds: list[float]) -> Path:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.max_b_frames = 0
        for number, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 9 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("last", "message"), [(700.0, "has a hole"), (200_000.0, "too long")])
def test_distant_timestamps_allocate_no_dense_grid(tmp_path: Path, last: float, message: str) -> None:
    regular = [k / 25 for k in range(20)]
    assert message in refusal(film_with_times(tmp_path / "a.mkv", [*regular, last]))


def test_a_pause_of_minutes_is_accepted(tmp_path: Path) -> None:
    path = film_with_times(tmp_path / "a.mkv", [*(k / 25 for k in range(20)), 500.0])
    last, _, _ = last_words(Clip("c", None, "c", path, path))
    assert isinstance(last, Done)


# --- audio


def wav(path: Path, rate: int = 16_000, channels: int = 1, claimed: int | None = None) -> Path:
    data = np.zeros(40_000, np.int16).tobytes()
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) % 2**32, (channels * 2) % 2**16, 16)
    size = len(data) if claimed is None else claimed
    head = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    path.write_bytes(b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + b"WAVE" + head + data)
    return path


def test_audio_length_comes_from_the_data_not_the_header(tmp_path: Path) -> None:
    film = write_media(tmp_path / "a.mp4", VideoTrack())
    last, ends, peak = last_words(Clip("c", None, "c", film, wav(tmp_path / "a.wav", claimed=2**32 - 1)))
    assert isinstance(last, Done)
    assert ends[0].facts["audio"] in ("ok", "silent")
    assert peak < ROOM


@pytest.mark.parametrize("rate", [0, 1, 999, 800_000, 2**31 - 1, 2**32 - 1])
def test_an_absurd_sample_rate_is_rejected_without_allocation(tmp_path: Path, rate: int) -> None:
    """At 1 Hz each sample of the file would expand to 16,000 samples."""
    film = write_media(tmp_path / "a.mp4", VideoTrack())
    last, ends, peak = last_words(Clip("c", None, "c", film, wav(tmp_path / "a.wav", rate=rate)))
    assert peak < ROOM
    if isinstance(last, Done):
        assert ends[0].facts["audio"] == "unreadable"
    else:
        assert last.error == "MediaError"


@pytest.mark.parametrize("channels", [0, 300, 65_535])
def test_too_many_channels_are_rejected(tmp_path: Path, channels: int) -> None:
    film = write_media(tmp_path / "a.mp4", VideoTrack(), AudioTrack(tones(1.6, 44100)))
    last, _, peak = last_words(Clip("c", None, "c", film, wav(tmp_path / "a.wav", channels=channels)))
    assert isinstance(last, Done) or last.error == "MediaError"
    assert peak < ROOM


# --- tables and arrays


@pytest.mark.parametrize("cell", ["2147483648", "4294967296", "99999999999999999999", "-1", "1e9", "nan", "1.5", "٣"])
def test_impossible_frame_numbers_are_rejected(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.csv").write_text(f"frame,valence,arousal\n{cell},0,0\n")
    with pytest.raises(DataError, match=r"not a frame number.*line 2"):
        read_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(f"frame,happy\n{cell},1\n")
    if cell not in ("1.5", "٣"):
        with pytest.raises(DataError):
            read_targets(tmp_path / "b.csv", "binary")


@pytest.mark.parametrize("cell", ["1e300", "1e7", "nan", "inf", "-inf", "Infinity", "-0.1", "1_0", "0x10"])
def test_impossible_times_are_rejected(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.csv").write_text(f"time,valence,arousal\n{cell},0,0\n")
    with pytest.raises(DataError, match=r"not a time.*line 2"):
        read_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(f"time,a\n{cell},0\n")
    if cell != "1_0":
        with pytest.raises(DataError):
            read_features(FeatureFile("b", (tmp_path / "b.csv",), None), None)


def npy(path: Path, header: str, data: bytes = bytes(64)) -> FeatureFile:
    raw = header.encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data)
    return FeatureFile("a", (path,), None)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2147483648, 512)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').system('true'), 4)}\n",
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (2, 4)}\n",
        "(" * 5000,
    ],
)
def test_oversized_or_executable_array_headers_are_rejected(tmp_path: Path, header: str) -> None:
    file = npy(tmp_path / "a.npy", header)
    with pytest.raises(DataError, match=r"a\.npy"):
        signature(file)
    with pytest.raises(DataError, match=r"a\.npy"):
        read_features(file, 10.0)


def test_a_sparse_terabyte_array_is_rejected_by_its_header(tmp_path: Path) -> None:
    file = npy(tmp_path / "a.npy", "{'descr': '|i1', 'fortran_order': False, 'shape': (1073741824, 1000)}\n")
    os.truncate(file.path, 2**40)
    with pytest.raises(DataError, match="too large for one item"):
        read_features(file, 10.0)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["VAFLOW_BOMB"],))


def test_a_pickle_named_like_an_array_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAFLOW_BOMB", str(tmp_path / "ran"))
    (tmp_path / "a.npy").write_bytes(pickle.dumps(_Bomb()))
    np.save(tmp_path / "b.npy", np.array([[_Bomb()]], object), allow_pickle=True)
    for name in ("a.npy", "b.npy"):
        with pytest.raises(DataError):
            read_features(FeatureFile("a", (tmp_path / name,), None), 10.0)
    assert not (tmp_path / "ran").exists()
