"""A clip's sound as frames: every filter bank that is wanted, fed once, and which frames and steps have sound."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.cache.long import Scratch
from vaflow.cache.schema import Rows
from vaflow.encoders import logmel
from vaflow.encoders.frontend import FrontEnd
from vaflow.timeline import Floats, Ints

HOP = logmel.HOP / logmel.RATE  # seconds between two filter-bank frames
FRAME = logmel.FRAME / logmel.RATE  # seconds that one covers


class Banks:
    """One streaming filter bank per front end.

    Args:
        wanted: the front ends.
        dtypes: what their frames are kept in, where that is not float32.
        scratch: where they are kept.
    """

    def __init__(self, wanted: Iterable[FrontEnd], dtypes: Mapping[FrontEnd, np.dtype[Any]], scratch: Scratch) -> None:
        self._open = {front: front.open() for front in wanted}
        self._kept = {
            front: scratch.growing((front.bins,), dtypes.get(front, np.dtype(np.float32))) for front in self._open
        }

    def push(self, samples: NDArray[np.float32]) -> None:
        """The next samples, [n] at 16 kHz."""
        for front, bank in self._open.items():
            self._kept[front].append(bank.push(samples))

    def finish(self) -> dict[FrontEnd, Rows]:
        """No more sound: all frames [F, bins] of every front end; the banks forget them."""
        for front, bank in self._open.items():
            self._kept[front].append(bank.finish())
        return {front: self._kept.pop(front).finish() for front in self._open}


def covered_frames(frames: int, covered: tuple[tuple[float, float], ...]) -> NDArray[np.bool_]:
    """[F] True where all samples of a filter-bank frame came from the file."""
    first = np.arange(frames) * HOP
    valid = np.zeros(frames, bool)
    slack = HOP / 2  # resampling rounds the ends of the sound by a fraction of a sample
    for start, stop in covered:
        valid |= (first >= start - slack) & (first + FRAME <= stop + slack)
    return valid


def step_valid(valid: NDArray[np.bool_], starts: Floats, window: float, steps: int) -> NDArray[np.bool_]:
    """[W, S] True where at least half of the frames under a step are valid."""
    sums = np.concatenate([[0], np.cumsum(valid)])
    edges = starts[:, None] + np.arange(steps + 1) * window / steps
    index: Ints = np.rint(edges / HOP).astype(np.int64)
    counts = np.diff(sums[np.clip(index, 0, len(valid))], axis=1)
    result: NDArray[np.bool_] = counts * 2 >= np.maximum(np.diff(index, axis=1), 1)
    return result
