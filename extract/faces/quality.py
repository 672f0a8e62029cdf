"""Quality of a face crop: sharpness, yaw, and whether the face is clear enough to be recognized."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vaflow.extract.faces.detection import Face

Image = NDArray[np.uint8]

MIN_SIZE = 24.0  # pixels of the frame: edge of a square as large as the face's box
MIN_SCORE = 0.6
MIN_SHARPNESS = 4.0
MAX_YAW = 50.0  # degrees

_NOSE_DEPTH = 0.35  # of the nose tip before the plane of eyes and mouth, in distances of the eyes from the mouth
_MOUTH = (slice(141, 190), slice(67, 157))  # rows, columns of the mouth in an aligned crop of 224 pixels
_UPPER_FACE = (slice(60, 130), slice(57, 167))
_CENTER = (slice(1, 15), slice(2, 14))  # of the crop at 16 x 16 pixels: little background


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
            self.size >= MIN_SIZE
            and self.score >= MIN_SCORE
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
