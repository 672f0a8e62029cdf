"""Further targets of a run, such as expression classes and action units: reading, losses and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.timeline import Bools, Floats
from vaflow.train.batch import BINARY, CLASSES, ExtraTargets, TargetSpec


@dataclass(frozen=True)
class ExtraRows:
    """A clip's further targets on a clock of their own: time [R] seconds, value [R, K] in [0, 1], valid [R, K]."""

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
    found = []
    for name in names:
        if name not in known:
            remedy = f"`vaflow cache targets CACHE --stream {name} --task classes --from DIR` makes one"
            raise UsageError(explain("The cache has no such targets", got=name, choices=known, remedy=remedy))
        said = known[name].identity
        if said.get("task") not in (CLASSES, BINARY) or not said.get("names"):
            raise UsageError(explain(f"Stream {name!r} has no description of its targets", got=said))
        found.append(TargetSpec(name, str(said["task"]), tuple(map(str, said["names"]))))
    return tuple(found)


def read_rows(cache: Cache, spec: TargetSpec, item: str) -> ExtraRows:
    """Targets of a clip; no rows where it has none."""
    if not cache.has(spec.name, item):
        nothing = np.zeros((0, len(spec.names)))
        return ExtraRows(spec, np.zeros(0), nothing, nothing.astype(bool))
    data = cache.read(spec.name, item)
    return ExtraRows(spec, data.time, np.where(data.valid, data.value, 0).astype(np.float64), data.valid)


def extra_loss(logits: Tensor, targets: ExtraTargets) -> Tensor:
    """Cross-entropy of classes, binary cross-entropy of the others; the mean over what is annotated.

    Args:
        logits: [B, F, K].
        targets: of the same frames.

    Returns:
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
    """Metrics of further targets, as the ABAW challenges have them.

    Args:
        pairs: name -> per clip its targets and the probabilities [R, K] that the model gives at their times.

    Returns:
        name -> {"task", "n_frames", "f1" (per class or unit; None where it is never annotated as there), "macro_f1"
        (their mean), "accuracy" (of classes: the likeliest is the annotated one; of units: of all annotated cells)}.
    """
    found = {}
    for name, clips in pairs.items():
        spec = clips[0][0].spec
        said = np.concatenate([chances for _, chances in clips])
        truth = np.concatenate([rows.value for rows, _ in clips])
        valid = np.concatenate([rows.valid for rows, _ in clips])
        found[name] = {"task": spec.task} | _scores(spec, said, truth, valid)
    return found


def _scores(spec: TargetSpec, said: Floats, truth: Floats, valid: Bools) -> dict[str, Any]:
    if spec.task == CLASSES:
        there = valid.all(axis=1)
        chosen, label = said[there].argmax(axis=1), truth[there].argmax(axis=1)
        columns = np.arange(len(spec.names))
        says, is_so = chosen[:, None] == columns, label[:, None] == columns
        frames, right = len(label), chosen == label
    else:
        says, is_so = (said >= 0.5) & valid, (truth >= 0.5) & valid
        frames, right = int(valid.any(axis=1).sum()), (says == is_so)[valid]
    hits, times = (says & is_so).sum(axis=0), says.sum(axis=0) + is_so.sum(axis=0)
    present = is_so.any(axis=0)
    f1 = [2 * int(h) / int(n) if there else None for h, n, there in zip(hits, times, present, strict=True)]
    known = [value for value in f1 if value is not None]
    return {
        "n_frames": frames,
        "f1": dict(zip(spec.names, f1, strict=True)),
        "macro_f1": float(np.mean(known)) if known else None,
        "accuracy": float(right.mean()) if right.size else None,
    }
