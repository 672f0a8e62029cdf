"""What stage one and fine-tuning ask of an encoder. One file per encoder; the package holds the dict of builders."""

from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

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
    """Kaldi log-Mel filter banks of one window -> a sequence of vectors.

    Attributes:
        kind: "audio".
        name: the stream's name.
        dim: length of each vector.
        identity: plain JSON of everything that changes the numbers.
        mel_bins: bins the encoder expects (128 for AST).
        module: the network, for fine-tuning.
    """

    kind: ClassVar[str]
    name: str
    dim: int
    identity: dict[str, Any]
    mel_bins: int
    module: torch.nn.Module

    def window_frames(self, window: float) -> int:
        """How many 10-ms log-Mel frames a window of that many seconds has before padding (998 for 10 s)."""
        ...

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """[steps] seconds after the window's start: the mean centre of the tokens pooled into each step."""
        ...

    def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, frames, mel_bins] float32, unnormalised -> [B, steps, dim] float32 on the encoder's device.

        Windows shorter than the model's input are padded with zeros before normalisation, as Hugging Face does.
        """
        ...
