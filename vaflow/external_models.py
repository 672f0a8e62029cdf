"""Pretrained models that output valence and arousal, used without training: baselines for prediction and evaluation.

The two outputs of an `onnx:` encoder are read at every grid sample where its input is valid, interpolated linearly to
the clip's frames, held at the ends, and clipped to [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.layout import canonical
from vaflow.cache.schema import StreamInfo
from vaflow.encoders import build_encoder
from vaflow.errors import FingerprintError, UsageError, command, explain
from vaflow.extract.config import ExtractConfig
from vaflow.files import lock_folder
from vaflow.predict import (
    COMMAND,
    ClipFeatures,
    PredictConfig,
    Predicted,
    PredictSummary,
    check_output,
    clips_of,
    write_clip,
)
from vaflow.train.batch import AUDIO, VISUAL
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_windows
from vaflow.train.inputs import resolve
from vaflow.train.scores import check_complete, failed_items, featureless, score_traces
from vaflow.train.smoothing import Smoothing, smoothed
from vaflow.train.traces import Trace, between_samples, input_at_frames
from vaflow.train.windows import ClipRows


@dataclass(frozen=True)
class Columns:
    """Positions of valence and arousal among a model's outputs, counted from 0."""

    valence: int
    arousal: int

    @classmethod
    def parse(cls, text: str | None, name: str) -> "Columns":
        """Read "V,A".

        Raises:
            UsageError: it is missing, or not two different whole numbers.
        """
        first, _, second = (text or "").partition(",")
        if not (first.isdigit() and second.isdigit()) or int(first) == int(second):
            problem = f"--va names the outputs of {name} that are valence and arousal"
            expected = "two columns counted from 0, such as --va 8,9"
            raise UsageError(explain(problem, expected=expected, got=text or "no --va"))
        return cls(int(first), int(second))

    def check(self, name: str, dim: int) -> None:
        """Raise a UsageError if the model has fewer outputs."""
        if max(self.valence, self.arousal) >= dim:
            got = f"--va {self.valence},{self.arousal}"
            raise UsageError(explain(f"{name} has too few outputs", expected=f"columns 0 to {dim - 1}", got=got))


def model_traces(
    cache: Cache, name: str, columns: Columns, items: Sequence[str], *, weights: Path | None = None, show: bool = False
) -> tuple[list[Trace], Any]:
    """Return the trace of every clip, and the windows that its clips were read with.

    Args:
        weights: the model's file, instead of the one in its name.

    Raises:
        UsageError: the cache has no such stream, or the stream too few columns.
        FingerprintError: the model's files have changed since the cache was extracted.
    """
    known = cache.streams()
    if name not in known:
        remedy = f"Extract it: {command('extract', 'ROOT', '--out', cache.place, '--visual', name)}"
        raise UsageError(explain(f"{cache.place} has no stream of this model", got=name, choices=known, remedy=remedy))
    info = known[name]
    check_same_model(cache, info, weights)
    columns.check(name, info.dim)
    chosen = {"visual": (name,), "audio": ()} if info.kind == VISUAL else {"visual": (), "audio": (name,)}
    config, inputs = resolve(cache, TrainConfig(**chosen, kl_weight=0.0))  # type: ignore[arg-type]
    windows = load_windows(cache, items, inputs.streams, config, show=show)
    empty = {clip.item for clip in featureless(windows)}
    traces = []
    for clip in windows.clips:
        masks: dict[str, Any] = {info.kind: input_at_frames(windows, clip, info.kind)}
        va = np.zeros((len(clip.time), 2)) if clip.item in empty else _at_frames(cache, name, columns, clip)
        between = between_samples(windows, clip)
        traces.append(Trace(clip, va, None, face=masks.get(VISUAL), audio=masks.get(AUDIO), interpolated=between))
    return traces, windows


def check_same_model(cache: Cache, info: StreamInfo, weights: Path | None = None) -> None:
    """Compare a stream with the files of its model, if they are here.

    Args:
        weights: the model's file, instead of the one in its name.

    Raises:
        FingerprintError: they are not those that the stream was made with.
    """
    if weights is None and not Path(info.name.removeprefix("onnx:")).expanduser().is_file():
        return
    present, recorded = build_encoder(info.name, weights=weights).identity, info.identity
    parts = ("weights", "sidecar", "front")
    changed = [part for part in parts if canonical(present.get(part)) != canonical(recorded.get(part))]
    if changed:
        problem = f"{info.name} is not the model that made its stream in {cache.place}"
        remedy = "Extract the videos into a new cache"
        raise FingerprintError(explain(problem, got=f"other {', '.join(changed)}", remedy=remedy))


def _at_frames(cache: Cache, name: str, columns: Columns, clip: ClipRows) -> np.ndarray:
    stored = cache.read(name, clip.item, ["embedding", "time", "valid"])
    valid = stored.valid.ravel()
    time = stored.time.ravel()[valid]
    order = np.argsort(time, kind="stable")  # windows of audio overlap
    if not len(time):
        return np.zeros((len(clip.time), 2))
    values = stored.embedding.reshape(len(valid), -1)[valid][:, [columns.valence, columns.arousal]].astype(np.float64)
    va = [np.interp(clip.time, time[order], values[order, k]) for k in range(2)]
    return np.clip(np.stack(va, axis=1), -1, 1)


def evaluate_model(
    name: str,
    columns: Columns,
    cache: Cache,
    split: str = "val",
    *,
    smoothing: Smoothing | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Score a model on the labelled frames of a split: the metrics of `vaflow evaluate`.

    Raises:
        UsageError: the cache has no stream of the model, or no such split.
        FingerprintError: the model's files have changed since the cache was extracted.
        DataError: labelled clips have no features, or nothing is labelled.
    """
    items = cache.items(split=split)
    if not items:
        raise UsageError(explain(f"{cache.place} has no clips in this split", got=split))
    traces, windows = model_traces(cache, name, columns, items)
    failed = failed_items(cache, split)
    lost = check_complete(windows, failed, allow_missing)
    report = score_traces(list(smoothed(traces, smoothing)), split, lost, failed)
    return report | ({"smoothing": smoothing.summary} if smoothing else {})


def predict_model(
    name: str,
    columns: Columns,
    media: Sequence[Path],
    out: Path,
    config: PredictConfig | None = None,
    *,
    show_progress: bool = False,
) -> PredictSummary:
    """Predict every frame of videos, or of a cache's clips, with a model: the files of `vaflow predict`.

    Raises:
        UsageError: the model or a video does not exist, or the model has too few outputs.
    """
    config = config or PredictConfig()
    if not media and config.cache is None:
        raise UsageError(explain("Nothing to predict", expected="videos, or --cache CACHE to predict its clips"))
    clips, settings = clips_of(media), None  # a missing video is reported before the model is read
    weights = config.weights.get(name)
    if media:
        encoder = build_encoder(name, weights=weights)
        columns.check(name, encoder.dim)
        visual = encoder.kind == VISUAL
        settings = ExtractConfig(
            visual=(name,) if visual else (),
            audio=() if visual else (name,),
            weights=dict(config.weights),
            dtype="float32",
            face_source=config.face_source or "auto",
            device=config.device,
            person=config.person or ExtractConfig.person,
        )
    check_output(out)
    with lock_folder(out, COMMAND):
        features = ClipFeatures.of(clips, settings, out, config, show_progress)
        predicted = _write_clips(features, name, columns, weights, show_progress)
        summary = features.summary(predicted, config)
    if not config.keep_features:
        summary.discard()
    return summary


def _write_clips(
    features: ClipFeatures, name: str, columns: Columns, weights: Path | None, show_progress: bool
) -> list[Predicted]:
    """Write the files of every clip that has features; `weights` is that of `model_traces`."""
    if not features.items:
        return []
    predicted: list[Predicted] = []
    traces, windows = model_traces(features.cache, name, columns, features.items, weights=weights, show=show_progress)
    empty = {clip.item for clip in featureless(windows)}
    for trace in traces:
        if trace.clip.item in empty:
            features.add_failure(trace.clip.item)
        else:
            predicted.append(write_clip(features.out, trace))
    return predicted
