"""Weights that are published somewhere: from the local cache, else downloaded, else a clear word within seconds.

Published weights whose file name carries its own checksum, by torch.hub's convention: name-SHA256PREFIX.pth.
"""

import hashlib
import re
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import torch

from vaflow.errors import WeightsError, explain

PATIENCE = 6.0  # seconds until an address that does not answer counts as unreachable


def hub_file(repo: str, names: tuple[str, ...], *, encoder: str, needs: str = "") -> Path:
    """The first of `names` that the Hugging Face model `repo` has: from the local hub cache, else downloaded.

    `needs` says in messages what PATH must hold, where that is more than one of the names.

    Raises:
        WeightsError: in seconds, where the hub cannot be reached or has no such model or file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    needs = needs or " or ".join(names)
    try:
        for name in names:
            cached = try_to_load_from_cache(repo, name)
            if isinstance(cached, str):
                return Path(cached)
        _require_hub(repo, needs, encoder)
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, etag_timeout=PATIENCE))
            except LocalEntryNotFoundError as error:  # derives from EntryNotFoundError, but means: not reached
                raise WeightsError(_no_download(repo, needs, encoder, "the connection broke")) from error
            except EntryNotFoundError:
                continue
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(_no_download(repo, needs, encoder, reason)) from error
    raise WeightsError(_no_download(repo, needs, encoder, "the model has none of these files"))


def _no_download(repo: str, needs: str, encoder: str, reason: str) -> str:
    return explain(
        f"The weights of {encoder} are not on this machine and could not be downloaded",
        expected=f"{needs} of the Hugging Face model id {repo}",
        got=reason,
        remedy=f"Download it on a machine with a connection and pass --weights {encoder}=PATH",
    )


def _require_hub(repo: str, needs: str, encoder: str) -> None:
    """Ask the hub once whether it is there: its own client retries for half a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(_no_download(repo, needs, encoder, "HF_HUB_OFFLINE is set, and the local cache has none"))
    problem = within_patience(constants.ENDPOINT)
    if problem:
        raise WeightsError(_no_download(repo, needs, encoder, f"the hub cannot be reached: {problem}"))


def url_file(address: str, *, encoder: str) -> Path:
    """A published file that is not on the hub: from open_clip's own cache, else downloaded.

    Raises:
        WeightsError: in seconds, where the address cannot be reached.
    """
    from open_clip.pretrained import download_pretrained_from_url

    cached = Path("~/.cache/clip").expanduser() / address.rsplit("/", 1)[-1]
    problem = "" if cached.is_file() else within_patience(address)
    if not problem:
        try:
            return Path(download_pretrained_from_url(address))
        except (OSError, RuntimeError) as error:
            problem = str(error)
    raise WeightsError(
        explain(
            f"The weights of {encoder} are not on this machine and could not be downloaded",
            expected=address,
            got=problem,
            remedy=f"Download it on a machine with a connection and pass --weights {encoder}=PATH",
        )
    )


def within_patience(address: str) -> str:
    """`ask`, in a thread of its own: looking up a host name knows no timeout."""
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(ask(address)), daemon=True)
    asking.start()
    asking.join(PATIENCE + 1)
    return answers[0] if answers else f"no answer within {PATIENCE:g} s"


def ask(address: str) -> str:
    """One HEAD request; "" where anything answered, else why not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


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
