"""How hearing joins seeing: one visual sequence H_v and any number of audio sequences H_a -> F_fused.

Source: arXiv 2603.13415, eq. 3-5 and table 2; `attention-concat` is arXiv 2503.10523's. With several audio streams:
where the result has room for one (attention, gated, hierarchical), it is the mean over the streams that have a valid
step in that window; the concatenating variants keep each stream apart. A stream without any valid step in a window
says nothing there: with no stream left F_fused = H_v, and its part of a concatenation is zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vaflow.errors import UsageError, explain


@dataclass(frozen=True)
class Track:
    """One audio stream after its temporal model.

    Attributes:
        value: [B, S, H], H_a; zeros at padding.
        time: [B, S] seconds after the window's start, ascending.
        inside: [B, S] bool: not padding; False entries at the end.
        key: [B, S] bool: may be attended: inside, and with sound data under it.
    """

    value: Tensor
    time: Tensor
    inside: Tensor
    key: Tensor

    @property
    def present(self) -> Tensor:
        """[B] bool: there is a step to attend."""
        return self.key.any(dim=1)


def interpolate(sequence: Tensor, from_time: Tensor, to_time: Tensor, inside: Tensor) -> Tensor:
    """Linear in time between steps, held before the first and after the last; `numpy.interp` for every row.

    Args:
        sequence: [B, S, H].
        from_time: [B, S] seconds of its steps, ascending where inside.
        to_time: [B, F] seconds at which it is wanted.
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


class Attend(nn.Module):
    """F_attn = Attention(Q = H_v, K = H_a, V = H_a) (eq. 3): several heads, no residual, no norm."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)

    def forward(self, visual: Tensor, track: Track) -> Tensor:
        """visual [B, F, H] asks a track [B, S, H] -> [B, F, H]; zeros for rows without any key."""
        present = track.present
        # A softmax over no key at all is NaN (some kernels hide it): such rows attend to all and are then dropped.
        hidden = ~track.key & present.unsqueeze(1)
        answer, _ = self.attention(visual, track.value, track.value, key_padding_mask=hidden, need_weights=False)
        return torch.where(present[:, None, None], answer, 0)


class Fusion(nn.Module):
    """All five variants: how audio comes to the frames (attention or resampling), and how it joins H_v.

    Args:
        hidden: width H of every sequence.
        audio_streams: how many tracks there will be, at least one.
        attend: bring tracks to the frames by cross-modal attention (eq. 3), else by interpolation in time.
        join: "replace" (F_fused is what came), "gate" (eq. 4-5) or "concat" (beside H_v).
        heads: attention heads.

    Attributes:
        width: of F_fused.

    Raises:
        UsageError: `hidden` is not a multiple of `heads`, or there is no audio stream.
    """

    def __init__(self, hidden: int, audio_streams: int = 1, *, attend: bool, join: str, heads: int = 4) -> None:
        super().__init__()
        if audio_streams < 1:
            raise UsageError(explain("Fusion needs audio", expected="at least one audio stream", got=audio_streams))
        if attend and hidden % heads:
            raise UsageError(
                explain("The heads must share the width evenly", expected=f"a multiple of {heads}", got=hidden)
            )
        self.join = join
        self.attends = nn.ModuleList(Attend(hidden, heads) for _ in range(audio_streams)) if attend else None
        self.audio_streams = audio_streams
        self.gate = nn.Linear(2 * hidden, hidden) if join == "gate" else None
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
            raise ValueError(f"this fusion was made for {self.audio_streams} audio streams; got {len(audio)}")
        for track in audio:
            check_track(visual, track)
        heard = self._at_frames(visual, time, audio)
        if self.join == "concat":
            return torch.cat([visual, *heard], dim=-1)
        present = torch.stack([track.present for track in audio])
        mean = torch.stack(heard).sum(dim=0) / present.sum(dim=0).clamp(min=1)[:, None, None]
        fused = mean
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(torch.cat([mean, visual], dim=-1)))  # eq. 4
            fused = gate * mean + (1 - gate) * visual  # eq. 5
        return torch.where(present.any(dim=0)[:, None, None], fused, visual)

    def _at_frames(self, visual: Tensor, time: Tensor, audio: Sequence[Track]) -> list[Tensor]:
        if self.attends is None:
            return [resample(time, track) for track in audio]
        return [attend(visual, track) for attend, track in zip(self.attends, audio, strict=True)]


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
