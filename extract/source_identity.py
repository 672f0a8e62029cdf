"""The identity of a clip's sources: files by content, folders of images by listing.

A changed source is extracted again; a touched, renamed or moved one is not.
"""

from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vaflow.datasets.clip import Clip
from vaflow.errors import MediaError, explain
from vaflow.extract.image_folders import DIGEST_BYTES, crops_identity, list_crops, stills_identity
from vaflow.process import beat

PLACES = ("name", "mtime_ns")  # members of a file's identity that differ between copies of it
_BLOCK = 1 << 20

Identify = Callable[[Path], dict[str, Any]]


def file_identity(path: Path) -> dict[str, Any]:
    """{"name", "size", "mtime_ns", "blake2b"} of a file, as plain JSON. Reads the whole file.

    Raises:
        OSError: the file cannot be read.
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
    """BLAKE2b of a file's bytes, in hexadecimal."""
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
