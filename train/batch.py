"""A batch of windows: inputs, targets and masks, and a model's predictions for it; modality dropout.

Further targets, such as expression classes and action units, are read, trained and scored here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats

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

    def map(self, function: Callable[[Tensor], Tensor]) -> "ExtraTargets":
        """The targets with another tensor for each of theirs."""
        return ExtraTargets(self.task, function(self.value), function(self.labelled))


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


@dataclass(frozen=True)
class ExtraRows:
    """A clip's further targets with their own times: time [R] seconds, value [R, K] in [0, 1], valid [R, K]."""

    spec: TargetSpec
    time: Floats
    value: Floats
    valid: Bools


def target_specs(cache: Cache, names: Sequence[str]) -> tuple[TargetSpec, ...]:
    """The streams of targets of those names.

    Raises:
        UsageError: the cache has no such stream of targets, or its metadata lacks the columns.
    """
    known = {name: info for name, info in cache.streams().items() if info.kind == "targets"}
    specs = []
    for name in names:
        if name not in known:
            remedy = f"`vaflow cache targets CACHE --stream {name} --task classes --from DIR` makes one"
            raise UsageError(explain("The cache has no such targets", got=name, choices=known, remedy=remedy))
        identity = known[name].identity
        if identity.get("task") not in (CLASSES, BINARY) or not identity.get("names"):
            raise UsageError(explain(f"Stream {name!r} has no description of its targets", got=identity))
        specs.append(TargetSpec(name, str(identity["task"]), tuple(map(str, identity["names"]))))
    return tuple(specs)


def read_rows(cache: Cache, spec: TargetSpec, item: str) -> ExtraRows:
    """Targets of a clip; no rows where it has none."""
    if not cache.has(spec.name, item):
        nothing = np.zeros((0, len(spec.names)))
        return ExtraRows(spec, np.zeros(0), nothing, nothing.astype(bool))
    data = cache.read(spec.name, item)
    return ExtraRows(spec, data.time, np.where(data.valid, data.value, 0).astype(np.float64), data.valid)


def extra_loss(logits: Tensor, targets: ExtraTargets) -> Tensor:
    """Cross-entropy of classes, binary cross-entropy of the others, of logits [B, F, K]; the mean over annotated cells.

    A scalar >= 0; 0 with zero gradient where nothing is annotated.

    Raises:
        ValueError: shapes disagree.
    """
    if logits.shape != targets.value.shape:
        raise ValueError(f"extra_loss: logits {[*logits.shape]} for targets {[*targets.value.shape]}")
    logits = torch.where(targets.labelled, logits, 0)
    if targets.task == CLASSES:
        mask = targets.labelled.all(dim=-1)
        parts = -(targets.value * functional.log_softmax(logits, dim=-1)).sum(dim=-1)
    else:
        mask = targets.labelled
        parts = functional.binary_cross_entropy_with_logits(logits, targets.value, reduction="none")
    return torch.where(mask, parts, 0).sum() / mask.sum().clamp(min=1)


def probabilities(logits: Tensor, task: str) -> Tensor:
    """[..., K] -> [..., K] in [0, 1]; those of classes sum to 1."""
    return logits.softmax(dim=-1) if task == CLASSES else logits.sigmoid()


def extra_scores(pairs: Mapping[str, Sequence[tuple[ExtraRows, Floats]]]) -> dict[str, Any]:
    """Metrics of further targets, as defined by the ABAW challenges.

    Args:
        pairs: name -> per clip its targets and the probabilities [R, K] that the model gives at their times.

    Returns:
        name -> {"task", "n_frames", "f1" (per class or unit; None where it never occurs), "macro_f1" (their mean),
        "accuracy" (classes: the likeliest is the annotated one; units: over all annotated cells)}.
    """
    scores = {}
    for name, clips in pairs.items():
        spec = clips[0][0].spec
        probability = np.concatenate([values for _, values in clips])
        truth = np.concatenate([rows.value for rows, _ in clips])
        valid = np.concatenate([rows.valid for rows, _ in clips])
        if spec.task == CLASSES:
            annotated = valid.all(axis=1)
            chosen, label = probability[annotated].argmax(axis=1), truth[annotated].argmax(axis=1)
            columns = np.arange(len(spec.names))
            predicted, actual = chosen[:, None] == columns, label[:, None] == columns
            frames, right = len(label), chosen == label
        else:
            predicted, actual = (probability >= 0.5) & valid, (truth >= 0.5) & valid
            frames, right = int(valid.any(axis=1).sum()), (predicted == actual)[valid]
        hits = (predicted & actual).sum(axis=0).tolist()
        totals = (predicted.sum(axis=0) + actual.sum(axis=0)).tolist()
        present = actual.any(axis=0).tolist()
        f1 = [2 * hit / total if occurs else None for hit, total, occurs in zip(hits, totals, present, strict=True)]
        known = [value for value in f1 if value is not None]
        scores[name] = {
            "task": spec.task,
            "n_frames": frames,
            "f1": dict(zip(spec.names, f1, strict=True)),
            "macro_f1": float(np.mean(known)) if known else None,
            "accuracy": float(right.mean()) if right.size else None,
        }
    return scores


def drop_modality(
    batch: Batch, streams: Sequence[StreamSpec], share: float, generator: torch.Generator | None = None
) -> Batch:
    """Mark all streams of one modality as missing in about `share` of the windows, never both modalities.

    The windows and the modality (each with equal probability) follow from torch's generator.

    Args:
        share: probability that a window loses a modality, in [0, 1).
        generator: of random numbers, on the device; None: torch's own.

    Returns:
        The batch with other `valid` masks; the batch itself where the model reads one modality only.
    """
    if not share or {stream.kind for stream in streams} != {VISUAL, AUDIO}:
        return batch
    draw = torch.rand(len(batch.inside), device=batch.inside.device, generator=generator)
    lost = {VISUAL: draw < share / 2, AUDIO: (draw >= share / 2) & (draw < share)}
    valid = {stream.name: batch.valid[stream.name] & ~lost[stream.kind].unsqueeze(1) for stream in streams}
    return replace(batch, valid={**batch.valid, **valid})
