"""Alignment: a face -> an upright square crop, its JPEG, and its quality (sharpness, yaw).

The template is the mean frontal layout of five points that face recognition aligns to (eyes 0.315 of the edge apart,
mouth 0.363 below them), made symmetric, scaled to 90 %, with the eyes at 40 % of the height: the whole
face from hairline to chin, as in Aff-Wild2's aligned crops.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vaflow.errors import MediaError, explain
from vaflow.extract.faces.detection import Face, Floats, Image

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
