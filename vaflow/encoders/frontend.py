"""From sound to what an audio encoder reads: streaming filter banks, and which stretches of their frames.

All front ends share one geometry: frame i covers samples [160 i, 160 i + 400) at 16 kHz. They differ in what they make
of a frame. A clip's sound goes through each front end that is wanted once, while it is decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders.logmel import MEL_BINS, FilterBank, kaldi_banks

Frames = NDArray[np.float32]


class KeptFrames(Protocol):
    """Frames [F, bins] to be cut from: a NumPy array, or one whose rows lie in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class FrontEnd:
    """A kind of filter bank.

    Attributes:
        name: as identities and messages say it.
        bins: width of a frame.
        padding: the value of frames beyond the clip's ends.
        banks: sound of `logmel.GROUP` frames -> [GROUP, bins] float32; see `logmel.FilterBank`.
    """

    name: str
    bins: int
    padding: float
    banks: Callable[[Frames], Frames]

    def open(self) -> FilterBank:
        """A bank for one clip."""
        return FilterBank(self.banks, self.bins)


# What the log-Mel stream of every cache holds: encoders that read it can be added without decoding again.
KALDI = FrontEnd("logmel", MEL_BINS, 0.0, kaldi_banks)


@dataclass(frozen=True)
class Stretches:
    """Which frames an audio encoder reads of a window; each stretch is a row of its batches.

    Attributes:
        first: first frame of each stretch, counted from the window's start; negative: before it.
        frames: how many frames each stretch has.
    """

    first: tuple[int, ...]
    frames: int


def cut(frames: KeptFrames, first: int, count: int, padding: float) -> Frames:
    """Frames [first, first + count) of [F, bins], `padding` where there is none -> [count, bins] float32."""
    row = np.full((count, frames.shape[1]), padding, np.float32)
    start, stop = max(first, 0), min(first + count, len(frames))
    if start < stop:
        row[start - first : stop - first] = frames[start:stop]
    return row
