"""One batch of windows, as the model and the losses see it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

VISUAL, AUDIO = "visual", "audio"


@dataclass(frozen=True)
class StreamSpec:
    """A stream that the model reads.

    Attributes:
        name: of the stream.
        kind: `VISUAL` (one vector per frame) or `AUDIO` (per step).
        dim: width of a vector.
        frames_per_step: of a spectrogram, how many of its frames a CNN makes one step of; 0: vectors are steps.
    """

    name: str
    kind: str
    dim: int
    frames_per_step: int = 0


CLASSES, BINARY = "classes", "binary"


@dataclass(frozen=True)
class TargetSpec:
    """What else a model learns to say of every frame.

    Attributes:
        name: of the stream of targets.
        task: `CLASSES` (one of several) or `BINARY` (each or not).
        names: of the classes, or of what is there or not.
    """

    name: str
    task: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class ExtraTargets:
    """Targets of a batch, or of all windows of a split.

    Attributes:
        task: `CLASSES` or `BINARY`.
        value: [N, F, K] float32 in [0, 1], 0 where not annotated.
        labelled: [N, F, K] bool; only ever True inside the clip.
    """

    task: str
    value: Tensor
    labelled: Tensor


@dataclass(frozen=True)
class Batch:
    """B windows with F frames each; every audio stream has its own number of steps S.

    The three masks are never mixed: `inside` (not padding), `valid` (input present), `labelled` (annotated).

    Attributes:
        features: stream name -> [B, F, D] (visual) or [B, S, D] (audio), float32.
        valid: stream name -> [B, F] or [B, S] bool: the input is there. False where padded, too.
        feature_inside: stream name -> [B, F] or [B, S] bool: within the clip. False entries are a suffix.
        feature_time: stream name -> [B, F] or [B, S] float32 seconds after the window's start.
        inside: [B, F] bool: output frames within the clip. False entries are a suffix; the first is always True.
        time: [B, F] float32 seconds after the window's start, of the output frames.
        target: [B, F, 2] float32, 0 where not annotated.
        labelled: [B, F, 2] bool; only ever True inside.
        window: [B] int64 which window of the split this is.
        extra: name -> further targets of the frames.
    """

    features: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    feature_inside: Mapping[str, Tensor]
    feature_time: Mapping[str, Tensor]
    inside: Tensor
    time: Tensor
    target: Tensor
    labelled: Tensor
    window: Tensor
    extra: Mapping[str, ExtraTargets] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What the model says.

    Attributes:
        va: [B, F, 2] in [-1, 1], valence and arousal.
        region_logits: [B, F, 9] scaled cosines to the prototypes, or None without a prompt head.
        extra: name -> logits of further targets, [B, F, K].
    """

    va: Tensor
    region_logits: Tensor | None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
