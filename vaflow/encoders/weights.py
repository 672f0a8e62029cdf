"""Encoder weights: where they come from, whether they fit, and what they are called afterwards.

Nothing here runs code from a file: safetensors, or PyTorch archives read with `weights_only=True`.
"""

import hashlib
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch

from vaflow.errors import WeightsError, explain

PATIENCE = 6.0  # seconds until a hub that does not answer counts as unreachable
NAMED = 10  # keys that a message names before it only counts


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2b (32 hex digits) over a state dict in key order: name, dtype, shape, bytes of every tensor.

    Independent of the file format, the order of keys and the device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file or of a PyTorch state dict (`.pt`, `.pth`, `.bin`), on the CPU.

    A checkpoint of a training run (`{"state_dict": ...}`) is unwrapped, as is the `module.` prefix that distributed
    training leaves on every key.

    Raises:
        WeightsError: there is no such file, it is neither of the two, or it is a TorchScript archive.
    """
    if not path.is_file():
        raise WeightsError(explain(f"There is no weights file {path}", remedy="Check the path after NAME="))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_torchscript(path):
        raise WeightsError(
            explain(
                f"{path} is a TorchScript archive, which is a program and is not run here",
                expected="a state dict: .safetensors, or .pt/.bin that holds only tensors",
                got="OpenAI's original distribution format",
                remedy="Take the same weights as open_clip_model.safetensors from the Hugging Face model id "
                "timm/vit_base_patch16_clip_224.openai (or timm/vit_base_patch32_clip_224.openai)",
            )
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise WeightsError(_unreadable(path, error)) from error
    return _unwrap(path, checkpoint)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _unwrap(path, load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return explain(
        f"{path} cannot be read as weights",
        expected="a .safetensors file, or a PyTorch state dict that holds only tensors",
        got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no further word'}",
        remedy="Download the file again, or save the model's state_dict() as safetensors",
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


def _unwrap(path: Path, checkpoint: object) -> dict[str, torch.Tensor]:
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    tensors = isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values())
    if not isinstance(state, Mapping) or not tensors or not state:
        raise WeightsError(_unreadable(path, TypeError("it holds no state dict of tensors")))
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def check_fit(
    where: str, *, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str] = (), remedy: str = ""
) -> None:
    """Raise a WeightsError that names the keys unless all three lists are empty."""
    lists = {"missing keys": missing, "unexpected keys": unexpected, "keys of another shape": misshapen}
    found = {what: sorted(keys) for what, keys in lists.items()}
    if not any(found.values()):
        return
    got = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in found.items() if keys)
    raise WeightsError(
        explain(
            f"The weights in {where} do not fit the model",
            expected="exactly the model's own keys",
            got=got,
            remedy=remedy or "Check that the file belongs to this model, and not to another size or library",
        )
    )


def _some(keys: Collection[str]) -> str:
    listed = list(keys)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str, remedy: str = "") -> None:
    """Load `state` into `module`; every key and shape must match, and every value must be finite.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape (it names them), or values are not finite.
    """
    own = module.state_dict()
    check_fit(
        where,
        missing=own.keys() - state.keys(),
        unexpected=state.keys() - own.keys(),
        misshapen=[
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if own[key].shape != state[key].shape
        ],
        remedy=remedy,
    )
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise WeightsError(
            explain(
                f"The weights in {where} hold NaN or infinity",
                got=_some(sorted(broken)),
                remedy="Download the file again",
            )
        )
    module.load_state_dict(dict(state), strict=True)


def hub_file(repo: str, names: tuple[str, ...], *, encoder: str) -> Path:
    """The first of `names` that the Hugging Face model `repo` has: from the local hub cache, else downloaded.

    Raises:
        WeightsError: in seconds, where the hub cannot be reached or has no such model or file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for name in names:
            cached = try_to_load_from_cache(repo, name)
            if isinstance(cached, str):
                return Path(cached)
        _require_hub(repo, names, encoder)
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, etag_timeout=PATIENCE))
            except LocalEntryNotFoundError as error:  # derives from EntryNotFoundError, but means: not reached
                raise WeightsError(_no_download(repo, names, encoder, "the connection broke")) from error
            except EntryNotFoundError:
                continue
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(_no_download(repo, names, encoder, reason)) from error
    raise WeightsError(_no_download(repo, names, encoder, "the model has none of these files"))


def _no_download(repo: str, names: tuple[str, ...], encoder: str, reason: str) -> str:
    return explain(
        f"The weights of {encoder} are not on this machine and could not be downloaded",
        expected=f"{' or '.join(names)} of the Hugging Face model id {repo}",
        got=reason,
        remedy=f"Download it on a machine with a connection and pass --weights {encoder}=PATH",
    )


def _require_hub(repo: str, names: tuple[str, ...], encoder: str) -> None:
    """Ask the hub once whether it is there: its own client retries for half a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(_no_download(repo, names, encoder, "HF_HUB_OFFLINE is set, and the local cache has none"))
    problem = within_patience(constants.ENDPOINT)
    if problem:
        raise WeightsError(_no_download(repo, names, encoder, f"the hub cannot be reached: {problem}"))


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
