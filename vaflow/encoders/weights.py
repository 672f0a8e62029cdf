"""Weights of encoders: published files from the local cache or downloaded, reading, fitting to a model, digest.

No code from a file is run: files are safetensors, or PyTorch archives read with `weights_only=True`. Unreachable or
stalled servers are reported in seconds. By torch.hub's convention a file name can carry the file's checksum:
name-SHA256PREFIX.pth.
"""

import hashlib
import logging
import re
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from vaflow.errors import WeightsError, examples, explain

# The exceptions that broken files raise while they are read, also with `weights_only=True`.
BROKEN = (
    OSError,
    UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
NESTED = ("state_dict", "model_state")  # keys of training checkpoints
COUNTER = "num_batches_tracked"  # ends keys of batch norms' counters: older files lack them, no output depends on them
NAMED = 10  # keys that a message lists; the others are counted


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the BLAKE2b digest (32 hex digits) of a state dict: name, dtype, shape, bytes of every tensor.

    Independent of the file format, the order of keys and the device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def without_initial_weights() -> Iterator[None]:
    """Skip the random initial values of networks that are built here, whose weights are loaded afterwards.

    Drawing them is half of a small network's build time. The caller's random state is kept.
    """
    with torch.random.fork_rng(devices=[]), _WithoutDraws():
        yield


class _WithoutDraws(TorchFunctionMode):
    """Leaves tensors as they are allocated where they would be filled with random numbers."""

    DRAWS = (
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.nn.init.normal_,  # these three reach a mode before they call a tensor's method
        torch.nn.init.uniform_,
        torch.nn.init.kaiming_uniform_,
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.safetensors` file or a PyTorch state dict (`.pt`, `.pth`, `.bin`), on the CPU.

    A training checkpoint (`{"state_dict": ...}` or `{"model_state": ...}`) is unwrapped, and the `module.` prefix of
    distributed training is removed from every key.

    Raises:
        WeightsError: the file is missing, has another format, is compressed, or is a TorchScript archive.
    """
    if not path.is_file():
        raise WeightsError(explain(f"The weights file {path} does not exist", remedy="Check the path after NAME="))
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            with path.open("rb") as file:  # by its number: safetensors refuses paths that are not UTF-8
                return _unwrap(path, load_file(f"/dev/fd/{file.fileno()}"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(_unreadable(path, error)) from error
    _check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise WeightsError(_unreadable(path, error)) from error
    return _unwrap(path, checkpoint)


def _unreadable(path: Path, error: Exception) -> str:
    expected = "a .safetensors file, or a PyTorch state dict that holds only tensors"
    got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    remedy = "Download the file again, or save the model's state_dict() as safetensors"
    return explain(f"{path} cannot be read as weights", expected=expected, got=got, remedy=remedy)


def _check_archive(path: Path) -> None:
    """Raise a WeightsError for an archive that has code, or that unpacks to more than its size."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # torch decides by these bytes; `zipfile.is_zipfile` reads the file's end
                return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except BROKEN as error:
        raise WeightsError(_unreadable(path, error)) from error
    if any("/code/" in entry.filename or entry.filename.endswith("constants.pkl") for entry in entries):
        problem = f"{path} is a TorchScript archive, which contains code and is not loaded"
        expected = "a state dict: .safetensors, or .pt/.bin that holds only tensors"
        same = "timm/vit_base_patch16_clip_224.openai (or timm/vit_base_patch32_clip_224.openai)"
        remedy = f"Download open_clip_model.safetensors, the same weights, from the Hugging Face model id {same}"
        got = "OpenAI's original distribution format"
        raise WeightsError(explain(problem, expected=expected, got=got, remedy=remedy))
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if unpacked > size:
        problem = f"{path} is a compressed archive, which torch.save never writes"
        expected = f"at most {size:,} bytes of content in a file of {size:,} bytes"
        remedy = "Save the model's state_dict() as safetensors"
        raise WeightsError(explain(problem, expected=expected, got=f"{unpacked:,} bytes", remedy=remedy))


def _unwrap(path: Path, checkpoint: object) -> dict[str, torch.Tensor]:
    nested = [key for key in NESTED if isinstance(checkpoint, Mapping) and key in checkpoint]
    state = checkpoint[nested[0]] if nested and isinstance(checkpoint, Mapping) else checkpoint
    tensors = isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values())
    if not isinstance(state, Mapping) or not tensors or not state:
        raise WeightsError(_unreadable(path, TypeError("it contains no state dict of tensors")))
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def check_fit(where: str, *, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]) -> None:
    """Raise a WeightsError that names the keys unless all three lists are empty."""
    lists = {"missing keys": missing, "unexpected keys": unexpected, "keys of another shape": misshapen}
    problems = {what: sorted(keys) for what, keys in lists.items()}
    if not any(problems.values()):
        return
    got = "; ".join(f"{len(keys)} {what}: {examples(keys, NAMED)}" for what, keys in problems.items() if keys)
    problem = f"The weights in {where} do not fit the model"
    remedy = "Check that the file belongs to this model, and not to another size or library"
    raise WeightsError(explain(problem, expected="exactly the model's keys", got=got, remedy=remedy))


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load `state` into `module`; all keys but counters and all shapes must match, all values must be finite.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape (it names them), or values are not finite.
    """
    target = module.state_dict()
    state = {key: value for key, value in target.items() if key.endswith(COUNTER)} | dict(state)
    check_fit(
        where,
        missing=target.keys() - state.keys(),
        unexpected=state.keys() - target.keys(),
        misshapen=[
            f"{key} {tuple(state[key].shape)} instead of {tuple(target[key].shape)}"
            for key in target.keys() & state.keys()
            if target[key].shape != state[key].shape
        ],
    )
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        problem = f"The weights in {where} contain NaN or infinity"
        raise WeightsError(explain(problem, got=examples(sorted(broken), NAMED), remedy="Download the file again"))
    module.load_state_dict(state, strict=True)


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
