"""What stage one and fine-tuning ask of an encoder. One file per encoder; the package holds the dict of builders."""

from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.frontend import FrontEnd, Stretches
from vaflow.encoders.images import Preparation

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
