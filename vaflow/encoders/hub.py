"""Published weights: from the local cache, else downloaded; unreachable or stalled servers are reported in seconds.

By torch.hub's convention a file name can carry the file's checksum: name-SHA256PREFIX.pth.
"""

import hashlib
import logging
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from vaflow.errors import WeightsError, explain

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 6.0  # seconds until an address that does not answer counts as unreachable
STALL = 45.0  # seconds without a new byte until a download counts as stalled


def hub_file(repo: str, names: tuple[str, ...], *, encoder: str, needs: str = "", remedy: str = "") -> Path:
    """Return the first of `names` in the Hugging Face model `repo`: from the local hub cache, else downloaded.

    `needs` describes in messages what PATH must contain, where that is more than one of the names; `remedy` what to do
    where the hub cannot be reached.

    Raises:
        WeightsError: the hub is unreachable or stalls, or it has no such model or file, or access is restricted.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cached = _cached(repo, names, encoder)
    if cached is not None:
        return cached
    failed = partial(_no_download, repo, needs or " or ".join(names), encoder)
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(failed("HF_HUB_OFFLINE is set, and the local cache has none", remedy))
    problem = reach(constants.ENDPOINT)  # one request: the hub's client retries for half a minute before it fails
    if problem:
        raise WeightsError(failed(f"the hub cannot be reached: {problem}", remedy))
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        for name in names:
            try:
                return Path(
                    watch(lambda name=name: hf_hub_download(repo, name, etag_timeout=PATIENCE), folder, name)  # type: ignore[misc]
                )
            except LocalEntryNotFoundError as error:  # derives from EntryNotFoundError, but means: unreachable
                raise WeightsError(failed("the connection broke", remedy)) from error
            except EntryNotFoundError:
                continue
    except GatedRepoError as error:
        page = f"Accept it at {constants.ENDPOINT}/{repo} and set HF_TOKEN"
        raise WeightsError(failed("its licence must be accepted first", page)) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(failed("no such model id, or it is private", "Check the id, or set HF_TOKEN")) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(failed(reason, remedy)) from error
    raise AbsentFileError(failed("the model has none of these files", remedy))


class AbsentFileError(WeightsError):
    """A model of the hub lacks a file."""


def hub_folder(repo: str, names: tuple[str, ...], optional: tuple[str, ...], *, encoder: str) -> Path:
    """Return the folder with the first of `names` and those of the `optional` files that the model has.

    The file of `names` is downloaded last, so that an interrupted download is not taken for a complete one.

    Raises:
        WeightsError: as `hub_file`.
    """
    if _cached(repo, names, encoder) is None:
        for name in optional:
            with suppress(AbsentFileError):
                hub_file(repo, (name,), encoder=encoder)
    return hub_file(repo, names, encoder=encoder).parent


def _cached(repo: str, names: tuple[str, ...], encoder: str) -> Path | None:
    """Return the first of `names` in the local hub cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        paths = (try_to_load_from_cache(repo, name) for name in names)
        return next((Path(path) for path in paths if isinstance(path, str)), None)
    except HFValidationError as error:
        raise WeightsError(_no_download(repo, " or ".join(names), encoder, str(error).splitlines()[0])) from error


def _no_download(repo: str, needs: str, encoder: str, reason: str, remedy: str = "") -> str:
    return _not_available(encoder, f"{needs} of the Hugging Face model id {repo}", reason, remedy)


def _not_available(encoder: str, expected: str, reason: str, remedy: str = "") -> str:
    return explain(
        f"The weights of {encoder} are not on this machine and could not be downloaded",
        expected=expected,
        got=reason,
        remedy=remedy or f"Download it on a machine with a connection and pass --weights {encoder}=PATH",
    )


def watch(download: Callable[[], T], folder: Path, what: str) -> T:
    """Return the result of `download`, run in a thread, as long as `folder` keeps growing.

    Raises:
        OSError: no byte was added to the folder for `STALL` seconds; or what `download` raises.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(download())
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            future.set_exception(error)

    log.info("downloading %s", what)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    size, since = _size(folder), time.monotonic()
    while thread.is_alive():
        thread.join(min(1.0, STALL / 4))
        now = _size(folder)
        if now != size:
            size, since = now, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since > STALL:
            raise OSError(f"the server stopped sending {what}: no data for {STALL:g} s")
    return future.result()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            total += path.lstat().st_size
        except OSError:  # a temporary file that was renamed meanwhile
            continue
    return total


def url_file(address: str, *, encoder: str) -> Path:
    """Return a published file that is not on the hub: from open_clip's own cache, else downloaded.

    Raises:
        WeightsError: the address cannot be reached, or stalls.
    """
    from open_clip.pretrained import download_pretrained_from_url

    folder = Path("~/.cache/clip").expanduser()
    cached = folder / address.rsplit("/", 1)[-1]
    problem = "" if cached.is_file() else reach(address)
    if not problem:
        try:
            return Path(watch(lambda: download_pretrained_from_url(address), folder, address))
        except (OSError, RuntimeError) as error:
            problem = str(error)
    raise WeightsError(_not_available(encoder, address, problem))


def reach(address: str) -> str:
    """Return "" if the address answers within `PATIENCE`, else why not."""
    answers: list[str] = []
    # In a thread of its own: looking up a host name has no timeout.
    thread = threading.Thread(target=lambda: answers.append(ask(address)), daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answers[0] if answers else f"no answer within {PATIENCE:g} s"


def ask(address: str) -> str:
    """Send one HEAD request; return "" for any answer, else the error."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


_CHECKSUM = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|safetensors)")


def checksum_in_name(name: str) -> str | None:
    """Return the leading hex digits of the file's SHA-256, where its name ends in them."""
    match = _CHECKSUM.fullmatch(name[name.rfind("-") :]) if "-" in name else None
    return match.group(1) if match else None


def check_checksum(path: Path) -> None:
    """Compare a file with the checksum in its name, if it has one.

    Raises:
        WeightsError: they differ.
    """
    prefix = checksum_in_name(path.name)
    if prefix is None or not path.is_file():
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        problem = f"{path} does not match the checksum in its name"
        remedy = "Delete it and download it again; if it was changed on purpose, rename it"
        raise WeightsError(explain(problem, expected=f"a SHA-256 that begins with {prefix}", got=digest, remedy=remedy))


def checked_url(address: str, *, encoder: str) -> Path:
    """Return the file at `address`: from torch.hub's cache, else downloaded into it. Its checksum is compared.

    Raises:
        WeightsError: the address cannot be reached or stalls, or the checksum differs.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    problem = "" if path.is_file() else reach(address)
    if not problem and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum, bar = checksum_in_name(path.name), sys.stderr.isatty()
            # torch keeps no file whose checksum is wrong.
            watch(lambda: torch.hub.download_url_to_file(address, str(path), checksum, bar), path.parent, address)
        except (OSError, RuntimeError) as error:
            problem = str(error)
    if problem:
        raise WeightsError(_not_available(encoder, address, problem))
    check_checksum(path)
    return path
