"""Published weights whose file name carries its own checksum, by torch.hub's convention: name-SHA256PREFIX.pth."""

import hashlib
import re
import sys
from pathlib import Path

import torch

from vaflow.encoders.hub import within_patience
from vaflow.errors import WeightsError, explain

_CHECKSUM = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|safetensors)")
_BLOCK = 1 << 20


def checksum_in_name(name: str) -> str | None:
    """First hex digits of the file's SHA-256, where its name ends in them."""
    found = _CHECKSUM.fullmatch(name[name.rfind("-") :]) if "-" in name else None
    return found.group(1) if found else None


def check_checksum(path: Path) -> None:
    """Compare a file with the checksum in its name, if it has one.

    Raises:
        WeightsError: they differ.
    """
    expected = checksum_in_name(path.name)
    if expected is None or not path.is_file():
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        raise WeightsError(
            explain(
                f"{path} is not the file that its name says",
                expected=f"a SHA-256 that begins with {expected}",
                got=digest.hexdigest(),
                remedy="Delete it and download it again; if it was changed on purpose, give it another name",
            )
        )


def checked_url(address: str, *, encoder: str) -> Path:
    """The file at `address`: from torch.hub's cache, else downloaded into it; its checksum is compared either way.

    Raises:
        WeightsError: in seconds, where the address cannot be reached; or the checksum differs.
    """
    name = address.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    problem = "" if path.is_file() else _download(address, path)
    if problem:
        raise WeightsError(
            explain(
                f"The weights of {encoder} are not on this machine and could not be downloaded",
                expected=address,
                got=problem,
                remedy=f"Download it on a machine with a connection and pass --weights {encoder}=PATH",
            )
        )
    check_checksum(path)
    return path


def _download(address: str, path: Path) -> str:
    """ "" when the file is there, else why not. A file whose checksum is wrong is not kept."""
    problem = within_patience(address)
    if problem:
        return problem
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = checksum_in_name(path.name)
        torch.hub.download_url_to_file(address, str(path), checksum, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""
