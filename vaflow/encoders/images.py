"""Image geometry of visual encoders. NumPy and Pillow only: decoding workers use it without torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

Image = NDArray[np.uint8]


KERNELS = {
    "nearest": PillowImage.Resampling.NEAREST,
    "lanczos": PillowImage.Resampling.LANCZOS,
    "bilinear": PillowImage.Resampling.BILINEAR,
    "bicubic": PillowImage.Resampling.BICUBIC,
    "box": PillowImage.Resampling.BOX,
    "hamming": PillowImage.Resampling.HAMMING,
}


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
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    edge: int = 0
    crop: str = "round"

    def __call__(self, image: Image) -> Image:
        """RGB [H, W, 3] uint8 of any size -> [size, size, 3] uint8: the inference transform up to ToTensor."""
        height, width = image.shape[:2]
        target = self._target(width, height)
        if target != (width, height):
            image = np.asarray(PillowImage.fromarray(image).resize(target, KERNELS[self.interpolation]))
        return centre_crop(image, self.size, floor=self.crop == "floor")

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
            "interpolation": f"pillow {geometry.interpolation}",
            "resize_mode": geometry.resize_mode,
            "mean": list(self.mean),
            "std": list(self.std),
            **({"edge": geometry.edge} if geometry.edge else {}),
            **({"crop": geometry.crop} if geometry.crop != "round" else {}),
        }


def centre_crop(image: Image, size: int, *, floor: bool = False) -> Image:
    """Return the central [size, size] of an image, with black borders where the image is smaller."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    down, right = max(0, size - height), max(0, size - width)
    padded = np.pad(image, ((down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2), (0, 0)))
    excess = padded.shape[0] - size, padded.shape[1] - size
    top, left = (pixels // 2 if floor else round(pixels / 2) for pixels in excess)
    return np.ascontiguousarray(padded[top : top + size, left : left + size])
