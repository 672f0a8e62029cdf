"""How the frames of a run attend to its audio: where the mass of the cross-modal attention lies in time.

Sums are kept per bin of time, so that memory does not grow with the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.timeline import Floats
from vaflow.train.heads.fusion import Fusion, Track

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


@dataclass
class AttentionSums:
    """Sums over the frames of one audio stream; `mass` is [H, B], `uniform` [B], `entropy` [H]."""

    heads: int
    mass: Floats = field(init=False)
    uniform: Floats = field(default_factory=lambda: np.zeros(len(EDGES) - 1))
    entropy: Floats = field(init=False)
    near: Floats = field(default_factory=lambda: np.zeros(3))  # before, near, after
    distance: float = 0.0
    masked: float = 0.0
    frames: int = 0
    faceless: Floats = field(default_factory=lambda: np.zeros(2))  # mass near, frames

    def __post_init__(self) -> None:
        self.mass = np.zeros((self.heads, len(EDGES) - 1))
        self.entropy = np.zeros(self.heads)

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
    """Collects the attention of a fusion while its model predicts; use it as the hook of `register_forward_pre_hook`.

    Args:
        fusion: a fusion with cross-modal attention.
        streams: names of its audio streams.
    """

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
        """Hook of the whole model: note which frames the batch has, and which have a visual input."""
        (batch,) = arguments
        self.inside = batch.inside
        visual = [s.name for s in model.streams if s.kind == "visual"]  # type: ignore[union-attr]
        self.face = torch.stack([batch.valid[name] for name in visual]).any(dim=0) & batch.inside

    def summaries(self) -> list[AttentionSummary]:
        """One per audio stream that some frame attended."""
        return [sums.summary(name) for sums, name in zip(self.sums, self.streams, strict=True) if sums.frames]
