"""One decoded frame -> the RGB picture that a viewer would see."""

from typing import cast

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

Image = NDArray[np.uint8]

# Display matrices of 0, 90, 180 and 270 degrees counter-clockwise.
_QUARTER_TURNS = np.array(
    [
        [1, 0, 0, 0, 1, 0, 0, 0, 1],
        [0, -1, 0, 1, 0, 0, 0, 0, 1],
        [-1, 0, 0, 0, -1, 0, 0, 0, 1],
        [0, 1, 0, -1, 0, 0, 0, 0, 1],
    ],
    np.int32,
)

# Exact arithmetic: without these flags swscale takes shortcuts that depend on the processor and on odd widths.
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT


def to_rgb(frame: VideoFrame) -> Image:
    """[H, W, 3] uint8 of any pixel format, depth, colour matrix and range, turned as the file's matrix says."""
    rgb = np.asarray(frame.reformat(format="rgb24", interpolation=_EXACT, threads=1).to_ndarray(), np.uint8)
    matrix = _display_matrix(frame)
    return rgb if matrix is None else np.ascontiguousarray(turned(rgb, matrix))


def _display_matrix(frame: VideoFrame) -> NDArray[np.int32] | None:
    try:
        found = cast(SideDataContainer, frame.side_data).get("DISPLAYMATRIX")
    except ValueError:  # PyAV gives up on a frame that has any kind of side data it does not know
        quarter = round(frame.rotation / 90) % 4
        return _QUARTER_TURNS[quarter] if quarter else None
    return None if found is None else np.frombuffer(bytes(found), np.int32)


def turned(image: Image, matrix: NDArray[np.int32]) -> Image:
    """Apply a display matrix's quarter turns and mirrorings.

    Args:
        image: [H, W, 3].
        matrix: [9], row by row; a stored point (x, y) is shown at (x, y) @ [[m0, m1], [m3, m4]].
    """
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        image = image.swapaxes(0, 1)
        across, down = c, b
    if across < 0:
        image = image[:, ::-1]
    return image[::-1] if down < 0 else image
