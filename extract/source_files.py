"""Sources of a clip: identity of files, and folders of numbered images: listing, identity and content digest.

Files are identified by their content: a changed source is extracted again; a touched, renamed or moved one is not.

Face crops (Aff-Wild2's `cropped_aligned`) are numbered from 1: image n shows frame n - 1. Whole frames (AFEW-VA) are
numbered from 0: image n is frame n, shown at n / rate seconds. A missing number is a frame without a face.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.clip import Clip
from vaflow.datasets.files import entries, is_regular
from vaflow.datasets.labels import MAX_FRAME
from vaflow.encoders.preprocessing import decode_image, measure_image, read_image_file
from vaflow.errors import MediaError, explain
from vaflow.extract.config import check_span
from vaflow.extract.video import MediaInfo, VideoInfo
from vaflow.process import beat
from vaflow.timeline import Floats, Ints

DIGEST_BYTES = 16
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
IMAGES_DIGEST = "images_blake2b"  # member of a record's facts: `ImageDigest` of its source images
_EXPECTED = "images named by frame number, from 0, such as 00000.png"
PLACES = ("name", "mtime_ns")  # members of a file's identity that differ between copies of it
_BLOCK = 1 << 20
Identify = Callable[[Path], dict[str, Any]]


def list_crops(folders: Sequence[Path]) -> dict[int, Path]:
    """Return 0-based frame number -> crop file, ascending, of several directories; the first with a number wins.

    A file's number is the video frame that it shows, independent of other files. Files whose names are not digits from
    1 to ten million with the extension of an image are ignored, and so are directories that do not exist.
    """
    crops: dict[int, Path] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            continue
        with os.scandir(folder) as listing:  # distinguishes files from directories without a call for each
            names = sorted(entry.name for entry in listing if is_regular(entry))
        for name in names:
            stem, extension = os.path.splitext(name)  # noqa: PTH122 - half a million calls: Path is slow
            if extension.lower() not in IMAGE_SUFFIXES or not (stem.isascii() and stem.isdigit()):
                continue
            if 1 <= int(stem) <= MAX_FRAME:
                crops.setdefault(int(stem) - 1, Path(folder) / name)
    return dict(sorted(crops.items()))


def read_crop(path: Path) -> tuple[bytes, NDArray[np.uint8]]:
    """Return the file's bytes, and its image, RGB [H, W, 3] uint8.

    Raises:
        MediaError: the file is unreadable, or not a complete image within the size limit; the caller marks the sample
            as invalid.
    """
    beat()
    data = read_image_file(path)
    return data, decode_image(data, str(path))


def crops_identity(crops: Mapping[int, Path]) -> dict[str, Any]:
    """Return the identity of a set of crops: their count, and a digest of their numbers, names and sizes."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for number, path in sorted(crops.items()):
        beat()
        digest.update(f"{number}\t{path.name}\t{path.stat().st_size}\n".encode())
    return {"count": len(crops), "listing": digest.hexdigest()}


class ImageDigest:
    """BLAKE2b of the images of a folder that were read: number and bytes of each, in ascending order."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=DIGEST_BYTES)
        self._last = -1

    def add(self, number: int, data: bytes) -> None:
        """Add an image, unless it was the last one added."""
        if number != self._last:
            self._last = number
            self._digest.update(f"{number}\t{len(data)}\n".encode() + data)

    def hexdigest(self) -> str:
        """Return the digest in hexadecimal."""
        return self._digest.hexdigest()


def images_digest(clip: Clip, frames: Ints) -> str:
    """Return the current `ImageDigest` of the images at these frame numbers; skips unreadable and missing ones."""
    paths = list_crops(clip.crops) if clip.crops else list_stills(clip.frames or Path())
    digest = ImageDigest()
    for number in frames.tolist():
        with suppress(MediaError, KeyError):
            digest.add(number, read_crop(paths[number])[0])
    return digest.hexdigest()


def list_stills(folder: Path) -> dict[int, Path]:
    """Return frame number -> image file, ascending. If several files have a number, the first by name is used.

    Raises:
        MediaError: the directory is missing or has no numbered image, or a number is too large.
    """
    stills: dict[int, Path] = {}
    for entry in entries(folder):
        file = folder / entry.name
        if file.suffix.lower() in IMAGE_SUFFIXES and file.stem.isascii() and file.stem.isdigit() and is_regular(entry):
            stills.setdefault(int(file.stem), file)
    if not stills:
        raise MediaError(explain(f"{folder} holds no frames", expected=_EXPECTED))
    if max(stills) > MAX_FRAME:
        got = stills[max(stills)].name
        raise MediaError(explain(f"{folder} has a frame number above {MAX_FRAME}", expected=_EXPECTED, got=got))
    return dict(sorted(stills.items()))


def open_stills(clip: Clip) -> tuple[MediaInfo, Floats]:
    """Return the properties of a clip of images, as of a video, and its frame times [N].

    Raises:
        MediaError: the folder has no images, the first one is unreadable, the frame rate is unknown, or the clip is
            longer than the limit.
    """
    if clip.frames is None or not clip.frame_rate or clip.frame_rate <= 0:
        raise MediaError(explain(f"{clip.id!r} has no frame rate", expected="frames per second above 0"))
    stills = list_stills(clip.frames)
    first = next(iter(stills.values()))
    (width, height), codec = measure_image(first)
    rate = clip.frame_rate
    times = np.arange(max(stills) + 1) / rate  # of all frames from 0 to the last one with an image
    check_span(clip.frames, times)
    video = VideoInfo(width, height, codec, rate, rate, len(stills), len(times) / rate, 0)
    return MediaInfo(clip.frames, "pictures", 0.0, video, None), times


def stills_identity(folder: Path, rate: float | None) -> dict[str, Any]:
    """Return the identity of a directory of frames: its listing, and the frame rate.

    Raises:
        MediaError: as `list_stills`.
    """
    return {**crops_identity(list_stills(folder)), "rate": rate}


def stills_at(folder: Path, numbers: Ints) -> Iterator[tuple[int, bytes, NDArray[np.uint8] | None]]:
    """Yield (frame number, bytes, RGB image [H, W, 3]) of each requested frame with a file; None if unreadable."""
    stills = list_stills(folder)
    for number in numbers.tolist():
        if number not in stills:
            continue
        try:
            yield number, *read_crop(stills[number])
        except MediaError:
            yield number, b"", None


def file_identity(path: Path) -> dict[str, Any]:
    """{"name", "size", "mtime_ns", "blake2b"} of a file, as plain JSON. Reads the whole file.

    Raises:
        OSError: the file cannot be read.
        MediaError: it is not a regular file.
    """
    return file_status(path) | {"blake2b": content_digest(path)}


def file_status(path: Path) -> dict[str, Any]:
    """Return the members of a file's identity that are known without reading it.

    Raises:
        OSError: the file does not exist.
    """
    path = Path(path)
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def content_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
        MediaError: it is not a regular file: a named pipe or a device could be read forever.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise MediaError(explain(f"{path} cannot be read", expected="a regular file"))
    digest = blake2b(digest_size=DIGEST_BYTES)
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            beat()
            digest.update(block)
    return digest.hexdigest()


def same_file(path: Path, identity: Mapping[str, Any], digest: Callable[[Path], str] = content_digest) -> bool:
    """Return whether `path` has that identity: equal size and time, else equal contents."""
    path = Path(path)
    if not path.is_file():
        return False
    stat = path.stat()
    if stat.st_size != identity.get("size"):
        return False
    return stat.st_mtime_ns == identity.get("mtime_ns") or digest(path) == identity.get("blake2b")


# fmt: off
PARTS: Mapping[str, Callable[[Clip, Identify], Any]] = {
    "split":      lambda clip, of: clip.split,
    "group":      lambda clip, of: clip.group,
    "video":      lambda clip, of: of(clip.video) if clip.video is not None else None,
    "labels":     lambda clip, of: of(clip.labels) if clip.labels is not None else None,
    "audio":      lambda clip, of: of(clip.audio) if clip.audio is not None else None,
    "dimensions": lambda clip, of: {target: of(path) for target, path in clip.dimensions} or None,
    "person_labels": lambda clip, of: {str(k): of(path) for k, path in clip.person_labels} or None,
    "frames":     lambda clip, of: stills_identity(clip.frames, clip.frame_rate) if clip.frames is not None else None,
    "crops":      lambda clip, of: crops_identity(list_crops(clip.crops)) if clip.crops else None,
}
# fmt: on


def sources_of(clip: Clip, identify: Identify = file_identity) -> dict[str, Any]:
    """Return part -> identity as plain JSON, without the parts that the clip lacks.

    Args:
        identify: identity of one file; `file_identity` reads it, `file_status` leaves the digest out.

    Raises:
        OSError: a file cannot be read.
        MediaError: a folder of frames holds none.
    """
    sources: dict[str, Any] = {}
    for part in PARTS:
        if part == "audio" and clip.audio is not None and clip.audio == clip.video:
            sources[part] = sources["video"]  # read once
            continue
        identity = PARTS[part](clip, identify)
        if identity is not None or part in ("split", "group"):
            sources[part] = identity
    return sources


def part_of(clip: Clip, part: str) -> Any:
    """Return the current identity of one part; None if the clip lacks it. Raises as `sources_of`."""
    return PARTS[part](clip, file_identity) if part in PARTS else None


def same_part(first: Any, second: Any) -> bool:
    """Return whether two identities of a part have equal contents; file names and times are ignored."""
    return bool(_content(first) == _content(second))


def _content(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _content(inner) for key, inner in value.items() if not ("blake2b" in value and key in PLACES)}


class SourceComparison:
    """Compares the sources of one clip with recorded identities. Hashes each file at most once.

    Args:
        rehash: compare contents even where size and time agree.
    """

    def __init__(self, clip: Clip, *, rehash: bool = False) -> None:
        self._clip, self._rehash = clip, rehash
        self._digests: dict[Path, str] = {}

    def same(self, part: str, before: Any) -> bool:
        """Return whether one part of the clip equals its recorded identity (None: no such part)."""
        nested = before.values() if isinstance(before, Mapping) else ()
        recorded = [one for one in (before, *nested) if isinstance(one, Mapping) and "blake2b" in one]

        def identify(path: Path) -> dict[str, Any]:
            return next((dict(one) for one in recorded if self._same_file(path, one)), {}) or file_status(path)

        try:
            return same_part(PARTS[part](self._clip, identify), before)
        except (OSError, MediaError):  # the source is missing
            return False

    def _same_file(self, path: Path, identity: Mapping[str, Any]) -> bool:
        if self._rehash:
            identity = {**identity, "mtime_ns": None}
        return same_file(path, identity, self._digest)

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = content_digest(path)
        return self._digests[path]


def check_unchanged(clip: Clip, sources: Mapping[str, Any]) -> None:
    """Compare a clip's files with their identities from before they were read.

    Label files are compared by content: they are small, and an edit may keep size and time.

    Raises:
        MediaError: a file has changed.
        OSError: a file is missing.
    """
    changed = []
    for part, before in sources.items():
        of = file_identity if part in ("labels", "dimensions", "person_labels") else file_status
        now = PARTS[part](clip, of)
        if of is file_status and isinstance(before, Mapping):
            before = {key: value for key, value in before.items() if key != "blake2b"}
        if not (same_part(now, before) if of is file_identity else now == before):
            changed.append(part)
    if changed:
        problem = f"The {' and '.join(changed)} of {clip.id!r} changed while the clip was read"
        raise MediaError(explain(problem, remedy="Wait until the files are complete, then run the same command again"))
