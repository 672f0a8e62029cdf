"""Decoding workers must start quickly, so they import no heavy library."""

import subprocess
import sys

MODULES = (
    "video",
    "audio",
    "faces.detection",
    "faces.crops",
    "faces.tracking",
    "source_files",
    "worker",
)
HEAVY = ("torch", "cv2", "transformers", "open_clip", "matplotlib", "scipy")


def test_reading_media_imports_no_heavy_library() -> None:
    lines = [f"import vaflow.extract.{module}" for module in MODULES]
    lines += ["import sys", f"print([name for name in {HEAVY} if name in sys.modules])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_detecting_and_aligning_do_not_import_torch() -> None:
    program = """
import sys
import numpy as np
from vaflow.extract.faces.crops import align, encode_jpeg
from vaflow.extract.faces.detection import CenterFace, Face
from vaflow.extract.faces.tracking import PersonTracker
image = np.zeros((64, 64, 3), np.uint8)
PersonTracker().update(CenterFace().detect(image), 0.0)
encode_jpeg(align(image, Face((8, 8, 40, 40), 0.9, np.random.default_rng(0).uniform(10, 40, (5, 2)))))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
