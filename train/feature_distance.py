"""Distance of features to those of the training split, and the frames that are far from them.

Per stream, a Gaussian is fitted to the features of the training windows: the covariance along the `AXES` directions of
largest variance, and one variance for all others (probabilistic PCA). The distance is the Mahalanobis distance divided
by the square root of the number of dimensions. A frame is far if one of its features is farther than `QUANTILE` of
those of the validation split. Source: Tipping and Bishop, J. R. Stat. Soc. B 61 (1999) 611; Lee et al. 2018,
arXiv 1807.03888.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaflow.errors import CorruptError, explain
from vaflow.files import read_tensors, write_tensors
from vaflow.timeline import Bools, Floats
from vaflow.train.batch import AUDIO, VISUAL, StreamSpec
from vaflow.train.evaluate import Trace, at_frames
from vaflow.train.windows import ClipRows, StreamTable, WindowSet

FILE = "training_features.safetensors"
AXES = 32
QUANTILE = 0.99
LARGEST = 20_000  # rows of a stream that are fitted, evenly spaced
_CHUNK = 16_384
_PARTS = ("mean", "axes", "deviation", "rest", "threshold")


@dataclass(frozen=True)
class FeatureGaussian:
    """The features of one stream in the training split.

    Attributes:
        mean: [D]. axes: [D, A], orthonormal. deviation: [A] along the axes; rest: [1] in every other direction.
        threshold: [1] distance beyond which a feature is far.
    """

    mean: Tensor
    axes: Tensor
    deviation: Tensor
    rest: Tensor
    threshold: Tensor

    @classmethod
    def fit(cls, rows: Tensor) -> "FeatureGaussian":
        """Fit rows [N, D]; the threshold is infinite."""
        x = rows.double()
        mean = x.mean(dim=0)
        x = x - mean
        variance, axes = torch.linalg.eigh(x.T @ x / max(1, len(x) - 1))
        count = min(AXES, len(variance))
        total = variance.clamp(min=0).sum()
        floor = 1e-8 * total / len(variance) + 1e-12
        kept, others = variance[-count:].clamp(min=floor), variance[:-count]
        rest = others.mean().clamp(min=floor) if len(others) else kept.min()
        everywhere = torch.full((1,), torch.inf)
        return cls(
            mean.float(),
            axes[:, -count:].float().contiguous(),
            kept.sqrt().float(),
            rest.sqrt().float()[None],
            everywhere,
        )

    def distance(self, rows: Tensor) -> Tensor:
        """[N, D] -> [N]."""
        x = rows.float() - self.mean
        along = x @ self.axes
        squares = (along / self.deviation).square().sum(dim=1)
        if self.axes.shape[1] < self.axes.shape[0]:
            beyond = (x.square().sum(dim=1) - along.square().sum(dim=1)).clamp(min=0)
            squares = squares + beyond / self.rest.square()
        return (squares / len(self.mean)).sqrt()


@dataclass(frozen=True)
class TrainingFeatures:
    """Content of `training_features.safetensors`: stream name -> its Gaussian."""

    streams: Mapping[str, FeatureGaussian]

    @classmethod
    def fit(cls, train: WindowSet, val: WindowSet) -> "TrainingFeatures":
        """Fit the training split; the thresholds are quantiles of the validation split's distances."""
        streams = {}
        for spec in train.streams:
            used = _used_rows(train.tables[spec.name])
            if len(used) < 2:
                continue
            table = train.tables[spec.name]
            used = used[torch.linspace(0, len(used) - 1, min(LARGEST, len(used))).long()]
            gaussian = FeatureGaussian.fit(table.rows.index_select(0, used.to(table.rows.device)).cpu())
            distances = step_distances(gaussian, spec, val.tables[spec.name], slice(None))
            known = distances[np.isfinite(distances)]
            if len(known):
                edge = torch.tensor([np.quantile(known, QUANTILE)], dtype=torch.float32)
                streams[spec.name] = replace(gaussian, threshold=edge)
        return cls(streams)

    def mark(self, windows: WindowSet, traces: Iterable[Trace]) -> Iterator[Trace]:
        """Every trace with its frames that are far from the training features."""
        known = [spec for spec in windows.streams if spec.name in self.streams]
        for trace in traces:
            yield replace(trace, far=self._far(windows, trace.clip, known)) if known else trace

    def _far(self, windows: WindowSet, clip: ClipRows, known: list[StreamSpec]) -> Bools:
        rows, far = slice(clip.first, clip.last), np.zeros(len(clip.time), bool)
        for kind in (VISUAL, AUDIO):
            flags = []
            for spec in known:
                if spec.kind == kind:
                    gaussian = self.streams[spec.name]
                    distances = step_distances(gaussian, spec, windows.tables[spec.name], rows)
                    flags.append(np.nan_to_num(distances, nan=0.0) > float(gaussian.threshold))
            instants, flagged = windows.flagged(clip, flags)
            if flags and len(instants):
                far |= at_frames(clip, kind, instants, flagged)
        return far

    def write(self, folder: Path) -> None:
        """Write the file into a run's folder."""
        tensors = {f"{name}/{part}": getattr(g, part) for name, g in self.streams.items() for part in _PARTS}
        write_tensors(folder / FILE, tensors)


def read_training_features(folder: Path) -> TrainingFeatures | None:
    """The file of a run; None where there is none.

    Raises:
        CorruptError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    streams: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(path)[0].items():
        name, _, part = key.rpartition("/")
        streams.setdefault(name, {})[part] = tensor
    for parts in streams.values():
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        dim, axes = shapes.get("axes", (0,)) if len(shapes.get("axes", ())) == 2 else (0, 0)
        expected = {"mean": (dim,), "axes": (dim, axes), "deviation": (axes,), "rest": (1,), "threshold": (1,)}
        if not dim or shapes != expected:
            raise CorruptError(explain(f"{path} does not describe the training features", got=shapes))
    return TrainingFeatures({name: FeatureGaussian(**parts) for name, parts in streams.items()})


def step_distances(gaussian: FeatureGaussian, spec: StreamSpec, table: StreamTable, windows: slice) -> Floats:
    """Distances of the features of some windows, [W, S]; of a spectrogram the mean of each step; NaN where missing."""
    index = table.index[windows].cpu().long()
    used, place = torch.unique(index, return_inverse=True)
    parts = [gaussian.distance(table.rows.index_select(0, r.to(table.rows.device)).cpu()) for r in used.split(_CHUNK)]
    distance = torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
    distance[used == 0] = torch.nan  # row 0 stands for missing input
    steps: Floats = distance[place].numpy()
    if spec.frames_per_step:
        frames = steps.reshape(len(steps), -1, spec.frames_per_step)
        known = np.isfinite(frames)
        total = np.where(known, frames, 0).sum(axis=-1)
        steps = np.where(known.any(axis=-1), total / np.maximum(known.sum(axis=-1), 1), np.nan)
    return steps


def _used_rows(table: StreamTable) -> Tensor:
    used = torch.unique(table.index).cpu().long()
    return used[used > 0]
