"""Pictures as CLIP-like encoders expect them. NumPy and Pillow only: decoding workers use it without torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESIZE = "pillow bicubic, shortest edge, centre crop"

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes an encoder's square input; can be sent to another process.

    Attributes:
        size: edge of the square in pixels.
        interpolation: "bicubic" or "bilinear", both antialiased.
        resize_mode: "shortest" (shortest edge to `size`, then the centre), "longest" (longest edge to `size`, black
            around it) or "squash" (both edges to `size`).
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __call__(self, image: Picture) -> Picture:
        """RGB [H, W, 3] uint8 of any size -> [size, size, 3] uint8: open_clip's inference transform up to ToTensor."""
        height, width = image.shape[:2]
        target = self._target(width, height)
        if target != (width, height):
            kernel = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
            image = np.asarray(Image.fromarray(image).resize(target, kernel))
        return _centre(image, self.size)

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


def _centre(image: Picture, size: int) -> Picture:
    """The central [size, size] of a picture, black where the picture is smaller."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    down, right = max(0, size - height), max(0, size - width)
    padded = np.pad(image, ((down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2), (0, 0)))
    top, left = round((padded.shape[0] - size) / 2), round((padded.shape[1] - size) / 2)
    return np.ascontiguousarray(padded[top : top + size, left : left + size])


def prepare_image(image: Picture, size: int) -> Picture:
    """RGB [H, W, 3] uint8 of any size -> [size, size, 3] uint8, as most CLIP models expect (see `Preparation`)."""
    return Preparation(size)(image)
