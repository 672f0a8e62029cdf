"""Images as inputs of encoders: stored images to RGB, and the geometry of visual encoders. Works without torch."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from vaflow.errors import MediaError, explain

Image = NDArray[np.uint8]
Prepared = NDArray[np.uint8] | NDArray[np.float32]

KERNELS = {
    "nearest": PillowImage.Resampling.NEAREST,
    "lanczos": PillowImage.Resampling.LANCZOS,
    "bilinear": PillowImage.Resampling.BILINEAR,
    "bicubic": PillowImage.Resampling.BICUBIC,
    "box": PillowImage.Resampling.BOX,
    "hamming": PillowImage.Resampling.HAMMING,
}
LARGEST = 4096  # pixels of an edge that the settings of a model may name


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an encoder's square input; can be sent to another process.

    Attributes:
        size: edge of the square in pixels.
        interpolation: a key of `KERNELS`, antialiased.
        resize_mode: "shortest" (shortest edge to `edge`, then centre crop), "longest" (longest edge to `edge`, black
            borders) or "squash" (both edges to `edge`).
        edge: length before the crop; 0: `size`.
        crop: rounding of the crop's offset: "round", as torchvision and open_clip; "floor", as transformers.
        dtype: of the result. "uint8": Pillow's resize, which rounds to 0..255. "float32": values 0..1 without rounding,
            as torchvision resizes tensors of that type; bilinear or bicubic.
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    edge: int = 0
    crop: str = "round"
    dtype: str = "uint8"

    def __call__(self, image: Image) -> Prepared:
        """RGB [H, W, 3] uint8 of any size -> [size, size, 3] of `dtype`: the inference transform up to ToTensor."""
        height, width = image.shape[:2]
        target = self._target(width, height)
        prepared: Prepared = image
        if self.dtype == "float32":
            prepared = image.astype(np.float32) * np.float32(1 / 255)
            for axis, size in ((1, target[0]), (0, target[1])):
                prepared = resample(prepared, axis, size, self.interpolation)
        elif target != (width, height):
            prepared = np.asarray(PillowImage.fromarray(image).resize(target, KERNELS[self.interpolation]))
        return centre_crop(prepared, self.size, floor=self.crop == "floor")

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing; rounded as torchvision (shortest) and open_clip (longest) do."""
        size = self.edge or self.size
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "longest":
            ratio = max(width, height) / size
            return round(width / ratio), round(height / ratio)
        if width <= height:
            return size, int(size * height / width)
        return int(size * width / height), size


@dataclass(frozen=True)
class Preprocessing:
    """From pixels to network input: the geometry, then (x / 255 - mean) / std per channel."""

    preparation: Preparation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def identity(self) -> dict[str, Any]:
        """Return every setting as plain JSON."""
        geometry = self.preparation
        return {
            "image_size": geometry.size,
            "interpolation": f"{'pillow' if geometry.dtype == 'uint8' else geometry.dtype} {geometry.interpolation}",
            "resize_mode": geometry.resize_mode,
            "mean": list(self.mean),
            "std": list(self.std),
            **({"edge": geometry.edge} if geometry.edge else {}),
            **({"crop": geometry.crop} if geometry.crop != "round" else {}),
        }


def resample(image: NDArray[np.float32], axis: int, size: int, kernel: str) -> NDArray[np.float32]:
    """Return an image resized along one axis with antialiasing, equal to PyTorch's resize up to rounding of float32.

    Args:
        image: [H, W, 3].
        axis: 0 or 1.
        size: length of the axis in the result.
        kernel: "bilinear" or "bicubic" (a = -0.5, as Pillow).

    Source: `_compute_indices_min_size_weights_aa` in PyTorch's UpSampleKernel.cpp. Positions are float32 there, which
        moves the weights of large images by up to 1e-5: the casts below follow it.
    """
    f32, length = np.float32, image.shape[axis]
    if length == size:
        return image
    scale = f32(length / size)
    support = f32((1 if kernel == "bilinear" else 2) * max(scale, f32(1)))
    centre = (np.float64(scale) * (np.arange(size) + 0.5)).astype(f32)
    first = np.maximum((centre - support).astype(np.float64) + 0.5, 0).astype(np.int64)
    stop = np.minimum(((centre + support).astype(np.float64) + 0.5).astype(np.int64), length)
    source = first[:, None] + np.arange((stop - first).max())  # [size, taps] rows or columns that a result is made of
    distance = np.abs((source.astype(f32) - centre[:, None]).astype(np.float64) + 0.5)
    distance = (distance * np.float64(f32(1) / max(scale, f32(1)))).astype(f32)
    if kernel == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:
        near = (f32(1.5) * distance - f32(2.5)) * distance * distance + 1
        far = ((f32(-0.5) * distance + f32(2.5)) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weights = np.where(source < stop[:, None], weights, 0).astype(f32)
    weights /= weights.sum(axis=1, keepdims=True)
    source = np.minimum(source, length - 1)
    result = np.zeros((*image.shape[:axis], size, *image.shape[axis + 1 :]), f32)
    for tap in range(source.shape[1]):
        factors = weights[:, tap].reshape(-1, *[1] * (image.ndim - axis - 1))
        result += np.take(image, source[:, tap], axis) * factors
    return result


def centre_crop(image: Prepared, size: int, *, floor: bool = False) -> Prepared:
    """Return the central [size, size] of an image, with black borders where the image is smaller."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    down, right = max(0, size - height), max(0, size - width)
    padded = np.pad(image, ((down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2), (0, 0)))
    excess = padded.shape[0] - size, padded.shape[1] - size
    top, left = (pixels // 2 if floor else round(pixels / 2) for pixels in excess)
    return np.ascontiguousarray(padded[top : top + size, left : left + size])


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
    PillowImage.DecompressionBombError,
)


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        MediaError: it cannot be read, or has more than `MAX_BYTES`.
    """
    with _explained(str(path)):
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise MediaError(_unreadable(str(path), f"{size} bytes", f"at most {MAX_BYTES} bytes"))
        return Path(path).read_bytes()


def decode_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode the bytes of a JPEG or PNG file to RGB [H, W, 3] uint8; messages call it `name`.

    Raises:
        MediaError: the image is damaged or has more than `MAX_PIXELS`.
    """
    with _explained(name), _opened(BytesIO(data), name) as image:
        return np.array(image.convert("RGB"), np.uint8)


def measure_image(path: Path) -> tuple[tuple[int, int], str]:
    """((width, height), format) from the header of an image file.

    Raises:
        MediaError: it is not an image, or too large.
    """
    data = read_image_file(path)
    with _explained(str(path)), _opened(BytesIO(data), str(path)) as image:
        return image.size, str(image.format).lower()


@contextmanager
def _opened(data: BytesIO, name: str) -> Iterator[PillowImage.Image]:
    with PillowImage.open(data, formats=FORMATS) as image:
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
