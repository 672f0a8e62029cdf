"""Use of audio by a run: its share of the fused features by condition, and the distribution of attention in time.

Attention is summed per bin of time, so that memory does not grow with the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.timeline import Bools, Floats, stitch
from vaflow.train.data import load_windows
from vaflow.train.evaluate import input_at_frames, predict_windows
from vaflow.train.groups import split_items
from vaflow.train.heads.fusion import Fusion, Track
from vaflow.train.metrics import region_of
from vaflow.train.runs import load_run
from vaflow.train.windows import WindowSet

# Seconds from a frame to an audio step, edges of the bins; negative: the step is earlier.
EDGES = np.array([-np.inf, -8, -4, -2, -1, -0.5, 0.5, 1, 2, 4, 8, np.inf])
NEAR = 1.0  # seconds


@dataclass(frozen=True)
class AttentionSummary:
    """Mean attention of the frames to one audio stream; shares are of the attention mass.

    Attributes:
        stream: name of the audio stream.
        frames: counted; a frame of several windows counts in each.
        shares: [H, B] per head and time bin; uniform: [B] if every step were attended alike.
        near, before, after: share within `NEAR` seconds, before and after the frame (beyond `NEAR`), mean of the heads.
        distance: mean seconds between frame and step.
        entropy: mean entropy divided by that of attending every step alike, per head [H]; 1: uniform, 0: one step.
        masked: share on steps without audio.
        no_face: `near` of the frames without a face; None where every frame has one.
        edges: [B + 1] of the time bins, seconds.
    """

    stream: str
    frames: int
    shares: Floats
    uniform: Floats
    near: float
    before: float
    after: float
    distance: float
    entropy: Floats
    masked: float
    no_face: float | None = None
    edges: Floats = field(default_factory=lambda: EDGES)


class AttentionSums:
    """Sums over the frames of one audio stream; `mass` is [H, B], `uniform` [B], `entropy` [H]."""

    def __init__(self, heads: int) -> None:
        bins = len(EDGES) - 1
        self.mass, self.uniform, self.entropy = np.zeros((heads, bins)), np.zeros(bins), np.zeros(heads)
        self.near, self.faceless = np.zeros(3), np.zeros(2)  # before, near, after; mass near, frames
        self.distance = self.masked = 0.0
        self.frames = 0

    def add(self, weights: Tensor, time: Tensor, track: Track, counted: Tensor, face: Tensor) -> None:
        """Add windows: weights [B, H, F, S], time [B, F] of the frames, counted and face [B, F] bool."""
        counted = counted & track.present[:, None]
        if not counted.any():
            return
        window, frame = counted.nonzero(as_tuple=True)
        w = weights.transpose(1, 2)[window, frame].double()  # [N, H, S]
        key, inside = track.key[window], track.inside[window]
        offset = track.time[window].double() - time[window, frame, None].double()  # [N, S]
        bins = torch.bucketize(offset, torch.from_numpy(EDGES[1:-1]).to(offset))
        one_hot = nn.functional.one_hot(bins, len(EDGES) - 1).double() * inside[..., None]
        self.mass += torch.einsum("nhs,nsb->hb", w, one_hot).numpy()
        steps = key.sum(dim=1, keepdim=True)
        self.uniform += torch.einsum("ns,nsb->b", key.double() / steps, one_hot).numpy()
        entropy = -torch.special.xlogy(w, w).sum(dim=-1)
        self.entropy += (entropy / torch.log(steps.clamp(min=2))).sum(dim=0).numpy()
        mean = w.mean(dim=1)
        sides = [offset < -NEAR, offset.abs() <= NEAR, offset > NEAR]
        self.near += np.array([float((mean * side).sum()) for side in sides])
        self.distance += float((mean * offset.abs() * inside).sum())
        self.masked += float((mean * ~key).sum())
        self.frames += len(window)
        faceless = ~face[window, frame]
        self.faceless += np.array([float((mean * sides[1])[faceless].sum()), float(faceless.sum())])

    def summary(self, stream: str) -> AttentionSummary:
        """Means over the frames; at least one was added."""
        n = self.frames
        before, near, after = (self.near / n).tolist()
        no_face = float(self.faceless[0] / self.faceless[1]) if self.faceless[1] else None
        means = self.mass / n, self.uniform / n, near, before, after, self.distance / n, self.entropy / n
        return AttentionSummary(stream, n, *means, self.masked / n, no_face)


class AttentionRecorder:
    """Collects the attention of a fusion while its model predicts, as a hook of `register_forward_pre_hook`."""

    def __init__(self, fusion: Fusion, streams: Sequence[str]) -> None:
        self.sums = [AttentionSums(attend.attention.num_heads) for attend in fusion.attends or ()]  # type: ignore
        self.streams = tuple(streams)
        self.inside: Tensor | None = None  # [B, F] frames of the batch, set by the hook of the whole model
        self.face: Tensor | None = None

    def __call__(self, fusion: Fusion, arguments: tuple[Any, ...]) -> None:
        """Attend once more with weights, and add them."""
        visual, time, audio = arguments
        query, keys = fusion.attention_inputs(visual, time, audio)
        inside = torch.ones_like(time, dtype=torch.bool) if self.inside is None else self.inside
        face = inside if self.face is None else self.face
        for sums, attend, key, track in zip(self.sums, fusion.attends or (), keys, audio, strict=True):
            ignored = ~track.key & track.present.unsqueeze(1)
            _, weights = attend.attention(  # type: ignore[operator]
                query, key, track.value, key_padding_mask=ignored, need_weights=True, average_attn_weights=False
            )
            sums.add(weights, time, track, inside, face)

    def batch_hook(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Hook of the whole model: store which frames the batch has, and which have a visual input."""
        (batch,) = arguments
        self.inside = batch.inside
        visual = [s.name for s in model.streams if s.kind == "visual"]  # type: ignore[union-attr]
        self.face = torch.stack([batch.valid[name] for name in visual]).any(dim=0) & batch.inside

    def summaries(self) -> list[AttentionSummary]:
        """Return the attention to each audio stream that at least one frame attended to."""
        return [sums.summary(name) for sums, name in zip(self.sums, self.streams, strict=True) if sums.frames]


@dataclass(frozen=True)
class GateShare:
    """Mean and 10th to 90th percentile of the gate over the frames of one condition."""

    condition: str
    frames: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FusionStatistics:
    """Statistics of a run's fusion on a split.

    Attributes:
        gates: the gate's mean over the features, at every frame with audio, by condition: 1 means that the fused
            features are the audio's, 0 the visual ones. Empty for runs without a gate.
        attention: per audio stream; empty for runs without cross-modal attention.
    """

    gates: tuple[GateShare, ...] = ()
    attention: tuple[AttentionSummary, ...] = ()


def fusion_statistics(run: Path, cache: Cache, split: str, centers: float) -> FusionStatistics:
    """Predict a split once more and return how its fusion uses the audio.

    Empty for runs without a fusion or with encoders of their own.

    Raises:
        VaflowError: the run or the cache cannot be read.
    """
    loaded = load_run(run)
    fusion = loaded.model.fusion
    if fusion is None or loaded.record.tuned:
        return FusionStatistics()
    items = split_items(cache, split, loaded.record.config.fold_splits, loaded.record.config.fold_groups)
    windows = load_windows(cache, items, loaded.record.head_streams, loaded.record.config)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(torch.sigmoid(output).mean(dim=-1, keepdim=True))

    hooks = [] if fusion.gate is None else [fusion.gate.register_forward_hook(keep)]
    recorder = None
    if fusion.attends is not None:
        recorder = AttentionRecorder(fusion, [s.name for s in loaded.model.streams if s.kind != "visual"])
        hooks += [
            loaded.model.register_forward_pre_hook(recorder.batch_hook),
            fusion.register_forward_pre_hook(recorder),
        ]
    try:
        predict_windows(loaded.model, windows)
    finally:
        for hook in hooks:
            hook.remove()
    attention = () if recorder is None else tuple(recorder.summaries())
    gates = gate_shares(windows, torch.cat(outputs).numpy().astype(np.float64), centers) if outputs else []
    return FusionStatistics(tuple(gates), attention)


def gate_shares(windows: WindowSet, gate: Floats, centers: float) -> list[GateShare]:
    """Summarize the gate of every window, [W, F, 1], by condition."""
    values, faces, regions = [], [], []
    for clip in windows.clips:
        rows = slice(clip.first, clip.last)
        inside = windows.inside_array[rows]
        has_audio = input_at_frames(windows, clip, "audio")
        if not inside.any() or not has_audio.any():
            continue
        values.append(stitch(windows.sample_time[rows], gate[rows], inside, clip.time)[has_audio, 0])
        faces.append(input_at_frames(windows, clip, "visual")[has_audio])
        labelled = clip.valid.all(axis=1)
        regions.append(np.where(labelled, region_of(np.nan_to_num(clip.value), centers), -1)[has_audio])
    if not values:
        return []
    value, face, region = (np.concatenate(x) for x in (values, faces, regions))
    conditions: list[tuple[str, Bools]] = [("all frames with audio", np.ones(len(value), bool))]
    conditions += [("with a face", face), ("without a face", ~face)]
    conditions += [(f"label: {name}", region == r) for r, name in enumerate(REGION_NAMES)]
    return [_summary(name, value[mask]) for name, mask in conditions if mask.any()]


def _summary(condition: str, value: Floats) -> GateShare:
    low, high = np.quantile(value, (0.1, 0.9))
    return GateShare(condition, len(value), float(value.mean()), float(low), float(high))
