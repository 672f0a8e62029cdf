"""When a run listens: the share of audio in the fused features by condition, and the attention to its audio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.regions import REGION_NAMES
from vaflow.timeline import Bools, Floats, stitch
from vaflow.train.data import load_windows
from vaflow.train.evaluate import input_at_frames, predict_windows
from vaflow.train.folds import split_items
from vaflow.train.runs import load_run
from vaflow.train.windows import WindowSet
from vaflow.viewer.attention import AttentionRecorder, AttentionSummary
from vaflow.viewer.run_results import region_of


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
