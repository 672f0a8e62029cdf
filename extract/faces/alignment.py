"""Alignment: a face -> an upright square crop, and its JPEG.

The template is the mean frontal layout of five points that face recognition aligns to (eyes 0.315 of the edge apart,
mouth 0.363 below them), made symmetric, scaled to 90 %, with the eyes at 40 % of the height: the whole
face from hairline to chin, as in Aff-Wild2's aligned crops.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vaflow.errors import MediaError, explain
from vaflow.extract.faces.detection import Face

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]

TEMPLATE_VERSION = 1
# x, y as shares of the crop's edge: left eye, right eye, nose tip, left and right mouth corner as the viewer sees them.
TEMPLATE: Floats = np.array([[0.358, 0.400], [0.642, 0.400], [0.500, 0.561], [0.383, 0.727], [0.617, 0.727]])
CROP_SIZE = 224
JPEG_QUALITY = 95

_FLAT = 1e-3  # landmarks whose spread is below this share of the box do not give the pose
_MAX_OVERSAMPLING = 8


def align(rgb: Image, face: Face, size: int = CROP_SIZE) -> Image:
    """Rotate, scale and shift the image so that the face's five landmarks match the template.

    Args:
        rgb: [H, W, 3] uint8.
        face: its landmarks and box.
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
