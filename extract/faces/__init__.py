"""Faces of raw video: detect, track, tell people apart, align."""

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
from vaflow.extract.faces.choice import LARGEST
from vaflow.extract.faces.detection import DETECTOR, MAX_OVERLAP, MAX_SIZE, MIN_SCORE, CenterFace, Face, model_digest
from vaflow.extract.faces.identity import network_identity, resolve
from vaflow.extract.faces.tracking import ALL_FACES_VERSION, CUTS_VERSION, TRACKER_VERSION, PersonTracker

__all__ = ["CenterFace", "Face", "PersonTracker", "align", "decode_jpeg", "encode_jpeg", "faces_identity"]


def faces_identity(
    max_size: int = MAX_SIZE, detector: str = "opencv", tracker: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return everything that changes the pixels of a crop: part of the fingerprint of what is made from crops.

    Args:
        max_size: pixels of the longer edge of the image that the network reads.
        detector: runtime of the network: "opencv", or "torch" (OpenCV then still resizes and cuts).
        tracker: see `tracker_identity`; by default one face is followed.
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
        **(tracker or tracker_identity(LARGEST, "none")),
        "template": {"version": TEMPLATE_VERSION, "points": TEMPLATE.tolist()},
        "crop_size": CROP_SIZE,
        "jpeg": {"quality": JPEG_QUALITY, "subsampling": "4:4:4", "library": f"pillow {pillow}"},
    }


def tracker_identity(person: str, identity: str) -> dict[str, Any]:
    """Return what decides whose face a crop shows: `person` and `identity` as in the settings of an extraction.

    Streams made before all faces were tracked have `{"tracker": 1}` and no person: that is "largest".
    """
    if person == LARGEST:
        return {"tracker": TRACKER_VERSION}
    people = {"cuts": CUTS_VERSION, **network_identity(resolve(identity))}
    return {"tracker": ALL_FACES_VERSION, "person": person, "people": people}
