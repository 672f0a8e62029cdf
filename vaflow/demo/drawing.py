"""Anti-aliased drawing in a local coordinate system."""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Points = NDArray[np.float64]
Colour = tuple[int, int, int]

SHIFT = 4  # OpenCV takes corners in sixteenths of a pixel
CIRCLE = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 28, endpoint=False)), np.sin(a)], axis=-1)


class Pen:
    """Draws on `image` (BGR) in units of `scale` pixels around `origin` (x, y in pixels), turned by `angle` radians."""

    def __init__(self, image: Image, origin: tuple[float, float], scale: float, angle: float = 0.0) -> None:
        self.image = image
        self.scale = scale
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.matrix = scale * turn * (1 << SHIFT)
        self.offset = np.asarray(origin, np.float64) * (1 << SHIFT)

    def fill(self, points: Points, colour: Colour) -> None:
        """A filled polygon of [N, 2] points."""
        cv2.fillPoly(self.image, [self._pixels(points)], colour, cv2.LINE_AA, SHIFT)

    def line(self, points: Points, colour: Colour, width: float, closed: bool = False) -> None:
        """A line through [N, 2] points, `width` units wide (at least one pixel)."""
        pixels = max(1, round(width * self.scale))
        cv2.polylines(self.image, [self._pixels(points)], closed, colour, pixels, cv2.LINE_AA, SHIFT)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse."""
        self.fill(CIRCLE * (rx, ry) + (x, y), colour)

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        return np.rint(points @ self.matrix + self.offset).astype(np.int32)


@lru_cache(1024)  # most colours are those of every frame
def shade(colour: Colour, factor: float) -> Colour:
    """Darker (below 1) or lighter (above 1)."""
    blue, green, red = (int(min(255, max(0, c * factor))) for c in colour)
    return blue, green, red


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other colour."""
    blue, green, red = (int(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return blue, green, red


def from_rgb(text: str) -> Colour:
    """'#rrggbb' -> OpenCV's (blue, green, red)."""
    return int(text[5:7], 16), int(text[3:5], 16), int(text[1:3], 16)


def curve(x: Points, height: float, lift: float, y: float) -> Points:
    """A parabola over `x` in [-1, 1]: at `y - height` in the middle, `y - lift` at both ends (up is negative)."""
    points = np.empty((len(x), 2))
    bend = x * x
    points[:, 0] = x
    points[:, 1] = y - height * (1 - bend) - lift * bend
    return points
