"""Folders of numbered images: face crops of a video's frames, and whole frames in place of a video.

Crops (Aff-Wild2's `cropped_aligned`) are numbered from 1: image n shows frame n - 1. Whole frames (AFEW-VA) are
numbered from 0: image n is frame n, shown at n / rate seconds. A missing number is a frame without a face.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow import images as pictures
from vaflow.datasets.clip import Clip
from vaflow.datasets.files import entries, is_regular
from vaflow.datasets.text import MAX_FRAME
from vaflow.errors import MediaError, explain
from vaflow.extract.config import check_span
from vaflow.extract.video import MediaInfo, VideoInfo
from vaflow.process import beat
from vaflow.timeline import Floats, Ints

PICTURES = frozenset({".jpg", ".jpeg", ".png"})
IMAGES_DIGEST = "images_blake2b"  # member of a record's facts: `ImageDigest` of the images that it was made from
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
        with os.scandir(folder) as listing:  # tells files from folders without a call for each
            names = sorted(entry.name for entry in listing if is_regular(entry))
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
    """Identity of a set of crops: their count, and a digest of their numbers, names and sizes."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for number, path in sorted(crops.items()):
        beat()
        digest.update(f"{number}\t{path.name}\t{path.stat().st_size}\n".encode())
    return {"count": len(crops), "listing": digest.hexdigest()}


class ImageDigest:
    """BLAKE2b of the images of a folder that were read: number and bytes of each, in ascending order."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=_DIGEST_BYTES)
        self._last = -1

    def add(self, number: int, data: bytes) -> None:
        """Add an image, unless it is the one that was added last."""
        if number != self._last:
            self._last = number
            self._digest.update(f"{number}\t{len(data)}\n".encode() + data)

    def hexdigest(self) -> str:
        """In hexadecimal."""
        return self._digest.hexdigest()


def images_digest(clip: Clip, frames: Ints) -> str:
    """`ImageDigest` of the images at these frame numbers as they are now; unreadable and missing ones are left out."""
    images = list_crops(clip.crops) if clip.crops else list_stills(clip.frames or Path())
    digest = ImageDigest()
    for number in frames.tolist():
        with suppress(MediaError, KeyError):
            digest.add(number, read_crop(images[number])[0])
    return digest.hexdigest()


_EXPECTED = "images named by frame number from 0 on, such as 00000.png"


def list_stills(folder: Path) -> dict[int, Path]:
    """Frame number -> picture, ascending. Of one number's several files (.jpg, .png) the first by name counts.

    Raises:
        MediaError: the folder is not there or holds no numbered picture, or a number is far too large.
    """
    found: dict[int, Path] = {}
    for entry in entries(folder):
        file = folder / entry.name
        if file.suffix.lower() in PICTURES and file.stem.isascii() and file.stem.isdigit() and is_regular(entry):
            found.setdefault(int(file.stem), file)
    if not found:
        raise MediaError(explain(f"{folder} holds no frames", expected=_EXPECTED))
    if max(found) > MAX_FRAME:
        got = found[max(found)].name
        raise MediaError(explain(f"{folder} has a frame number that is none", expected=_EXPECTED, got=got))
    return dict(sorted(found.items()))


def still_times(stills: Mapping[int, Path], rate: float) -> Floats:
    """[N] seconds of all frames from 0 to the last one that has a picture."""
    return np.arange(max(stills) + 1) / rate


def open_stills(clip: Clip) -> tuple[MediaInfo, Floats]:
    """What a clip of pictures holds, in the terms of a video, and its frame times [N].

    Raises:
        MediaError: there are no pictures, the first one cannot be read, nothing says how fast they follow,
            or they span more time than a recording can.
    """
    if clip.frames is None or not clip.frame_rate or clip.frame_rate <= 0:
        raise MediaError(explain(f"{clip.id!r} has no frame rate", expected="frames per second above 0"))
    stills = list_stills(clip.frames)
    first = next(iter(stills.values()))
    (width, height), codec = pictures.measure(first)
    times, rate = still_times(stills, clip.frame_rate), clip.frame_rate
    check_span(clip.frames, times)
    video = VideoInfo(width, height, codec, rate, rate, len(stills), len(times) / rate, 0)
    return MediaInfo(clip.frames, "pictures", 0.0, video, None), times


def stills_identity(folder: Path, rate: float | None) -> dict[str, Any]:
    """What tells one folder of frames from another: its listing, and how fast the frames follow.

    Raises:
        MediaError: as `list_stills`.
    """
    return {**crops_identity(list_stills(folder)), "rate": rate}


def stills_at(folder: Path, wanted: Ints) -> Iterator[tuple[int, bytes, NDArray[np.uint8] | None]]:
    """(frame number, file's bytes, RGB image [H, W, 3]) of every wanted frame with a file; None if it is unreadable."""
    stills = list_stills(folder)
    for number in wanted.tolist():
        if number not in stills:
            continue
        try:
            yield number, *read_crop(stills[number])
        except MediaError:
            yield number, b"", None
