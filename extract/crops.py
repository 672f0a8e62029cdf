"""Folders of face crops that a data set ships, named by 1-based video frame number (Aff-Wild2's `cropped_aligned`)."""

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow import pictures
from vaflow.datasets.labels import MAX_FRAME
from vaflow.extract.heartbeat import beat

PICTURES = frozenset({".jpg", ".jpeg", ".png"})
_DIGEST_BYTES = 16


def list_crops(folders: Sequence[Path]) -> dict[int, Path]:
    """0-based frame number -> crop file, ascending, of several folders merged; the first folder that has a number wins.

    A file's number is the video frame it shows, whatever other files there are: never shift. Files whose names are
    not digits from 1 to ten million with a picture's extension are left alone; a folder that is not there holds none.
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
    if extension.lower() not in PICTURES or not (stem.isascii() and stem.isdigit()):
        return None
    number = int(stem)
    return number - 1 if 1 <= number <= MAX_FRAME else None


def read_crop(path: Path) -> tuple[bytes, NDArray[np.uint8]]:
    """The file's bytes as they are, and its picture, RGB [H, W, 3] uint8.

    Raises:
        MediaError: the file cannot be read, or is no whole picture of a possible size; the caller marks the sample as
            invalid.
    """
    beat()
    data = pictures.read_file(path)
    return data, pictures.decode(data, str(path))


def crops_identity(crops: Mapping[int, Path]) -> dict[str, Any]:
    """What tells one set of crops from another: how many, and a digest of their numbers, names and sizes."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for number, path in sorted(crops.items()):
        beat()
        digest.update(f"{number}\t{path.name}\t{path.stat().st_size}\n".encode())
    return {"count": len(crops), "listing": digest.hexdigest()}
