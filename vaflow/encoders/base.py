"""What stage one and fine-tuning ask of an encoder. One file per encoder; the package holds the dict of builders.

From sound to what an audio encoder reads: streaming filter banks, and which stretches of their frames.

All front ends share one geometry: frame i covers samples [160 i, 160 i + 400) at 16 kHz. They differ in what they make
of a frame. A clip's sound goes through each front end that is wanted once, while it is decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.images import Preparation
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


Image = NDArray[np.uint8]


class VisualEncoder(Protocol):
    """Face crops -> one vector each.

    Attributes:
        kind: "visual".
        name: the stream's name.
        dim: length of the vector.
        image_size: edge of the square input in pixels.
        preparation: what `prepare` does, as a value that can be sent to a process without torch.
        identity: plain JSON of everything that changes the numbers (weights digest, preprocessing, activation ...).
        module: the network, for fine-tuning.
    """

    kind: ClassVar[str]
    name: str
    dim: int
    image_size: int
    preparation: Preparation
    identity: dict[str, Any]
    module: torch.nn.Module

    def prepare(self, image: Image) -> Image:
        """RGB [H, W, 3] uint8 of any size -> [image_size, image_size, 3] uint8, as the weights expect. CPU."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8, prepared, on any device -> [B, dim] float32 on the encoder's device."""
        ...


class AudioEncoder(Protocol):
    """Filter-bank frames of one window -> a sequence of vectors.

    A window is read in one stretch (AST: all of it) or in several of equal length (VGGish: one around every step). A
    stretch depends on nothing else, so stretches that windows share are encoded once.

    Attributes:
        kind: "audio".
        name: the stream's name.
        dim: length of each vector.
        identity: plain JSON of everything that changes the numbers.
        front_end: what makes frames of sound. Encoders with `frontend.KALDI` read the cached log-Mel, and can be added
            to a cache without decoding; the others need the sound again.
        module: the network, for fine-tuning.
    """

    kind: ClassVar[str]
    name: str
    dim: int
    identity: dict[str, Any]
    module: torch.nn.Module

    @property
    def front_end(self) -> FrontEnd:
        """As above; a class's constant will do."""
        ...

    def stretches(self, window: float, steps: int) -> Stretches:
        """Which frames are read of a window of that many seconds; their number divides `steps`."""
        ...

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """[steps] seconds after the window's start: what each step is centred on."""
        ...

    def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, frames, bins] float32, a stretch each, unnormalised -> [B, steps / stretches, dim] float32.

        The result is on the encoder's device.
        """
        ...
