"""What a clip was made from, part by part: its files by content, its crops by listing, its place in the data set."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vaflow.datasets.clip import Clip
from vaflow.extract.crops import crops_identity, list_crops
from vaflow.extract.identity import file_identity
from vaflow.extract.stills import stills_identity

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
