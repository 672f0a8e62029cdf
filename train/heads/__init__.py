"""The model of stage two: streams -> projection -> temporal model -> fusion -> valence, arousal and regions.

Source: arXiv 2603.13415, section 3. The paper does not specify the normalisation of features before their projection
(`normalize`), the regression head (one hidden layer here), dropout (here after the projection and in that head),
several streams of one modality (see `VAModel` and `fusion`) and missing input (here a learned vector per stream).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaflow.errors import UsageError, explain
from vaflow.train.batch import AUDIO, VISUAL, Batch, Output, StreamSpec, TargetSpec
from vaflow.train.heads.fusion import FUSION, Track, interpolate
from vaflow.train.heads.layers import Dropout, LayerMixture, PromptHead, Spectrogram
from vaflow.train.heads.temporal import TEMPORAL, Recurrent, run_together, zero_outside

STD_RANGE = (0.02, 2.0)  # errors of values in [-1, 1] are at most 2


class UnitLength(nn.Module):
    """Scale vectors to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return functional.normalize(x, dim=-1)


class Standardize(nn.Module):
    """(x - mean) / deviation per dimension, with statistics of the training split; the identity until they are set."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return (x - self.mean).div_(self.deviation.clamp(min=1e-6))


class VarianceHead(nn.Sequential):
    """Logarithm of the standard deviation of valence and arousal, between the logarithms of `STD_RANGE`.

    It has no dropout and its input is detached, so that a model with it trains its predictions as one without.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, fused: Tensor) -> Tensor:
        """F_fused [..., width] -> [..., 2]."""
        low, high = map(math.log, STD_RANGE)
        return low + (high - low) * torch.sigmoid(super().forward(fused.detach()))


NORMALIZE: Mapping[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "l2": lambda dim: UnitLength(),
    "standard": Standardize,
    "none": lambda dim: nn.Identity(),
}


class Branch(nn.Module):
    """One stream up to fusion: normalise, project, insert the learned vector for missing input, add context.

    A spectrogram is standardised per band, whatever `normalize` is: LayerNorm would remove the loudness of each frame,
    which carries much of the arousal. A CNN then turns its frames into steps.

    Args:
        dim: width of the stream's features.
        hidden: width of the result.
        normalize: a key of `NORMALIZE`.
        temporal: a key of `TEMPORAL`.
        temporal_options: its keyword arguments.
        dropout: before the temporal model.
        frames_per_step: of a spectrogram; 0: features are steps.
        layers: of the encoder in a feature vector; several are mixed after their normalisation.
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
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.layer_mixture = LayerMixture(layers) if layers > 1 else None
        # Standardisation has statistics of every layer; the other norms treat each layer's vector alike.
        whole = normalize == "standard" or bool(frames_per_step)
        self.normalize = NORMALIZE["standard" if frames_per_step else normalize](dim if whole else dim // layers)
        dim //= layers
        self.spectrogram = Spectrogram(dim, frames_per_step) if frames_per_step else None
        if self.spectrogram is None:
            self.project: nn.Module = nn.Linear(dim, hidden)
        else:
            width = self.spectrogram.width
            self.project = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.missing = nn.Parameter(torch.zeros(hidden))
        self.dropout = Dropout(dropout)
        self.temporal = TEMPORAL[temporal](hidden, hidden, **temporal_options)

    def enter(self, x: Tensor, valid: Tensor, inside: Tensor, time: Tensor) -> Track:
        """Return the input of the temporal model: x [B, T, dim], valid and inside [B, T] bool, time [B, T] seconds.

        Features that are not valid are not read.

        Returns:
            The projected steps; frames of a spectrogram become steps here.
        """
        if self.spectrogram is None:
            x = zero_outside(x, valid)
            if self.layer_mixture is None:
                x = self.normalize(x)
            elif isinstance(self.normalize, Standardize):
                x = self.layer_mixture(self.normalize(x).unflatten(-1, (self.layer_mixture.layers, -1)))
            else:
                x = self.layer_mixture(self.normalize(x.unflatten(-1, (self.layer_mixture.layers, -1))))
        else:
            steps = self.spectrogram(self.normalize(x), valid, inside, time)
            x, valid, inside, time = steps.value, steps.valid, steps.inside, steps.time
        projected = self.project(x)
        projected = torch.lerp(self.missing.to(projected), projected, valid.unsqueeze(-1).to(projected))
        return Track(self.dropout(projected), time, inside, valid)


class VAModel(nn.Module):
    """Predict valence, arousal and region logits for every frame of every window.

    With one modality nothing is fused: F_fused is H_v, or H_a at the frame times. Several visual streams (or several
    audio streams without a visual one) are concatenated frame by frame and projected to `hidden`; the fusion combines
    several audio streams with a visual one.

    Args:
        streams: inputs, at least one; visual streams have one vector per output frame. A spectrogram
            (`frames_per_step`) goes through a CNN first.
        prototypes: [9, D] text prototypes of the regions; None: no prompt head.
        hidden: width of every sequence.
        temporal: a key of `TEMPORAL`, the same for every stream (each has its own weights).
        temporal_options: its keyword arguments, e.g. {"layers": 2}.
        fusion: a key of `FUSION`.
        attention_heads: of cross-modal attention.
        attention_positions: "none" or "time"; see `Fusion`.
        dropout: after projections and in the regression head; `temporal_options` may override it in temporal models.
        normalize: normalisation of features before their projection, a key of `NORMALIZE`. Encoders differ in scale,
            and CLIP vectors are cached unnormalised. "layer" is a LayerNorm, "l2" makes unit vectors, "standard" needs
            `set_statistics`, "none" follows the paper.
        learnable_prototypes: train the prototypes, too.
        context: number and width of learned context vectors; see `PromptHead`.
        targets: further targets; each has a linear head on F_fused.
        variance: predict the standard deviation of valence and arousal, too.

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
        attention_positions: str = "none",
        dropout: float = 0.1,
        normalize: str = "layer",
        learnable_prototypes: bool = False,
        context: tuple[int, int] | None = None,
        targets: Sequence[TargetSpec] = (),
        variance: bool = False,
    ) -> None:
        super().__init__()
        named: tuple[tuple[str, str, Mapping[str, object]], ...] = (
            ("temporal model", temporal, TEMPORAL),
            ("fusion", fusion, FUSION),
            ("normalisation", normalize, NORMALIZE),
        )
        for what, name, choices in named:
            if name not in choices:
                raise UsageError(explain(f"Unknown {what}", got=name, choices=choices))
        options = {"dropout": dropout, **(temporal_options or {})}
        parameters = inspect.signature(TEMPORAL[temporal]).parameters.values()
        known = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        for name in options:
            if name not in known:
                raise UsageError(explain(f"temporal model {temporal!r} has no option {name!r}", choices=known))
        check_streams(streams)
        self.streams = tuple(streams)
        self.branches = nn.ModuleList(
            Branch(s.dim, hidden, normalize, temporal, options, dropout, s.frames_per_step, s.layers)
            for s in self.streams
        )
        self.visual = [i for i, stream in enumerate(self.streams) if stream.kind == VISUAL]
        self.audio = [i for i, stream in enumerate(self.streams) if stream.kind == AUDIO]
        merged = len(self.visual) or len(self.audio)
        self.merge = nn.Linear(merged * hidden, hidden) if merged > 1 else nn.Identity()
        self.fusion = None
        if self.visual and self.audio:
            self.fusion = FUSION[fusion](hidden, len(self.audio), heads=attention_heads, positions=attention_positions)
        width = hidden if self.fusion is None else self.fusion.width
        self.regression = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, 2), nn.Tanh()
        )
        self.prompt = None
        if prototypes is not None:
            self.prompt = PromptHead(width, prototypes, learnable=learnable_prototypes, context=context)
        self.targets = tuple(targets)
        self.extra = nn.ModuleList(nn.Linear(width, len(target.names)) for target in self.targets)
        # Created last, so that the other modules draw the same random weights.
        self.variance = VarianceHead(width, hidden) if variance else None

    def forward(self, batch: Batch) -> Output:
        """A batch -> va [B, F, 2] in [-1, 1], region logits [B, F, 9], other logits, log std [B, F, 2]; 0 at padding.

        Region logits are None without a prompt head, and the standard deviation without a variance head.

        Raises:
            ValueError: a stream is not in the batch, or shapes disagree.
        """
        fused = self.fuse(batch)
        frames = batch.inside.unsqueeze(-1)
        va = self.regression(fused) * frames
        regions = None if self.prompt is None else self.prompt(fused) * frames
        heads = zip(self.targets, self.extra, strict=True)
        extra = {target.name: head(fused) * frames for target, head in heads}
        log_std = None if self.variance is None else self.variance(fused) * frames
        return Output(va, regions, extra, log_std)

    def fuse(self, batch: Batch) -> Tensor:
        """F_fused, [B, F, width].

        Raises:
            ValueError: a stream is not in the batch, or shapes disagree.
        """
        entering: list[Track] = []
        for stream, branch in zip(self.streams, self.branches, strict=True):
            check_features(stream, batch)
            name = stream.name
            inside, valid = batch.feature_inside[name], batch.valid[name] & batch.feature_inside[name]
            if stream.kind == VISUAL:  # rows are output frames; one beyond the stream's end is missing, not padding
                inside, valid = batch.inside, valid & batch.inside
            entering.append(branch.enter(batch.features[name], valid, inside, batch.feature_time[name]))  # type: ignore[operator]
        tracks = self._in_context(entering)
        audio = [tracks[i] for i in self.audio]
        if not self.visual:
            aligned = [interpolate(track.value, track.time, batch.time, track.inside) for track in audio]
            return self.merge(torch.cat(aligned, dim=-1))
        visual = self.merge(torch.cat([tracks[i].value for i in self.visual], dim=-1))
        if self.fusion is None:
            return visual
        fused: Tensor = self.fusion(visual, torch.where(batch.inside, batch.time, 0), audio)
        return fused

    def _in_context(self, entering: Sequence[Track]) -> list[Track]:
        """Every track after its temporal model; recurrent ones run together."""
        models = [branch.temporal for branch in self.branches]
        values, insides = [track.value for track in entering], [track.inside for track in entering]
        if all(isinstance(model, Recurrent) for model in models):
            values = run_together(models, values, insides)  # type: ignore[arg-type]
        else:
            values = [m(x, inside) for m, x, inside in zip(models, values, insides, strict=True)]  # type: ignore[operator]
        return [replace(track, value=value) for track, value in zip(entering, values, strict=True)]

    @property
    def layer_shares(self) -> dict[str, list[float]]:
        """Stream -> the learned share of each of its layers, for streams that store several."""
        pairs = zip(self.streams, self.branches, strict=True)
        return {s.name: b.layer_mixture.shares.tolist() for s, b in pairs if isinstance(b.layer_mixture, LayerMixture)}

    @property
    def standardized(self) -> tuple[str, ...]:
        """Names of the streams that need `set_statistics`: spectrograms, and all with normalize="standard"."""
        pairs = zip(self.streams, self.branches, strict=True)
        return tuple(stream.name for stream, branch in pairs if isinstance(branch.normalize, Standardize))

    def set_statistics(self, stream: str, mean: Tensor, deviation: Tensor) -> None:
        """Set a stream's mean and deviation, [D] each, over the valid rows of the training split.

        Raises:
            ValueError: an unknown stream, one that is not standardised, or shapes disagree.
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


def count_parameters(module: nn.Module, *, trainable: bool = True) -> int:
    """Number of trainable parameters; of all parameters where `trainable` is False."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def check_streams(streams: Sequence[StreamSpec]) -> None:
    """Raise UsageError unless there is a stream, every kind is known and names differ."""
    if not streams:
        raise UsageError(explain("A model needs input", expected="at least one visual or audio stream", got="none"))
    for stream in streams:
        if stream.kind not in (VISUAL, AUDIO):
            raise UsageError(explain(f"Stream {stream.name!r}: unknown kind", got=stream.kind, choices=(VISUAL, AUDIO)))
    names = [stream.name for stream in streams]
    if len(set(names)) < len(names):
        raise UsageError(explain("Streams need different names", got=", ".join(names)))


def check_features(stream: StreamSpec, batch: Batch) -> None:
    """Raise ValueError, naming the shapes, unless the batch has the stream's features, masks and times."""
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
    """Take valence from one model and arousal from another; other logits are the mean of both.

    Args:
        valence, arousal: models of the same inputs.
    """

    def __init__(self, valence: nn.Module, arousal: nn.Module) -> None:
        super().__init__()
        self.valence = valence
        self.arousal = arousal

    def forward(self, batch: Batch) -> Output:
        """A batch -> va [B, F, 2], region logits [B, F, 9] (or None), other logits, log std [B, F, 2] (or None)."""
        one: Output = self.valence(batch)
        other: Output = self.arousal(batch)
        va = torch.stack([one.va[..., 0], other.va[..., 1]], dim=-1)
        extra = {name: (logits + other.extra[name]) / 2 for name, logits in one.extra.items()}
        log_std = regions = None
        if one.log_std is not None and other.log_std is not None:
            log_std = torch.stack([one.log_std[..., 0], other.log_std[..., 1]], dim=-1)
        if one.region_logits is not None and other.region_logits is not None:
            regions = (one.region_logits + other.region_logits) / 2
        return Output(va, regions, extra, log_std)
