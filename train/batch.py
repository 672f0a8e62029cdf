"""A batch of windows: inputs, targets and masks, and a model's predictions for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

VISUAL, AUDIO = "visual", "audio"


@dataclass(frozen=True)
class StreamSpec:
    """An input stream of a model.

    Attributes:
        name: of the stream.
        kind: `VISUAL` (one vector per output frame) or `AUDIO` (one per audio step).
        dim: width of a vector, over all its layers.
        frames_per_step: spectrogram frames that a CNN turns into one step; 0: each vector is a step.
        layers: encoder layers in a vector, end to end; the model learns their mixture.
    """

    name: str
    kind: str
    dim: int
    frames_per_step: int = 0
    layers: int = 1


CLASSES, BINARY = "classes", "binary"


@dataclass(frozen=True)
class TargetSpec:
    """A further target of a model, predicted for every frame.

    Attributes:
        name: of the stream of targets.
        task: `CLASSES` (one of several) or `BINARY` (any of several).
        names: of the classes or units.
    """

    name: str
    task: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class ExtraTargets:
    """Further targets of a batch, or of all windows of a split.

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

    Three masks: `inside` (not padding), `valid` (input present), `labelled` (annotated).

    Attributes:
        features: stream name -> [B, F, D] (visual) or [B, S, D] (audio), float32.
        valid: stream name -> [B, F] or [B, S] bool: input present; False at padding.
        feature_inside: stream name -> [B, F] or [B, S] bool: within the clip. False entries are a suffix.
        feature_time: stream name -> [B, F] or [B, S] float32 seconds after the window's start.
        inside: [B, F] bool: output frames within the clip. False entries are a suffix; the first is always True.
        time: [B, F] float32 seconds after the window's start, of the output frames.
        target: [B, F, 2] float32, 0 where not annotated.
        labelled: [B, F, 2] bool; only ever True inside.
        window: [B] int64, numbers of the windows in their split.
        extra: name -> further targets.
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
    """Predictions of a model for a batch.

    Attributes:
        va: [B, F, 2] in [-1, 1], valence and arousal.
        region_logits: [B, F, 9] scaled cosines to the prototypes, or None without a prompt head.
        extra: name -> logits of further targets, [B, F, K].
        log_std: [B, F, 2] logarithm of the standard deviation of `va`, or None without a variance head.
    """

    va: Tensor
    region_logits: Tensor | None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    log_std: Tensor | None = None

    def packed(self) -> Tensor:
        """Concatenate all predictions of a frame, [B, F, K]."""
        regions = [] if self.region_logits is None else [self.region_logits]
        spread = [] if self.log_std is None else [self.log_std]
        return torch.cat([self.va, *regions, *self.extra.values(), *spread], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor, *, regions: int, extra: Mapping[str, int], variance: bool = False) -> "Output":
        """Split the predictions in `packed`, [B, F, K].

        Args:
            packed: made by `packed`.
            regions: number of region logits, 0 without a prompt head.
            extra: name -> number of logits of each further target, in the model's order.
            variance: whether the model has a variance head.
        """
        va, logits, *others, log_std = packed.split([2, regions, *extra.values(), 2 * variance], dim=-1)
        logits_of = dict(zip(extra, others, strict=True))
        return cls(va, logits if regions else None, logits_of, log_std if variance else None)
