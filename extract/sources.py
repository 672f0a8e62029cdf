"""What a clip was made from, part by part: its files by content, its crops by listing, its place in the data set.

Which file something was made from: a changed source is extracted again, a touched or moved one is not.
"""

from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vaflow.datasets.clip import Clip
from vaflow.extract.image_folders import crops_identity, list_crops, stills_identity
from vaflow.process import beat

_DIGEST_BYTES = 16
_BLOCK = 1 << 20


def file_identity(path: Path) -> dict[str, Any]:
    """{"name", "size", "mtime_ns", "blake2b"} of a file: plain JSON. Reads the whole file.

    Raises:
        OSError: the file cannot be read.
    """
    return file_status(path) | {"blake2b": content_digest(path)}


def file_status(path: Path) -> dict[str, Any]:
    """The part of a file's identity that can be told without reading it.

    Raises:
        OSError: there is no such file.
    """
    path = Path(path)
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def same_file(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `path` still is the file of that identity: at once by size and time, otherwise by its content."""
    path = Path(path)
    if not path.is_file():
        return False
    stat = path.stat()
    if stat.st_size != identity.get("size"):
        return False
    if stat.st_mtime_ns == identity.get("mtime_ns"):
        return True
    return content_digest(path) == identity.get("blake2b")


def content_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, in hexadecimal."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            beat()
            digest.update(block)
    return digest.hexdigest()


PLACES = ("name", "mtime_ns")  # of a file's identity: what differs between copies of it


Identify = Callable[[Path], dict[str, Any]]


def sources_of(clip: Clip, identify: Identify = file_identity) -> dict[str, Any]:
    """Part -> plain JSON that identifies it; parts that a clip does not have are left out.

    Args:
        clip: its files.
        identify: of one file; `file_identity` reads it whole, `file_status` leaves the digest out.

    Raises:
        OSError: a file cannot be read.
        MediaError: a folder of frames holds none.
    """
    found: dict[str, Any] = {}
    for part in PARTS:
        if part == "audio" and clip.audio is not None and clip.audio == clip.video:
            found[part] = found["video"]  # read once
            continue
        now = PARTS[part](clip, identify)
        if now is not None or part in ("split", "group"):
            found[part] = now
    return found


def part_of(clip: Clip, part: str) -> Any:
    """One part as it is now; None where the clip has none. Raises as `sources_of`."""
    return PARTS[part](clip, file_identity) if part in PARTS else None


def same_part(first: Any, second: Any) -> bool:
    """Whether two identities of a part mean the same content, wherever and whenever it was written."""
    return bool(_content(first) == _content(second))


def _content(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _content(inner) for key, inner in value.items() if not ("blake2b" in value and key in PLACES)}


# fmt: off
PARTS: Mapping[str, Callable[[Clip, Identify], Any]] = {
    "split":      lambda clip, of: clip.split,
    "group":      lambda clip, of: clip.group,
    "video":      lambda clip, of: of(clip.video) if clip.video is not None else None,
    "labels":     lambda clip, of: of(clip.labels) if clip.labels is not None else None,
    "audio":      lambda clip, of: of(clip.audio) if clip.audio is not None else None,
    "dimensions": lambda clip, of: {target: of(path) for target, path in clip.dimensions} or None,
    "frames":     lambda clip, of: stills_identity(clip.frames, clip.frame_rate) if clip.frames is not None else None,
    "crops":      lambda clip, of: crops_identity(list_crops(clip.crops)) if clip.crops else None,
}
# fmt: on
