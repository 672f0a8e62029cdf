"""Traces: predictions for every frame of the clips, from the predictions of a model for windows.

`stitch` averages overlapping windows, and values are clipped to [-1, 1].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.errors import DataError, explain
from vaflow.timeline import Bools, Floats, Ints, nearest
from vaflow.train import metrics
from vaflow.train.batch import AUDIO, VISUAL, probabilities
from vaflow.train.losses import CENTERS
from vaflow.train.windows import ClipRows, Prefetcher, WindowSet

PREDICT_BATCH = {"cpu": 64, "cuda": 1024}  # windows; a GPU waits for kernel launches with fewer
EXTRA = "extra/"  # prefix of further targets among a model's outputs


@dataclass(frozen=True)
class Trace:
    """Predictions for one clip, at every row of its frame clock.

    Attributes:
        va: [R, 2] in [-1, 1].
        regions: [R, 9] probabilities, or None without a prompt head.
        extra: name -> probabilities of further targets at their own times, where the clip has them.
        face, audio: [R] bool: the visual or audio input of the frame was valid; None: the run reads no such stream.
        centers: distance of the outer region centers from 0.
        interpolated: [R] bool: the frame lies between two samples of the model; None: unknown.
        std: [R, 2] standard deviations of `va`; None without.
        face_quality, speech: [R] quality of the face (0 to 1), and whether there is speech; None: unknown.
        far: [R] bool: the frame's features are far from those of the training split; None: unknown.
    """

    clip: ClipRows
    va: Floats
    regions: Floats | None
    extra: Mapping[str, Floats] = field(default_factory=dict)
    face: Bools | None = None
    audio: Bools | None = None
    centers: float = CENTERS
    interpolated: Bools | None = None
    std: Floats | None = None
    far: Bools | None = None
    face_quality: Floats | None = None
    speech: Bools | None = None

    @property
    def region(self) -> Ints:
        """[R] the most likely region of the prompt head; without one, the region with the nearest center."""
        if self.regions is not None:
            return self.regions.argmax(axis=1)
        return metrics.region_of(self.va, self.centers)


@torch.inference_mode()
def predict_windows(model: nn.Module, windows: WindowSet, batch_size: int | None = None) -> dict[str, Floats]:
    """Predict every window.

    Args:
        batch_size: windows at a time; None: `PREDICT_BATCH` of the device.

    Returns:
        "va" [N, F, 2], "regions" [N, F, 9] if the model has a prompt head, "variance" [N, F, 2] if it has a variance
        head, and the probabilities of further targets that the clips have, each [N, F, K], as "extra/NAME".
    """
    was_training = model.training
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    size = batch_size or PREDICT_BATCH.get(windows.device.type, PREDICT_BATCH["cpu"])
    for batch in Prefetcher[Tensor](windows).batches(windows.in_order(size)):
        output = model(batch)
        outputs = {"va": output.va}
        if output.region_logits is not None:
            outputs["regions"] = output.region_logits.softmax(dim=-1)
        if output.log_std is not None:
            outputs["variance"] = torch.exp(2 * output.log_std)
        for name, targets in windows.extra.items():
            if name in output.extra:
                outputs[f"{EXTRA}{name}"] = probabilities(output.extra[name], targets.task)
        for name, value in outputs.items():
            parts.setdefault(name, []).append(value.float())
    model.train(was_training)
    return {name: torch.cat(values).cpu().numpy().astype(np.float64) for name, values in parts.items()}


def predict_clips(
    model: nn.Module, windows: WindowSet, batch_size: int | None = None, *, centers: float = CENTERS
) -> Iterator[Trace]:
    """Yield a trace per clip: overlapping windows averaged, linear between samples, held at the ends.

    `batch_size` is that of `predict_windows`, `centers` that of `Trace`.

    Raises:
        DataError: a prediction is NaN; the clip is named.
    """
    outputs = predict_windows(model, windows, batch_size)
    inside = windows.inside_array
    kinds = {stream.kind for stream in windows.streams}
    for clip in windows.clips:
        rows = slice(clip.first, clip.last)
        traces = {}
        for name, value in outputs.items():
            time = clip.extra[name.removeprefix(EXTRA)].time if name.startswith(EXTRA) else clip.time
            traces[name] = stitch(windows.sample_time[rows], value[rows], inside[rows], time)
            if not np.isfinite(traces[name]).all():
                raise DataError(explain(f"The model's prediction for clip {clip.item!r} is not finite"))
        extra = {name.removeprefix(EXTRA): trace for name, trace in traces.items() if name.startswith(EXTRA)}
        face, audio = (input_at_frames(windows, clip, k) if k in kinds else None for k in (VISUAL, AUDIO))
        std = np.sqrt(traces["variance"]) if "variance" in traces else None
        between = between_samples(windows, clip)
        va = np.clip(traces["va"], -1, 1)
        yield Trace(clip, va, traces.get("regions"), extra, face, audio, centers, between, std)


def stitch(time: Floats, value: Floats, valid: Bools, query: Floats) -> Floats:
    """Merge the predictions of overlapping windows into a trace, linear between sample times, constant beyond them.

    Predictions of several windows for one time are averaged.

    Args:
        time: [W, S] seconds of every sample of every window; equal times must be equal numbers.
        value: [W, S, K] predictions at these times.
        valid: [W, S] False for padding, whose value is ignored.
        query: [N] seconds at which the trace is evaluated.

    Returns:
        [N, K], float64.

    Raises:
        ValueError: shapes disagree, or no sample is valid.
    """
    time, value, valid = np.asarray(time, np.float64), np.asarray(value, np.float64), np.asarray(valid, bool)
    if time.shape != valid.shape or value.shape[:-1] != time.shape:
        raise ValueError(f"stitch: shapes disagree: time {time.shape}, value {value.shape}, valid {valid.shape}")
    if not valid.any():
        raise ValueError("stitch: no valid sample")
    instants, index = np.unique(time[valid], return_inverse=True)
    samples = value[valid]
    total = np.zeros((instants.size, samples.shape[-1]))
    np.add.at(total, index, samples)
    mean = total / np.bincount(index, minlength=instants.size)[:, None]
    return np.stack([np.interp(query, instants, column) for column in mean.T], axis=-1)


def between_samples(windows: WindowSet, clip: ClipRows) -> Bools:
    """[R] bool: False at the frame nearest to each sample of the windows."""
    rows = slice(clip.first, clip.last)
    between = np.ones(len(clip.time), bool)
    if len(between):
        between[nearest(clip.time, windows.sample_time[rows][windows.inside_array[rows]])] = False
    return between


def input_at_frames(windows: WindowSet, clip: ClipRows, kind: str) -> Bools:
    """[R] bool: the input of `kind` was valid at each row of the clip's clock; see `at_frames`."""
    return at_frames(clip, kind, *windows.sample_validity(clip, kind))


def at_frames(clip: ClipRows, kind: str, instants: Floats, valid: Bools) -> Bools:
    """Flags [K] of ascending instants at each row of the clip's clock, [R].

    A frame takes the visual sample nearest in time, and the audio step that it lies in.
    """
    if not len(instants):
        return np.zeros(len(clip.time), bool)
    if kind == VISUAL:
        edges = (instants[1:] + instants[:-1]) / 2
        return valid[np.searchsorted(edges, clip.time)]
    return valid[np.clip(np.searchsorted(instants, clip.time + 1e-6, side="right") - 1, 0, len(instants) - 1)]
