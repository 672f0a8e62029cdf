"""Decode stored images to RGB. An image larger than any video frame is refused before it is decoded."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as PilImage

from vaflow.errors import MediaError, explain

MAX_PIXELS = 8192 * 8192  # of one image; 8K video has half as many
MAX_BYTES = 64 * 2**20  # of one image file
FORMATS = ("JPEG", "PNG")  # Pillow reads dozens of others, whatever a file's name says

# Raised by Pillow for damaged files.
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
    """The bytes of an image file.

    Raises:
        MediaError: it cannot be read, or has more than `MAX_BYTES`.
    """
    with _explained(str(path)):
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise MediaError(_unreadable(str(path), f"{size} bytes", f"at most {MAX_BYTES} bytes"))
        return Path(path).read_bytes()


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode the bytes of a JPEG or PNG file to RGB [H, W, 3] uint8; messages call it `name`.

    Raises:
        MediaError: the image is damaged or has more than `MAX_PIXELS`.
    """
    with _explained(name), _opened(BytesIO(data), name) as image:
        return np.array(image.convert("RGB"), np.uint8)


def measure(path: Path) -> tuple[tuple[int, int], str]:
    """((width, height), format) from the header of an image file.

    Raises:
        MediaError: it is not an image, or too large.
    """
    data = read_file(path)
    with _explained(str(path)), _opened(BytesIO(data), str(path)) as image:
        return image.size, str(image.format).lower()


@contextmanager
def _opened(data: BytesIO, name: str) -> Iterator[PilImage]:
    with Image.open(data, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise MediaError(_unreadable(name, f"{width} x {height} pixels", f"at most {MAX_PIXELS} pixels"))
        yield image


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except _BROKEN as error:
        raise MediaError(_unreadable(name, str(error) or type(error).__name__, "a whole JPEG or PNG file")) from error


def _unreadable(name: str, got: str, expected: str) -> str:
    return explain(f"{name} cannot be read as an image", expected=expected, got=got)
