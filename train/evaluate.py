"""Windows -> traces at every annotated frame -> metrics (decision 13: stitched, clipped, concatenated)."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.datasets.files import below
from vaflow.errors import DataError, explain
from vaflow.failures import read_failures
from vaflow.files import write_file
from vaflow.timeline import Bools, Floats, stitch
from vaflow.train import metrics
from vaflow.train.breakdown import Groups, Scored, by_dimension, by_group, by_intensity, plain
from vaflow.train.folds import source_splits
from vaflow.train.losses import region_centers
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.targets import extra_scores, probabilities
from vaflow.train.windows import ClipRows, WindowSet

log = logging.getLogger(__name__)

PREDICT_BATCH = 64
EXTRA = "extra/"  # before the names of further targets, among what a model says
NEARLY_CONSTANT = 0.02  # standard deviation below which a prediction says next to nothing
CONSTANT_LABEL = 0.02  # likewise of labels, which lie in [-1, 1]


@dataclass(frozen=True)
class Trace:
    """What the model says of one clip, at every row of its frame clock.

    Attributes:
        clip: the clip, with its annotation.
        va: [R, 2] in [-1, 1].
        regions: [R, 9] probabilities, or None without a prompt head.
        extra: name -> probabilities of further targets at their own times, where the clip has such.
    """

    clip: ClipRows
    va: Floats
    regions: Floats | None
    extra: Mapping[str, Floats] = field(default_factory=dict)


@torch.inference_mode()
def predict_windows(model: nn.Module, windows: WindowSet, batch_size: int = PREDICT_BATCH) -> dict[str, Floats]:
    """Everything the model says of every window: "va" [N, F, 2], "regions" [N, F, 9] if it has a prompt head, and the
    probabilities of further targets that the clips have, each [N, F, K] under "extra/NAME"."""
    was_training = model.training
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    for ids in windows.in_order(batch_size):
        output = model(windows.gather(ids))
        said = {"va": output.va}
        if output.region_logits is not None:
            said["regions"] = output.region_logits.softmax(dim=-1)
        for name, targets in windows.extra.items():
            if name in output.extra:
                said[f"{EXTRA}{name}"] = probabilities(output.extra[name], targets.task)
        for name, value in said.items():
            parts.setdefault(name, []).append(value.float())
    model.train(was_training)
    return {name: torch.cat(values).cpu().numpy().astype(np.float64) for name, values in parts.items()}


def predict_clips(model: nn.Module, windows: WindowSet, batch_size: int = PREDICT_BATCH) -> Iterator[Trace]:
    """A trace per clip: overlapping windows averaged, linear between samples, held at the ends, within [-1, 1].

    Raises:
        DataError: the model says NaN; the clip is named.
    """
    said = predict_windows(model, windows, batch_size)
    inside = windows.inside_array
    for clip in windows.clips:
        own = slice(clip.first, clip.last)
        traces = {}
        for name, value in said.items():
            time = clip.extra[name.removeprefix(EXTRA)].time if name.startswith(EXTRA) else clip.time
            traces[name] = stitch(windows.sample_time[own], value[own], inside[own], time)
            if not np.isfinite(traces[name]).all():
                raise DataError(explain(f"The model's prediction for clip {clip.item!r} is not finite"))
        extra = {name.removeprefix(EXTRA): trace for name, trace in traces.items() if name.startswith(EXTRA)}
        yield Trace(clip, np.clip(traces["va"], -1, 1), traces.get("regions"), extra)


def score(traces: Iterable[Trace]) -> Floats:
    """Concatenated CCC, [3]: valence, arousal and their mean (over the dimensions that are labelled)."""
    moments = sum(_moments(trace) for trace in traces)
    ccc = metrics.concordance_of_moments(np.asarray(moments))
    return np.append(ccc, metrics.mean_over_dimensions(ccc))


def _moments(trace: Trace) -> Floats:
    return metrics.video_moments(trace.va, _label(trace.clip), trace.clip.valid)


def _label(clip: ClipRows) -> Floats:
    return np.where(clip.valid, clip.value, 0.0)


def featureless(windows: WindowSet) -> list[ClipRows]:
    """Clips of which no stream holds anything: their extraction failed."""
    return [clip for clip in windows.clips if len(clip.missing) == len(windows.streams)]


def failed_items(cache: Cache, split: str, fold_splits: Sequence[str] = ()) -> list[str]:
    """Clips that the last extraction could not put into the cache at all, as its failure lists say.

    A list that does not say a clip's split counts for every split; one of `fold_splits` counts for each of their parts.
    """
    wanted = source_splits(split, fold_splits)
    known = set(cache.items())
    failed = set()
    for failure in read_failures(cache.path):
        if failure.item not in known and failure.details.get("split", wanted[0]) in wanted:
            failed.add(failure.item)
    return sorted(failed)


def evaluate_windows(
    model: nn.Module,
    windows: WindowSet,
    split: str,
    *,
    centers: float = 0.66,
    allow_missing: bool = False,
    failed: Sequence[str] = (),
    resamples: int = 10_000,
) -> tuple[dict[str, Any], list[Trace]]:
    """Predict a labelled split and measure it.

    Args:
        model: what to evaluate.
        windows: all clips of the split.
        split: its name, for the report.
        centers: of the regions, for their read-out.
        allow_missing: leave out labelled clips without any features, instead of failing.
        failed: clips of the split that are not in the cache at all.
        resamples: of the bootstrap over videos.

    Returns:
        The metrics, as `metrics.json` has them, and every clip's trace.

    Raises:
        DataError: labelled frames belong to clips without features, or nothing is labelled.
    """
    lost = check_complete(windows, failed, allow_missing)
    traces = list(predict_clips(model, windows))
    return score_traces(traces, split, lost, failed, centers=centers, resamples=resamples), traces


def score_traces(
    traces: Sequence[Trace],
    split: str,
    lost: Sequence[ClipRows] = (),
    failed: Sequence[str] = (),
    *,
    centers: float = 0.66,
    resamples: int = 10_000,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """The metrics of a whole split, as `metrics.json` has them; `lost` and `failed` clips are left out and listed.

    Raises:
        DataError: nothing is labelled.
        UsageError: `groups` name none of the clips.
    """
    names = {clip.item for clip in lost}
    used = [trace for trace in traces if trace.clip.valid.any() and trace.clip.item not in names]
    if not used:
        raise DataError(explain(f"No frame of split {split!r} can be scored", expected="annotated clips with features"))
    report = measure(used, split, centers=centers, resamples=resamples)
    report["missing"] = {
        "clips": sorted({*names, *failed}),
        "frames": int(sum(clip.valid.any(axis=1).sum() for clip in lost)),
        "streams": dict(Counter(name for trace in used for name in trace.clip.missing)),
    }
    pairs = {name: [(t.clip.extra[name], t.extra[name]) for t in used] for name in used[0].extra}
    report |= {"extra": extra_scores(pairs)} if pairs else {}
    if groups is not None:
        clips = [Scored(t.clip.item, t.clip.group, t.va, _label(t.clip), t.clip.valid) for t in used]
        report["by_group"] = by_group(clips, groups)
    return report


def check_complete(windows: WindowSet, failed: Sequence[str], allow_missing: bool) -> list[ClipRows]:
    """Every labelled clip of the split can be scored; returns those that cannot, where that is allowed.

    Raises:
        DataError: it is not allowed; the frames are counted and the clips named.
    """
    lost = [clip for clip in featureless(windows) if clip.valid.any()]
    if not lost and not failed:
        return []
    frames = sum(int(clip.valid.any(axis=1).sum()) for clip in lost)
    items = [*(clip.item for clip in lost), *failed]
    shown = ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
    problem = f"{frames} labelled frames of {len(lost)} clips have no features" if lost else ""
    absent = f"{len(failed)} clips failed to be extracted and are not in the cache" if failed else ""
    message = f"{'; '.join(filter(None, (problem, absent)))}: {shown}"
    if allow_missing:
        log.warning("%s. They are left out of the metrics, as allowed", message)
        return lost
    raise DataError(
        explain(
            f"The split cannot be scored whole. {message}",
            expected="features for every labelled clip, for a metric over part of a split compares with nothing",
            remedy="Run `vaflow extract` again, or leave them out with --allow-missing",
        )
    )


def measure(traces: Sequence[Trace], split: str, *, centers: float = 0.66, resamples: int = 10_000) -> dict[str, Any]:
    """The metrics of labelled traces, as plain values for JSON; None where a dimension has no labels."""
    prediction = np.concatenate([trace.va for trace in traces])
    label = np.concatenate([_label(trace.clip) for trace in traces])
    valid = np.concatenate([trace.clip.valid for trace in traces])
    by_video: dict[str, Floats] = {}
    for trace in traces:
        by_video[trace.clip.group] = by_video.get(trace.clip.group, 0) + _moments(trace)
    interval = metrics.bootstrap_interval(list(by_video.values()), resamples=resamples)
    within, excluded = metrics.within_video_ccc((t.va, _label(t.clip), t.clip.valid) for t in traces)
    report = {
        "split": split,
        "n_frames": int(valid.any(axis=1).sum()),
        "n_videos": len(by_video),
        "n_clips": len(traces),
        "ccc": by_dimension(metrics.concordance(prediction, label, valid), mean=True),
        "ci95": {name: [plain(edge) for edge in getattr(interval, name)] for name in (*DIMENSIONS, "mean")},
        "within_video_ccc": by_dimension(within, mean=True)
        | {"excluded": dict(zip(DIMENSIONS, excluded.tolist(), strict=True))},
        "rmse": by_dimension(metrics.rmse(prediction, label, valid), mean=True),
        "pearson": by_dimension(metrics.pearson(prediction, label, valid), mean=True),
        "smoothness": {
            "prediction": by_dimension(_smoothness((t.clip, t.va) for t in traces)),
            "label": by_dimension(_smoothness((t.clip, t.clip.value) for t in traces)),
        },
        "by_intensity": by_intensity(prediction, label, valid),
        "warnings": _warnings(prediction, label, valid),
    }
    regions = _region_accuracy(traces, centers)
    return report | ({"regions": regions} if regions else {})


def _smoothness(pairs: Iterable[tuple[ClipRows, Floats]]) -> Floats:
    """Mean over clips of how fast a trace moves per second, over the labelled frames of each dimension, [2]."""
    rates = []
    for clip, value in pairs:
        own = [clip.valid[:, k] for k in range(2)]
        rates.append([float(metrics.smoothness(value[m, k : k + 1], clip.time[m])[0]) for k, m in enumerate(own)])
    table = np.array(rates)
    there = np.isfinite(table)
    total = np.where(there, table, 0).sum(axis=0)
    return np.where(there.any(axis=0), total / np.maximum(there.sum(axis=0), 1), np.nan)


def _region_accuracy(traces: Sequence[Trace], centers: float) -> dict[str, Any]:
    """How often the likeliest region is the label's, and how often always naming the commonest would be."""
    corners = region_centers(centers).double().numpy()
    right, total, counts = 0, 0, np.zeros(9, np.int64)
    for trace in traces:
        both = trace.clip.valid.all(axis=1)
        if trace.regions is None or not both.any():
            continue
        distance = np.square(trace.clip.value[both][:, None] - corners).sum(axis=-1)
        truth = distance.argmin(axis=-1)
        right += int((trace.regions[both].argmax(axis=-1) == truth).sum())
        total += int(both.sum())
        counts += np.bincount(truth, minlength=9)
    return {"accuracy": right / total, "commonest": int(counts.max()) / total} if total else {}


def _warnings(prediction: Floats, label: Floats, valid: Bools) -> list[str]:
    found = label_warnings(label, valid)
    for k, name in enumerate(DIMENSIONS):
        x = prediction[valid[:, k], k]
        if x.size and x.std() < NEARLY_CONSTANT:
            found.append(
                f"predictions of {name} are nearly constant (deviation {x.std():.2g}): "
                "the model says the same of every frame"
            )
    return found


def label_warnings(label: Floats, valid: Bools) -> list[str]:
    """What is wrong with the labels of a split, [N, 2] with their mask, as far as scores and training go."""
    found = []
    for k, name in enumerate(DIMENSIONS):
        y = label[valid[:, k], k]
        if not y.size:
            found.append(f"{name} is not labelled in this split")
        elif y.std() < CONSTANT_LABEL:
            found.append(f"labels of {name} are nearly constant (deviation {y.std():.2g}): their CCC says nothing")
    return found


def write_predictions(folder: Path, traces: Iterable[Trace]) -> None:
    """One CSV per clip, `<item>.csv`: frame (0-based), time (s), valence, arousal, and labels where there are any."""
    for trace in traces:
        write_file(below(folder, f"{trace.clip.item}.csv"), prediction_csv(trace))


def prediction_csv(trace: Trace) -> str:
    """The text of a prediction CSV; label columns only where the clip is annotated, empty where a row is not."""
    clip = trace.clip
    header = "frame,time,valence,arousal"
    rows = [
        f"{i},{t:.6f},{v:.6f},{a:.6f}" for i, (t, (v, a)) in enumerate(zip(clip.time, trace.va.tolist(), strict=True))
    ]
    if clip.valid.any():
        header += ",label_valence,label_arousal"
        labels = zip(clip.value.tolist(), clip.valid.tolist(), strict=True)
        known = ([f"{x:.6f}" if there else "" for x, there in zip(*pair, strict=True)] for pair in labels)
        rows = [f"{row},{','.join(pair)}" for row, pair in zip(rows, known, strict=True)]
    return "\n".join([header, *rows]) + "\n"
