"""Fusion: combine one visual sequence H_v with the audio sequences H_a into F_fused.

Several audio streams: `attention`, `gated` and `hierarchical` average the streams that have a valid step in the window;
the concatenating variants keep each stream apart. A stream without a valid step contributes nothing: F_fused = H_v if
no stream has one, and its part of a concatenation is zero.

Source: arXiv 2603.13415, eq. 3-5 and table 2; `attention-concat` is arXiv 2503.10523's; `positions` is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.errors import UsageError, explain
from vaflow.train.heads.temporal import Sinusoids

POSITIONS = ("none", "time")
TIME_UNIT = 0.1  # seconds; the shortest wavelength is 2 pi of these, about the interval of frames in a window


@dataclass(frozen=True)
class Track:
    """One audio stream after its temporal model.

    Attributes:
        value: [B, S, H], H_a; zeros at padding.
        time: [B, S] seconds after the window's start, ascending.
        inside: [B, S] bool: not padding; False entries at the end.
        key: [B, S] bool: inside and with audio samples, so that it may be attended.
    """

    value: Tensor
    time: Tensor
    inside: Tensor
    key: Tensor

    @property
    def present(self) -> Tensor:
        """[B] bool: at least one step may be attended."""
        return self.key.any(dim=1)


def interpolate(sequence: Tensor, from_time: Tensor, to_time: Tensor, inside: Tensor) -> Tensor:
    """Interpolate linearly in time, held before the first and after the last step, like `numpy.interp` per row.

    Args:
        sequence: [B, S, H].
        from_time: [B, S] seconds of its steps, ascending where inside.
        to_time: [B, F] seconds of the output.
        inside: [B, S] bool: steps to use; False entries at the end.

    Returns:
        [B, F, H]; zeros for rows without a step inside.

    Raises:
        ValueError: shapes disagree.
    """
    if (
        sequence.shape[:2] != from_time.shape
        or from_time.shape != inside.shape
        or to_time.shape[:1] != inside.shape[:1]
    ):
        raise ValueError(
            "interpolate: expected [B, S, H], [B, S], [B, F] and [B, S]; "
            f"got {[*sequence.shape]}, {[*from_time.shape]}, {[*to_time.shape]} and {[*inside.shape]}"
        )
    last = (inside.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    passed = ((from_time.unsqueeze(1) <= to_time.unsqueeze(2)) & inside.unsqueeze(1)).sum(dim=2)  # [B, F]
    before, after = (passed - 1).clamp(min=0), torch.minimum(passed, last)
    start, end = from_time.gather(1, before), from_time.gather(1, after)
    gap = end - start
    share = torch.where(gap > 0, (to_time - start) / torch.where(gap > 0, gap, 1), 0).unsqueeze(-1)
    wide = (-1, -1, sequence.shape[2])
    low = sequence.gather(1, before.unsqueeze(-1).expand(wide))
    high = sequence.gather(1, after.unsqueeze(-1).expand(wide))
    return torch.where(inside.any(dim=1)[:, None, None], low + share * (high - low), 0)


class CrossAttention(nn.Module):
    """F_attn = Attention(Q = H_v, K = H_a, V = H_a) (eq. 3): several heads, no residual, no norm."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)

    def forward(self, query: Tensor, keys: Tensor, track: Track) -> Tensor:
        """Attend a track: query [B, F, H], keys [B, S, H] -> [B, F, H]; zeros for rows without a key."""
        present = track.present
        # A softmax over no keys is NaN (some kernels hide it): such rows attend every step and are zeroed below.
        allowed = track.key | ~present.unsqueeze(1)
        weights = self.attention
        inputs = zip(
            (query, keys, track.value), weights.in_proj_weight.chunk(3), weights.in_proj_bias.chunk(3), strict=True
        )
        q, k, v = (functional.linear(*three).unflatten(-1, (weights.num_heads, -1)).transpose(1, 2) for three in inputs)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None, None])
        return weights.out_proj(mixed.transpose(1, 2).flatten(2)) * present[:, None, None]


class Fusion(nn.Module):
    """Fuse H_v with audio tracks, which come to the frames by attention or interpolation.

    Args:
        hidden: width H of every sequence.
        audio_streams: number of tracks, at least one.
        attend: align tracks with the frames by cross-modal attention (eq. 3), else by interpolation in time.
        join: "replace" (F_fused is the aligned audio), "gate" (eq. 4-5) or "concat" (beside H_v).
        heads: attention heads.
        positions: "none" (as published) or "time": add sinusoids of the true times to queries and keys. Values stay
            as they are. Has no effect without attention.

    Attributes:
        width: of F_fused.

    Raises:
        UsageError: `hidden` is not a multiple of `heads`, there is no audio stream, or `positions` is unknown.
    """

    def __init__(
        self, hidden: int, audio_streams: int = 1, *, attend: bool, join: str, heads: int = 4, positions: str = "none"
    ) -> None:
        super().__init__()
        if audio_streams < 1:
            raise UsageError(explain("Fusion needs audio", expected="at least one audio stream", got=audio_streams))
        if positions not in POSITIONS:
            raise UsageError(explain("Unknown attention_positions", got=positions, choices=POSITIONS))
        if attend and hidden % heads:
            raise UsageError(explain(f"hidden ({hidden}) must be divisible by attention_heads ({heads})"))
        self.join = join
        # The attribute name is part of the names of saved weights.
        self.attends = nn.ModuleList(CrossAttention(hidden, heads) for _ in range(audio_streams)) if attend else None
        self.audio_streams = audio_streams
        self.gate = nn.Linear(2 * hidden, hidden) if join == "gate" else None
        self.positions = Sinusoids(hidden, TIME_UNIT) if attend and positions == "time" else None
        self.width = hidden * (1 + audio_streams) if join == "concat" else hidden

    def forward(self, visual: Tensor, time: Tensor, audio: Sequence[Track]) -> Tensor:
        """Fuse.

        Args:
            visual: [B, F, H], H_v.
            time: [B, F] seconds of the frames.
            audio: one track per audio stream.

        Returns:
            [B, F, width], F_fused.

        Raises:
            ValueError: the number of tracks or their shapes disagree.
        """
        if len(audio) != self.audio_streams:
            raise ValueError(f"fusion: expected {self.audio_streams} audio streams; got {len(audio)}")
        for track in audio:
            check_track(visual, track)
        if self.attends is None:
            aligned = [resample(time, track) for track in audio]
        else:
            query, keys = self.attention_inputs(visual, time, audio)
            aligned = [attend(query, k, track) for attend, k, track in zip(self.attends, keys, audio, strict=True)]
        if self.join == "concat":
            return torch.cat([visual, *aligned], dim=-1)
        mean, present = aligned[0], audio[0].present[:, None, None]
        if len(audio) > 1:
            streams = torch.stack([track.present for track in audio]).sum(dim=0)[:, None, None]
            mean, present = torch.stack(aligned).sum(dim=0) / streams.clamp(min=1), streams > 0
        if self.gate is None:
            return torch.where(present, mean, visual)
        gate = torch.sigmoid(self.gate(torch.cat([mean, visual], dim=-1)))  # eq. 4
        return torch.lerp(visual, mean, gate * present)  # eq. 5

    def attention_inputs(self, visual: Tensor, time: Tensor, audio: Sequence[Track]) -> tuple[Tensor, list[Tensor]]:
        """Queries [B, F, H], and keys [B, S, H] of every track, with their positions."""
        keys = [track.value for track in audio]
        if self.positions is None:
            return visual, keys
        times = [torch.where(track.inside, track.time, 0) for track in audio]
        located = [key + self.positions(t).to(key) for key, t in zip(keys, times, strict=True)]
        return visual + self.positions(time).to(visual), located


def resample(time: Tensor, track: Track) -> Tensor:
    """A track [B, S, H] at the frame times [B, F] -> [B, F, H]; zeros for rows without any key."""
    value = interpolate(track.value, track.time, time, track.inside)
    return torch.where(track.present[:, None, None], value, 0)


def check_track(visual: Tensor, track: Track) -> None:
    """Raise ValueError, naming the shapes, unless H_v [B, F, H] and the track [B, S, H] fit."""
    shape = track.value.shape
    if visual.ndim != 3 or len(shape) != 3 or (visual.shape[0], visual.shape[2]) != (shape[0], shape[2]):
        raise ValueError(f"fusion: expected H_v [B, F, H] and H_a [B, S, H]; got {[*visual.shape]} and {[*shape]}")
    for name in ("time", "inside", "key"):
        got = getattr(track, name).shape
        if got != shape[:2]:
            raise ValueError(f"fusion: a track's {name} must be {[*shape[:2]]} as its values; got {[*got]}")


FUSION: Mapping[str, Callable[..., Fusion]] = {
    "attention": partial(Fusion, attend=True, join="replace"),
    "gated": partial(Fusion, attend=False, join="gate"),
    "hierarchical": partial(Fusion, attend=True, join="gate"),
    "concat": partial(Fusion, attend=False, join="concat"),
    "attention-concat": partial(Fusion, attend=True, join="concat"),
}
