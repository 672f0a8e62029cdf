"""Encoder weights: read from a file, fitted to a model, and named by a digest.

Nothing here runs code from a file: safetensors, or PyTorch archives read with `weights_only=True`.
"""

import hashlib
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from secrets import token_hex

import torch

from vaflow.errors import WeightsError, explain

# What unpacking raises, also with `weights_only=True`, for the many ways in which a file can be broken.
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


def write_state_dict(path: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Write a `.safetensors` file that `read_state_dict` reads; it appears whole or not at all.

    Raises:
        WeightsError: the disk refuses.
    """
    from safetensors.torch import save

    new = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(save({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}))
        new.replace(path)
    except OSError as error:
        raise WeightsError(explain(f"Cannot write {path}", got=error.strerror)) from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
    return path


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
    except BROKEN as error:
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
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())
    except BROKEN:  # torch says what is wrong with it
        return False


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
