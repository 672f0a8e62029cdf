"""Face crops of one person in raw video: detection, tracking, alignment."""

from importlib.metadata import version
from typing import Any

from vaflow.extract.faces.alignment import (
    CROP_SIZE,
    JPEG_QUALITY,
    TEMPLATE,
    TEMPLATE_VERSION,
    align,
    decode_jpeg,
    encode_jpeg,
)
from vaflow.extract.faces.detection import DETECTOR, MAX_OVERLAP, MAX_SIZE, MIN_SCORE, CenterFace, Face, model_digest
from vaflow.extract.faces.tracking import TRACKER_VERSION, PersonTracker

__all__ = [
    "CenterFace",
    "Face",
    "PersonTracker",
    "align",
    "decode_jpeg",
    "encode_jpeg",
    "faces_identity",
]


def faces_identity(max_size: int = MAX_SIZE, detector: str = "opencv") -> dict[str, Any]:
    """Everything that changes the pixels of a crop: part of the fingerprint of streams made from crops.

    Args:
        max_size: longer edge in pixels of the image that the network reads.
        detector: runtime of the network: "opencv", or "torch" (OpenCV then scales, rotates and crops).
    """
    import cv2
    from PIL import __version__ as pillow

    opencv = f"opencv {cv2.__version__}"
    return {
        "detector": DETECTOR,
        "model": model_digest(),
        "runtime": f"torch {version('torch').partition('+')[0]}, {opencv}" if detector == "torch" else opencv,
        "max_size": max_size,
        "min_score": MIN_SCORE,
        "max_overlap": MAX_OVERLAP,
        "tracker": TRACKER_VERSION,
        "template": {"version": TEMPLATE_VERSION, "points": TEMPLATE.tolist()},
        "crop_size": CROP_SIZE,
        "jpeg": {"quality": JPEG_QUALITY, "subsampling": "4:4:4", "library": f"pillow {pillow}"},
    }
