"""Shot boundaries between sampled frames, from the change of a small thumbnail and of its color histogram.

Sampled frames lie half a second apart, so neither measure is enough alone: a person who moves changes the thumbnail
and leaves the histogram; a lamp that is switched on changes the histogram of every cell alike. A cut changes both.
A missed cut is caught by the tracker's gates and by the comparison of appearance; a false one only ends a track.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

CUTS_VERSION = 1
SIZE = (32, 18)  # pixels of the thumbnail, width and height
BINS = 8  # per color channel
MIN_CHANGE = 0.10  # mean absolute difference of the thumbnails, 0 to 1, less the change of the mean brightness
MIN_HISTOGRAM_CHANGE = 0.25  # half of the sum of absolute differences of the histograms, 0 to 1
SUSPICIOUS = 0.5  # share of both limits from which on a track's appearance is compared across the two frames


class CutDetector:
    """Compares each sampled frame with the one before."""

    def __init__(self) -> None:
        self._thumbnail: NDArray[np.floating[Any]] | None = None
        self._histogram: NDArray[np.floating[Any]] | None = None

    def update(self, rgb: Image) -> float:
        """How much a cut before this frame [H, W, 3] is indicated: 1 and above is a cut; 0 for the first frame."""
        import cv2

        small = np.asarray(cv2.resize(rgb, SIZE, interpolation=cv2.INTER_AREA), np.uint8)
        cells = (small // (256 // BINS)).reshape(-1, 3).astype(np.int64) @ np.array([BINS * BINS, BINS, 1])
        histogram = np.bincount(cells, minlength=BINS**3) / cells.size
        # Neighboring bins share their pixels, so that a slight change of light moves little.
        cube = histogram.reshape(BINS, BINS, BINS)
        for axis in range(3):
            cube = (np.roll(cube, 1, axis) + 2 * cube + np.roll(cube, -1, axis)) / 4
        before, histogram_before = self._thumbnail, self._histogram
        thumbnail = small.astype(np.float32) / 255
        self._thumbnail, self._histogram = thumbnail, cube
        if before is None or histogram_before is None:
            return 0.0
        brightness = thumbnail.mean() - before.mean()
        change = float(np.abs(thumbnail - before - brightness).mean())
        histogram_change = float(np.abs(cube - histogram_before).sum() / 2)
        return min(change / MIN_CHANGE, histogram_change / MIN_HISTOGRAM_CHANGE)
