"""Which file something was made from: a changed source is extracted again, a touched or moved one is not."""

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vaflow.extract.heartbeat import beat

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
