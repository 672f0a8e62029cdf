"""Image geometry of visual encoders. NumPy and Pillow only: decoding workers use it without torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an encoder's square input; can be sent to another process.

    Attributes:
        size: edge of the square in pixels.
        interpolation: "bicubic" or "bilinear", both antialiased.
        resize_mode: "shortest" (shortest edge to `size`, then centre crop), "longest" (longest edge to `size`, black
            borders) or "squash" (both edges to `size`).
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __call__(self, image: Image) -> Image:
        """RGB [H, W, 3] uint8 of any size -> [size, size, 3] uint8: open_clip's inference transform up to ToTensor."""
        height, width = image.shape[:2]
        target = self._target(width, height)
        if target != (width, height):
            bilinear = self.interpolation == "bilinear"
            kernel = PillowImage.Resampling.BILINEAR if bilinear else PillowImage.Resampling.BICUBIC
            image = np.asarray(PillowImage.fromarray(image).resize(target, kernel))
        return centre_crop(image, self.size)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing; rounded as torchvision (shortest) and open_clip (longest) do."""
        size = self.size
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
            "interpolation": f"pillow {geometry.interpolation}",
            "resize_mode": geometry.resize_mode,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def centre_crop(image: Image, size: int) -> Image:
    """Return the central [size, size] of an image, with black borders where the image is smaller."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    down, right = max(0, size - height), max(0, size - width)
    padded = np.pad(image, ((down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2), (0, 0)))
    top, left = round((padded.shape[0] - size) / 2), round((padded.shape[1] - size) / 2)
    return np.ascontiguousarray(padded[top : top + size, left : left + size])
