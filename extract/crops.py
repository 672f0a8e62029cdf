"""Folders of face crops that a data set ships, named by 1-based video frame number (Aff-Wild2's `cropped_aligned`)."""

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vaflow.errors import MediaError, explain

PICTURES = frozenset({".jpg", ".jpeg", ".png"})
_DIGEST_BYTES = 16


def list_crops(folders: Sequence[Path]) -> dict[int, Path]:
    """0-based frame number -> crop file, ascending, of several folders merged; the first folder that has a number wins.

    A file's number is the video frame it shows, whatever other files there are: never shift. Files whose names are
    not digits from 1 on with a picture's extension are left alone; a folder that is not there holds none.
    """
    found: dict[int, Path] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            continue
        with os.scandir(folder) as entries:  # tells files from folders without asking for each
            names = sorted(entry.name for entry in entries if entry.is_file())
        for name in names:
            number = _number(name)
            if number is not None:
                found.setdefault(number, Path(folder) / name)
    return dict(sorted(found.items()))


def _number(name: str) -> int | None:
    stem, extension = os.path.splitext(name)  # noqa: PTH122 - half a million times: Path is slow
    if extension.lower() not in PICTURES or not (stem.isascii() and stem.isdigit()) or int(stem) < 1:
        return None
    return int(stem) - 1


def read_crop(path: Path) -> tuple[bytes, NDArray[np.uint8]]:
    """The file's bytes as they are, and its picture, RGB [H, W, 3] uint8.

    Raises:
        MediaError: the file cannot be read or is no whole picture; the caller marks the sample as invalid.
    """
    try:
        data = Path(path).read_bytes()
        with Image.open(BytesIO(data)) as picture:
            return data, np.array(picture.convert("RGB"), np.uint8)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(
            explain(f"{path} cannot be read as a picture ({error})", expected="a whole JPEG or PNG file")
        ) from error


def crops_identity(crops: Mapping[int, Path]) -> dict[str, Any]:
    """What tells one set of crops from another: how many, and a digest of their numbers, names and sizes."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for number, path in sorted(crops.items()):
        digest.update(f"{number}\t{path.name}\t{path.stat().st_size}\n".encode())
    return {"count": len(crops), "listing": digest.hexdigest()}
