"""The contract between encoders and their callers: what stage one and fine-tuning require of each encoder.

Audio front ends share one geometry: frame i starts at sample 160 i, at 16 kHz. They differ in how many samples a frame
covers and in what they compute from them. Each clip passes each required front end once, while it is decoded.

The centre of each token of an audio network follows from its geometry. A step is the mean of the tokens centred in it,
and its time is the mean of their centres.

The part of an encoder's name after `@` selects layers of a transformer. `@last` (default) is the network's output,
after its final normalisation where it has one. `@7` is the output of block 7, `@0` that of the embeddings; `@6-12` and
`@all` store several layers, on an axis of their own; `@mean` stores the mean of all. `pool=cls|pooler|mean` chooses how
tokens become one vector, as in `@6-12,pool=mean`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders.logmel import FRAME, HOP, MEL_BINS, RATE, FilterBank, kaldi_banks
from vaflow.encoders.preprocessing import Image, Preparation, Prepared
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
        weights: local weights, a file or a folder, instead of the published ones.
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
        banks: audio samples of `GROUP` frames -> [GROUP, bins] float32; see `FilterBank`.
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


def _rows(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples [n * 160] -> [n, 160] float32."""
    return samples.reshape(-1, HOP)


# The log-Mel stream of every cache: encoders that read it can be added to a cache without decoding.
KALDI = FrontEnd("logmel", MEL_BINS, 0.0, kaldi_banks)
WAVEFORM = FrontEnd("waveform", HOP, 0.0, _rows, HOP)  # 16 kHz mono, stored and sliced as any other frames


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


def cut(frames: FrameArray, first: int, count: int, padding: float) -> Frames:
    """Return frames [first, first + count) of [F, bins] as float32, with `padding` beyond either end."""
    row = np.full((count, frames.shape[1]), padding, np.float32)
    start, stop = max(first, 0), min(first + count, len(frames))
    if start < stop:
        row[start - first : stop - first] = frames[start:stop]
    return row


def whole_window(window: float) -> Segments:
    """Return one segment with all rows of a window of that many seconds.

    Raises:
        UsageError: the window is not a multiple of 10 ms.
    """
    frames = Fraction(str(window)) * RATE / HOP
    if frames.denominator != 1:
        raise UsageError(explain("--window must be a multiple of 0.01 s for this audio encoder", got=f"{window:g} s"))
    return Segments((0,), int(frames))


def samples_of(name: str, frames: torch.Tensor, window: float) -> torch.Tensor:
    """Rows [B, F, 160] of one window -> samples [B, F * 160] float32.

    Raises:
        ValueError: the rows have another shape.
    """
    expected = (whole_window(window).frames, HOP)
    if frames.ndim != 3 or tuple(frames.shape[1:]) != expected:
        raise ValueError(f"{name}: expected a waveform [B, {expected[0]}, {HOP}], got {tuple(frames.shape)}")
    return frames.float().flatten(1)


def standardised(samples: torch.Tensor) -> torch.Tensor:
    """[B, n] -> [B, n] with mean 0 and variance 1 per row, as Wav2Vec2FeatureExtractor computes it."""
    mean = samples.mean(dim=1, keepdim=True)
    variance = samples.var(dim=1, keepdim=True, correction=0)
    return (samples - mean) / (variance + 1e-7).sqrt()


@dataclass(frozen=True)
class TokenGrid:
    """Tokens at regular intervals.

    Attributes:
        first: seconds from the window's start to the centre of the first token.
        interval: seconds between two tokens.
        count: number of tokens.
        limit: seconds of input that the network accepts.
    """

    first: Fraction
    interval: Fraction
    count: int
    limit: Fraction

    def centre(self, token: int) -> Fraction:
        """Return the centre of a token, in seconds after the window's start."""
        return self.first + token * self.interval

    def times(self) -> NDArray[np.float64]:
        """Return [count] seconds after the window's start."""
        return np.array([float(self.centre(token)) for token in range(self.count)])

    def members(self, window: float, steps: int) -> list[list[int]]:
        """Return, for each step k, the tokens centred in [k, k + 1) * window / steps.

        Raises:
            UsageError: a step would have no token: more steps than tokens, or a window beyond the network's input.
        """
        step = Fraction(str(window)) / steps
        groups: list[list[int]] = [[] for _ in range(steps)]
        for token in range(self.count):
            if self.centre(token) < step * steps:
                groups[int(self.centre(token) / step)].append(token)
        empty = [k for k, tokens in enumerate(groups) if not tokens]
        if empty:
            raise UsageError(
                explain(
                    f"Audio step {empty[0]} of {steps} in a window of {window:g} s would have no token of the encoder",
                    expected=f"windows of at most about {float(self.limit):g} s, the encoder's input, and steps of at "
                    f"least {float(self.interval):g} s, the interval of its tokens",
                    got=f"{float(step):g} s per step",
                    remedy="Choose fewer --audio-steps or a shorter --window",
                )
            )
        return groups

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the mean centre of each step's tokens."""
        groups = self.members(window, steps)
        return np.array([float(sum(self.centre(t) for t in tokens) / len(tokens)) for tokens in groups])

    def pooling(self, window: float, steps: int) -> NDArray[np.float32]:
        """Return [steps, count] float32: the matrix that averages each step's tokens."""
        matrix = np.zeros((steps, self.count), np.float32)
        for step, tokens in enumerate(self.members(window, steps)):
            matrix[step, tokens] = 1 / len(tokens)
        return matrix


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


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context that an encoder's network runs in; float32 leaves the caller's context unchanged."""
    import torch

    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def recorded_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's identity as this version writes it; older ones also recorded the transformers version of `hf:`."""
    settings = identity.get("settings")
    if not isinstance(settings, Mapping):
        return dict(identity)
    return {**identity, "settings": {key: settings[key] for key in settings if key != "transformers_version"}}


def count_parameters(encoder: Any) -> int | None:
    """Return the number of parameters of an encoder's network; None where its library does not tell.

    An encoder whose network is not a torch module sets `parameter_count`.
    """
    count: int | None = getattr(encoder, "parameter_count", -1)
    return sum(parameter.numel() for parameter in encoder.module.parameters()) if count == -1 else count


POOLINGS = ("cls", "pooler", "mean")
WITH_LAYERS = re.compile(r"(hf|clip|ast|timm):.|(clip|ast)-|ast$")  # begins names of encoders that are transformers
_SUFFIX = re.compile(r"@(?:(last|mean|all|\d{1,3}(?:-\d{1,3})?)(?:,pool=(\w+))?|pool=(\w+))$")


@dataclass(frozen=True)
class LayerChoice:
    """The layers and the pooling that a name selects.

    Attributes:
        layers: "last", "mean", "all", "N" or "N-M".
        pooling: one of `POOLINGS`, or "" for the family's default.
    """

    layers: str = "last"
    pooling: str = ""

    @property
    def stacked(self) -> bool:
        """Whether several layers are stored, on an axis of their own."""
        return self.layers == "all" or len(set(self.layers.split("-"))) > 1

    def combine(self, states: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """Return the outputs of the chosen layers: their mean, or stacked along a new `axis`, or the only one."""
        import torch

        layers = torch.stack(list(states), dim=axis)
        if self.layers == "mean":
            return layers.mean(dim=axis)
        return layers if self.stacked else layers.select(axis, 0)

    def numbers(self, name: str, count: int) -> tuple[int, ...]:
        """Return the numbers of the layers, out of 0 to `count`; () for the network's output.

        Raises:
            UsageError: the network has no such layer.
        """
        if self.layers == "last":
            return ()
        if self.layers in ("all", "mean"):
            return tuple(range(count + 1))
        first, _, last = self.layers.partition("-")
        numbers = tuple(range(int(first), int(last or first) + 1))
        if not numbers or numbers[-1] > count:
            expected = f"@N or @N-M with layers 0 (embeddings) to {count}, or @last, @mean, @all"
            raise UsageError(explain(f"{name} has no such layer", expected=expected, got=f"@{self.layers}"))
        return numbers


def split_layers(name: str, source: str) -> tuple[str, LayerChoice]:
    """Split SOURCE[@LAYERS[,pool=POOLING]].

    Raises:
        UsageError: the pooling is unknown.
    """
    match = _SUFFIX.search(source)
    if match is None:
        return source, LayerChoice()
    pooling = match[2] or match[3] or ""
    if pooling and pooling not in POOLINGS:
        raise UsageError(explain(f"{name} names an unknown pooling", got=pooling, choices=POOLINGS))
    return source[: match.start()], LayerChoice(match[1] or "last", pooling)


def with_layers(name: str, layers: str) -> str:
    """Return an encoder's name with the layers of `--layers`.

    Names with layers of their own, and names that are no transformer's, are returned unchanged.

    Raises:
        UsageError: `layers` is not of the form that follows `@`.
    """
    if _SUFFIX.fullmatch(f"@{layers}") is None:
        problem = "--layers is not a choice of layers"
        raise UsageError(explain(problem, expected="N, N-M, last, mean or all", got=layers))
    return f"{name}@{layers}" if WITH_LAYERS.match(name) and _SUFFIX.search(name) is None else name
