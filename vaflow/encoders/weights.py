"""Encoder weights: reading files, fitting them to a model, and their digest.

No code from a file is run: files are safetensors, or PyTorch archives read with `weights_only=True`.
"""

import hashlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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
            return _unwrap(path, load_file(path))
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
    if not zipfile.is_zipfile(path):
        return
    try:
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
