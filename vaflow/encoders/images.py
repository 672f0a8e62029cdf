"""Pictures as CLIP-like encoders expect them. NumPy and Pillow only: decoding workers use it without torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RESIZE = "pillow bicubic, shortest edge, centre crop"


def prepare_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """RGB [H, W, 3] uint8 of any size -> [size, size, 3] uint8.

    Shortest edge to `size` (bicubic, antialiased), then the centre: open_clip's inference transform up to the
    normalisation, which is done on the encoder's device.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = Image.fromarray(image).resize(target, Image.Resampling.BICUBIC)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    array: NDArray[Any] = np.asarray(resized.crop((left, top, left + size, top + size)))
    return array
