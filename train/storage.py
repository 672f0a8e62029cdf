"""Files of a run: each appears whole or not at all. Tensors are kept as safetensors, never pickled."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vaflow.errors import CorruptError, VaflowError, explain


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader, or a run after a kill, sees the old one or the new one.

    Raises:
        VaflowError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush(path.parent)  # the name, too: what is written next may rely on it
    except OSError as error:
        remedy = "Make room or give write access, then run the same command again: it goes on where it stopped"
        raise VaflowError(explain(f"Cannot write {path}", got=error.strerror, remedy=remedy)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with a note of text in its header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(plain, dict(note or {})))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and the note of a safetensors file.

    Raises:
        CorruptError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptError(explain(f"{path} is damaged", got=error)) from error
