"""The contract between encoders and their callers: what stage one and fine-tuning require of each encoder.

Audio front ends share one geometry: frame i starts at sample 160 i, at 16 kHz. They differ in how many samples a frame
covers and in what they compute from them. Each clip passes each required front end once, while it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders.images import Image, Preparation, Prepared
from vaflow.encoders.logmel import FRAME, HOP, MEL_BINS, RATE, FilterBank, kaldi_banks
from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    import torch

Frames = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """Input of every builder.

    Attributes:
        name: the encoder as typed; also the stream's name.
        source: what the name refers to within its family, such as MODEL/TAG or a model id.
        kind: "visual" or "audio": the option that named it; "" where only one is possible.
        weights: local weights instead of the published ones.
        device: "cpu", "cuda" or "cuda:N".
        precision: "float32", "bfloat16" or "float16".
    """

    name: str
    source: str = ""
    weights: Path | None = None
    device: str = "cpu"
    precision: str = "float32"
    kind: str = ""

    def refuse_weights(self, why: str) -> None:
        """Raise a UsageError if local weights were given to an encoder that cannot load them."""
        if self.weights is not None:
            raise UsageError(explain(f"{self.name} does not accept --weights: {why}", got=self.weights))

    def identity(self, settings: Mapping[str, Any], layers: tuple[int, ...] = ()) -> dict[str, Any]:
        """Return an encoder's identity: its settings, the stored layers, and the precision if it is not float32."""
        stored = {"layers": list(layers)} if layers else {}
        return {**settings, **stored, **({} if self.precision == "float32" else {"precision": self.precision})}


class FrameArray(Protocol):
    """Frames [F, bins] to slice: a NumPy array, or one whose rows are in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class FrontEnd:
    """A kind of filter bank, or the waveform itself.

    Attributes:
        name: as written in identities and messages.
        bins: width of a frame.
        padding: value of frames beyond the clip's ends.
        banks: audio samples of `logmel.GROUP` frames -> [GROUP, bins] float32; see `logmel.FilterBank`.
        frame: samples that a frame covers.
    """

    name: str
    bins: int
    padding: float
    banks: Callable[[Frames], Frames]
    frame: int = FRAME

    def open(self) -> FilterBank:
        """Return a filter bank for one clip."""
        return FilterBank(self.banks, self.bins, self.frame)


# The log-Mel stream of every cache: encoders that read it can be added to a cache without decoding.
KALDI = FrontEnd("logmel", MEL_BINS, 0.0, kaldi_banks)


@dataclass(frozen=True)
class Segments:
    """The frames of a window that an audio encoder reads; each segment is one row of its batches.

    Attributes:
        first: first frame of each segment, relative to the window's start; negative: before it.
        frames: length of each segment.
    """

    first: tuple[int, ...]
    frames: int


def step_centres(window: float, steps: int) -> list[Fraction]:
    """Return the centres of a window's steps, in seconds after its start."""
    return [Fraction(str(window)) * (2 * k + 1) / (2 * steps) for k in range(steps)]


def centred_examples(window: float, steps: int, half: Fraction, frames: int) -> Segments:
    """Return one segment per step, whose centre, `half` seconds after its start, is within 5 ms of the step's."""
    hop = Fraction(HOP, RATE)
    first = tuple(floor((time - half) / hop + Fraction(1, 2)) for time in step_centres(window, steps))
    return Segments(first, frames)


def cut(frames: FrameArray, first: int, count: int, padding: float) -> Frames:
    """Return frames [first, first + count) of [F, bins] as float32, with `padding` beyond either end."""
    row = np.full((count, frames.shape[1]), padding, np.float32)
    start, stop = max(first, 0), min(first + count, len(frames))
    if start < stop:
        row[start - first : stop - first] = frames[start:stop]
    return row


class VisualEncoder(Protocol):
    """Face crops -> one vector each.

    Attributes:
        kind: "visual".
        name: the stream's name.
        dim: length of the vector.
        layers: optional attribute: numbers of the layers, where each image has a vector of each; identity["layers"].
        image_size: edge of the square input in pixels.
        preparation: what `prepare` does, as a value that can be sent to a process without torch.
        identity: plain JSON of everything that changes the output (weights digest, preprocessing, activation ...).
        module: the network, for fine-tuning.
    """

    kind: ClassVar[str]
    name: str
    dim: int
    image_size: int
    preparation: Preparation
    identity: dict[str, Any]
    module: torch.nn.Module

    def prepare(self, image: Image) -> Prepared:
        """RGB [H, W, 3] uint8 of any size -> [image_size, image_size, 3], as the weights expect. CPU.

        Returns:
            uint8, or float32 in 0..1: `preparation.dtype`.
        """
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] prepared, on any device -> [B, dim] float32 on the encoder's device."""
        ...


class AudioEncoder(Protocol):
    """Front-end frames of one window -> a sequence of vectors.

    A window is read as one segment (AST: all of it) or as several of equal length (VGGish: one around every step). The
    output of a segment depends on nothing else, so segments that windows share are encoded once.

    Attributes:
        kind: "audio".
        name: the stream's name.
        dim: length of each vector.
        layers: optional attribute, as for images: the result is [B, steps / segments, layers, dim].
        identity: plain JSON of everything that changes the output.
        front_end: computes frames from audio samples. Encoders with `KALDI` read the cached log-Mel and can be added to
            a cache without decoding; the others need the audio again.
        module: the network, for fine-tuning.
    """

    kind: ClassVar[str]
    name: str
    dim: int
    identity: dict[str, Any]
    module: torch.nn.Module

    @property
    def front_end(self) -> FrontEnd:
        """Return the front end; may be a class constant."""
        ...

    def segments(self, window: float, steps: int) -> Segments:
        """Return the segments of a window of that many seconds; their number divides `steps`."""
        ...

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the centre of each step's input."""
        ...

    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, frames, bins] float32, one segment each, unnormalised -> [B, steps / segments, dim] float32.

        The result is on the encoder's device.
        """
        ...


def count_parameters(encoder: Any) -> int | None:
    """Return the number of parameters of an encoder's network; None where its library does not tell.

    An encoder whose network is not a torch module sets `parameter_count`.
    """
    count: int | None = getattr(encoder, "parameter_count", -1)
    return sum(parameter.numel() for parameter in encoder.module.parameters()) if count == -1 else count
