"""Stored pictures -> RGB. Nothing is decoded that claims to be larger than a picture of a video can be."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as Picture

from vaflow.errors import MediaError, explain

MAX_PIXELS = 8192 * 8192  # of one picture; 8K video has half as many
MAX_BYTES = 64 * 2**20  # of one picture's file
FORMATS = ("JPEG", "PNG")  # Pillow reads dozens of others, whatever a file's name says

# What Pillow raises for the many ways in which a file can be broken.
_BROKEN = (
    OSError,
    UnidentifiedImageError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_file(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        MediaError: it cannot be read, or is far too large.
    """
    with _explained(str(path)):
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise MediaError(_unreadable(str(path), f"{size} bytes", f"at most {MAX_BYTES} bytes"))
        return Path(path).read_bytes()


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """RGB [H, W, 3] uint8 of a JPEG or PNG file's bytes; `name` is what messages call it.

    Raises:
        MediaError: it is no whole picture, or a larger one than `MAX_PIXELS`.
    """
    with _explained(name), _opened(BytesIO(data), name) as picture:
        return np.array(picture.convert("RGB"), np.uint8)


def measure(path: Path) -> tuple[tuple[int, int], str]:
    """((width, height), format) by the file's header.

    Raises:
        MediaError: it is no picture, or too large a one.
    """
    data = read_file(path)
    with _explained(str(path)), _opened(BytesIO(data), str(path)) as picture:
        return picture.size, str(picture.format).lower()


@contextmanager
def _opened(data: BytesIO, name: str) -> Iterator[Picture]:
    with Image.open(data, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise MediaError(_unreadable(name, f"{width} x {height} pixels", f"at most {MAX_PIXELS} pixels"))
        yield picture


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except _BROKEN as error:
        raise MediaError(_unreadable(name, str(error) or type(error).__name__, "a whole JPEG or PNG file")) from error


def _unreadable(name: str, got: str, expected: str) -> str:
    return explain(f"{name} cannot be read as a picture", expected=expected, got=got)
