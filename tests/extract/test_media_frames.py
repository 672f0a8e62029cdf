"""Decoded frames have the colours, depth and orientation stated by the file."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_media import VideoTrack, draw_number, read_number, write_media

from vaflow.extract.container import frame_times
from vaflow.extract.video import frames_at, probe, turned

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 150, 120]])
# Kr, Kb of ITU-R BT.601 and BT.709; the number FFmpeg gives the matrix.
MATRICES = {"bt601": (0.299, 0.114, 5), "bt709": (0.2126, 0.0722, 1)}


def to_yuv(rgb: np.ndarray, kr: float, kb: float, full: bool, depth: int) -> np.ndarray:
    """[N, 3] 8-bit RGB -> [N, 3] codes, written from the Recommendations' equations."""
    r, g, b = (rgb / 255.0).T
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    unit = 2 ** (depth - 8)
    if full:
        return np.round(np.stack([y * 255, u * 255 + 128, v * 255 + 128], 1) * unit).clip(0, 256 * unit - 1)
    return np.round(np.stack([y * 219 + 16, u * 224 + 128, v * 224 + 128], 1) * unit)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("full", "depth"), [(False, 8), (True, 8), (False, 10)])
def test_colours_are_correct_for_every_matrix_range_and_depth(
    tmp_path: Path, matrix: str, full: bool, depth: int
) -> None:
    kr, kb, number = MATRICES[matrix]
    codes = to_yuv(COLOURS, kr, kb, full, depth)
    path = tmp_path / "colours.mp4"
    fmt = "yuv444p" if depth == 8 else "yuv444p10le"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 16 * len(COLOURS), 16, fmt
        stream.codec_context.colorspace = number
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame(stream.width, stream.height, fmt)
        for plane, row in zip(frame.planes, codes.T, strict=True):
            dtype = np.uint8 if depth == 8 else np.uint16
            samples = np.zeros((plane.height, plane.line_size // np.dtype(dtype).itemsize), dtype)
            samples[:, : plane.width] = np.repeat(row.astype(dtype), 16)
            plane.update(samples.tobytes())
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        frame.colorspace, frame.color_range = number, 2 if full else 1
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    ((_, image),) = frames_at(path, np.array([0]), frame_times(path))
    np.testing.assert_allclose(image[8, 8::16].astype(int), COLOURS, atol=2)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_are_decoded_upright(tmp_path: Path, rotation: int) -> None:
    path = write_media(tmp_path / "turned.mp4", VideoTrack(range(0, 400, 40), rotation=rotation))
    info = probe(path)
    assert info.video is not None
    times = frame_times(path)
    for number, image in frames_at(path, np.arange(len(times)), times):
        assert read_number(image) == number
        assert image.shape == (info.video.height, info.video.width, 3)
    assert (info.video.width < info.video.height) == (rotation != 180)
    assert (info.video.rotation - rotation) % 360 == 0


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("across", [1, -1])
@pytest.mark.parametrize("down", [1, -1])
def test_every_display_matrix_is_applied(swap: bool, across: int, down: int) -> None:
    matrix = np.zeros(9, np.int32)
    matrix[[3, 1] if swap else [0, 4]] = np.array([across, down]) * 65536
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    shown = turned(image, matrix)
    for y in range(2):
        for x in range(3):
            # The middle of the frame stays in place; the matrix moves its surroundings.
            dx, dy = x - 1.0, y - 0.5
            to_x = (matrix[0] * dx + matrix[3] * dy) / 65536 + (shown.shape[1] - 1) / 2
            to_y = (matrix[1] * dx + matrix[4] * dy) / 65536 + (shown.shape[0] - 1) / 2
            np.testing.assert_array_equal(shown[int(to_y), int(to_x)], image[y, x])


@pytest.mark.parametrize(
    ("codec", "pixel_format", "size"),
    [
        ("libx265", "yuv420p10le", (162, 122)),
        ("libx264", "yuv444p", (161, 121)),
        ("libvpx-vp9", "yuv420p", (161, 121)),
    ],
)
def test_odd_sizes_and_deep_colour_are_decoded_exactly(
    tmp_path: Path, codec: str, pixel_format: str, size: tuple[int, int]
) -> None:
    path = write_media(tmp_path / "odd.mkv", VideoTrack((0, 40, 80), size, codec, pixel_format))
    times = frame_times(path)
    for number, image in frames_at(path, np.arange(3), times):
        assert image.shape == (size[1], size[0], 3)
        assert image.dtype == np.uint8
        difference = np.abs(image.astype(int) - draw_number(number, *size).astype(int))
        assert np.median(difference) <= 3
        assert difference[-1].mean() < 40  # the last row and column belong to the frame
        assert difference[:, -1].mean() < 40
