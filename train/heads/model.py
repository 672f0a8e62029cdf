"""The whole model of stage two: streams -> projection -> temporal model -> fusion -> valence, arousal and regions.

Source: arXiv 2603.13415, section 3. The paper is silent on: what happens to a feature before its projection
(`normalize`), the shape of the regression head (one hidden layer), dropout (after the projection and in that head),
several streams of one modality (see `VAModel` and `fusion`), and missing input (a learned vector per stream).

What becomes of one stream before fusion: normalise, project, fill in what is missing, look at the context.

Source: arXiv 2603.13415, section 3 (projection, eq. 1); normalisation and the vector for missing input are ours.

Two sets of weights as one model: valence from the epoch that was best in valence, arousal from its own.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.errors import UsageError, explain
from vaflow.train.batch import AUDIO, VISUAL, Batch, Output, StreamSpec, TargetSpec
from vaflow.train.heads.fusion import FUSION, Track, interpolate
from vaflow.train.heads.prompt import PromptHead
from vaflow.train.heads.spectrogram import Spectrogram
from vaflow.train.heads.temporal import TEMPORAL


class UnitLength(nn.Module):
    """[..., D] -> the same direction, length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return functional.normalize(x, dim=-1)


class Standardize(nn.Module):
    """(x - mean) / deviation per dimension, with numbers of the training split; the identity until they are set."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return (x - self.mean) / self.deviation.clamp(min=1e-6)


NORMALIZE: Mapping[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "l2": lambda dim: UnitLength(),
    "standard": Standardize,
    "none": lambda dim: nn.Identity(),
}


class Branch(nn.Module):
    """One stream: normalise, project to `hidden`, put the learned vector where input is missing, then its context.

    A spectrogram is standardised per band, whatever `normalize` says (a LayerNorm would take the loudness out of every
    frame, and with it much of what sound says about arousal), and a CNN makes steps of its frames first.

    Args:
        dim: width of the stream's features.
        hidden: width of the result.
        normalize: a key of `NORMALIZE`.
        temporal: a key of `TEMPORAL`.
        temporal_options: its keyword arguments.
        dropout: on what enters the temporal model.
        frames_per_step: of a spectrogram; 0: features are steps.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        normalize: str,
        temporal: str,
        temporal_options: Mapping[str, Any],
        dropout: float,
        frames_per_step: int = 0,
    ) -> None:
        super().__init__()
        self.normalize = NORMALIZE["standard" if frames_per_step else normalize](dim)
        self.spectrogram = Spectrogram(dim, frames_per_step) if frames_per_step else None
        if self.spectrogram is None:
            self.project: nn.Module = nn.Linear(dim, hidden)
        else:
            width = self.spectrogram.width
            self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.missing = nn.Parameter(torch.zeros(hidden))
        self.dropout = nn.Dropout(dropout)
        self.temporal = TEMPORAL[temporal](hidden, hidden, **temporal_options)

    def forward(self, x: Tensor, valid: Tensor, inside: Tensor) -> Tensor:
        """x [B, T, dim], valid and inside [B, T] bool -> [B, T, hidden]; features that are not valid are not read."""
        return self._in_context(self.normalize(torch.where(valid.unsqueeze(-1), x, 0)), valid, inside)

    def track(self, x: Tensor, key: Tensor, inside: Tensor, time: Tensor) -> Track:
        """An audio stream, x [B, T, dim]; key, inside [B, T] bool; time [B, T] seconds. Frames become steps here."""
        if self.spectrogram is None:
            return Track(self(x, key, inside), time, inside, key)
        steps = self.spectrogram(self.normalize(x), key, inside, time)
        value = self._in_context(steps.value, steps.valid, steps.inside)
        return Track(value, steps.time, steps.inside, steps.valid)

    def _in_context(self, x: Tensor, valid: Tensor, inside: Tensor) -> Tensor:
        projected = torch.where(valid.unsqueeze(-1), self.project(x), self.missing)
        result: Tensor = self.temporal(self.dropout(projected), inside)
        return result


class VAModel(nn.Module):
    """Valence and arousal, and region logits, for every frame of every window.

    With one modality there is nothing to fuse: F_fused is H_v, or H_a at the frame times. Several visual streams (or
    several audio streams without a visual one) are concatenated frame by frame and projected to `hidden`; several
    audio streams beside a visual one are the fusion's matter.

    Args:
        streams: what the model reads, at least one; visual streams have one vector per output frame. A spectrogram
            (`frames_per_step`) goes through a CNN first.
        prototypes: [9, D] text prototypes of the regions; None: no prompt head.
        hidden: width of every sequence.
        temporal: a key of `TEMPORAL`, the same for every stream (each has its own weights).
        temporal_options: its keyword arguments, e.g. {"layers": 2}.
        fusion: a key of `FUSION`.
        attention_heads: of cross-modal attention.
        dropout: after projections and in the regression head; `temporal_options` may say otherwise for inside.
        normalize: what is done to features before their projection, a key of `NORMALIZE`. Encoders differ in scale,
            and CLIP vectors are cached unnormalised. "layer" (default) is a LayerNorm, "l2" makes unit vectors,
            "standard" needs `set_statistics`, "none" is the paper to the letter.
        learnable_prototypes: train the prototypes, too.
        context: number and width of learned vectors that they are made from; see `PromptHead`.
        targets: what else is said of every frame; a linear head on F_fused each.

    Raises:
        UsageError: an unknown name or option, two streams of one name, no streams, or widths that do not divide.
        ValueError: prototypes that are not [9, D].
    """

    def __init__(
        self,
        streams: Sequence[StreamSpec],
        prototypes: Tensor | None = None,
        *,
        hidden: int = 256,
        temporal: str = "gru",
        temporal_options: Mapping[str, Any] | None = None,
        fusion: str = "hierarchical",
        attention_heads: int = 4,
        dropout: float = 0.1,
        normalize: str = "layer",
        learnable_prototypes: bool = False,
        context: tuple[int, int] | None = None,
        targets: Sequence[TargetSpec] = (),
    ) -> None:
        super().__init__()
        _choice("temporal model", temporal, TEMPORAL)
        _choice("fusion", fusion, FUSION)
        _choice("normalisation", normalize, NORMALIZE)
        options = {"dropout": dropout, **(temporal_options or {})}
        _known_options(temporal, options)
        self.streams = _checked(streams)
        self.branches = nn.ModuleList(
            Branch(s.dim, hidden, normalize, temporal, options, dropout, s.frames_per_step) for s in self.streams
        )
        self.visual = [i for i, stream in enumerate(self.streams) if stream.kind == VISUAL]
        self.audio = [i for i, stream in enumerate(self.streams) if stream.kind == AUDIO]
        beside = len(self.visual) or len(self.audio)
        self.merge = nn.Linear(beside * hidden, hidden) if beside > 1 else nn.Identity()
        both = bool(self.visual and self.audio)
        self.fusion = FUSION[fusion](hidden, len(self.audio), heads=attention_heads) if both else None
        width = hidden if self.fusion is None else self.fusion.width
        self.regression = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 2), nn.Tanh()
        )
        self.prompt = None
        if prototypes is not None:
            self.prompt = PromptHead(width, prototypes, learnable=learnable_prototypes, context=context)
        self.targets = tuple(targets)
        self.extra = nn.ModuleList(nn.Linear(width, len(target.names)) for target in self.targets)

    def forward(self, batch: Batch) -> Output:
        """A batch -> va [B, F, 2] in [-1, 1], region logits [B, F, 9] (or None), other logits; zeros at padding.

        Raises:
            ValueError: a stream is not in the batch, or shapes disagree.
        """
        fused = self.fuse(batch)
        frames = batch.inside.unsqueeze(-1)
        va = torch.where(frames, self.regression(fused), 0)
        regions = None if self.prompt is None else torch.where(frames, self.prompt(fused), 0)
        heads = zip(self.targets, self.extra, strict=True)
        return Output(va, regions, {target.name: torch.where(frames, head(fused), 0) for target, head in heads})

    def fuse(self, batch: Batch) -> Tensor:
        """F_fused, [B, F, width].

        Raises:
            ValueError: a stream is not in the batch, or shapes disagree.
        """
        for stream in self.streams:
            _check_features(stream, batch)
        tracks = [self._hear(i, batch) for i in self.audio]
        if not self.visual:
            heard = [interpolate(track.value, track.time, batch.time, track.inside) for track in tracks]
            return self.merge(torch.cat(heard, dim=-1))
        seen = self.merge(torch.cat([self._see(i, batch) for i in self.visual], dim=-1))
        return seen if self.fusion is None else self.fusion(seen, batch.time, tracks)

    @property
    def standardized(self) -> tuple[str, ...]:
        """Names of the streams that `set_statistics` is for: spectrograms, and all with normalize="standard"."""
        pairs = zip(self.streams, self.branches, strict=True)
        return tuple(stream.name for stream, branch in pairs if isinstance(branch.normalize, Standardize))

    def set_statistics(self, stream: str, mean: Tensor, deviation: Tensor) -> None:
        """What a stream is shifted by and divided by, [D] each, over the training split's valid rows.

        Raises:
            ValueError: there is no such stream, it is not standardised, or shapes disagree.
        """
        names = [spec.name for spec in self.streams]
        if stream not in names:
            raise ValueError(f"no stream {stream!r} in this model; it has {', '.join(names)}")
        layer = self.branches[names.index(stream)].normalize
        if not isinstance(layer, Standardize):
            raise ValueError(f"stream {stream!r} is normalised by {type(layer).__name__}, which has no statistics")
        if mean.shape != layer.mean.shape or deviation.shape != layer.mean.shape:
            raise ValueError(f"statistics must be {[*layer.mean.shape]}; got {[*mean.shape]} and {[*deviation.shape]}")
        layer.mean.copy_(mean)
        layer.deviation.copy_(deviation)

    def _see(self, i: int, batch: Batch) -> Tensor:
        """H of visual stream i, [B, F, hidden]. Its rows are output frames: one beyond its own end is missing."""
        name = self.streams[i].name
        valid = batch.valid[name] & batch.feature_inside[name]
        return self.branches[i](batch.features[name], valid & batch.inside, batch.inside)

    def _hear(self, i: int, batch: Batch) -> Track:
        """H of audio stream i with its times and masks."""
        name = self.streams[i].name
        inside = batch.feature_inside[name]
        branch: Branch = self.branches[i]  # type: ignore[assignment]
        return branch.track(batch.features[name], batch.valid[name] & inside, inside, batch.feature_time[name])


def count_parameters(module: nn.Module, *, trainable: bool = True) -> int:
    """How many numbers a module learns; all its parameters where `trainable` is False."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def _choice(what: str, name: str, choices: Mapping[str, object]) -> None:
    if name not in choices:
        raise UsageError(explain(f"Unknown {what}", got=name, choices=choices))


def _known_options(temporal: str, options: Mapping[str, object]) -> None:
    known = {
        name
        for name, parameter in inspect.signature(TEMPORAL[temporal]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in options:
        if name not in known:
            raise UsageError(explain(f"The temporal model {temporal!r} has no such option", got=name, choices=known))


def _checked(streams: Sequence[StreamSpec]) -> tuple[StreamSpec, ...]:
    if not streams:
        raise UsageError(explain("A model needs input", expected="at least one visual or audio stream", got="none"))
    names = [stream.name for stream in streams]
    for stream in streams:
        if stream.kind not in (VISUAL, AUDIO):
            raise UsageError(explain(f"Stream {stream.name!r}: unknown kind", got=stream.kind, choices=(VISUAL, AUDIO)))
        if names.count(stream.name) > 1:
            raise UsageError(explain("Streams need different names", got=", ".join(names)))
    return tuple(streams)


def _check_features(stream: StreamSpec, batch: Batch) -> None:
    name = stream.name
    if name not in batch.features:
        raise ValueError(f"the model reads stream {name!r}; the batch has {', '.join(batch.features) or 'none'}")
    shape = batch.features[name].shape
    frames = tuple(batch.inside.shape)
    expected = (*frames, stream.dim) if stream.kind == VISUAL else (frames[0], *shape[1:2], stream.dim)
    if tuple(shape) != expected:
        raise ValueError(f"stream {name!r}: expected features {list(expected)}; got {[*shape]}")
    for what in ("valid", "feature_inside", "feature_time"):
        got = getattr(batch, what)[name].shape
        if got != shape[:2]:
            raise ValueError(f"stream {name!r}: expected {what} {[*shape[:2]]}; got {[*got]}")


class EachModel(nn.Module):
    """Valence as one model says it, arousal as another does; other logits are the mean of both.

    Args:
        valence, arousal: models of the same inputs.
    """

    def __init__(self, valence: nn.Module, arousal: nn.Module) -> None:
        super().__init__()
        self.valence = valence
        self.arousal = arousal

    def forward(self, batch: Batch) -> Output:
        """A batch -> va [B, F, 2], region logits [B, F, 9] (or None), other logits."""
        one: Output = self.valence(batch)
        other: Output = self.arousal(batch)
        va = torch.stack([one.va[..., 0], other.va[..., 1]], dim=-1)
        extra = {name: (logits + other.extra[name]) / 2 for name, logits in one.extra.items()}
        if one.region_logits is None or other.region_logits is None:
            return Output(va, None, extra)
        return Output(va, (one.region_logits + other.region_logits) / 2, extra)
