"""Scores of traces on a split: checks, metrics, groups, warnings. The frames of all clips are concatenated (ABAW)."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vaflow.cache import Cache
from vaflow.errors import DataError, UsageError, count, examples, explain
from vaflow.files import read_failures
from vaflow.timeline import Bools, Floats
from vaflow.train import metrics
from vaflow.train.batch import extra_scores
from vaflow.train.folds import Groups, source_splits
from vaflow.train.metrics import (
    DIMENSIONS,
    SCORES,
    bootstrap_interval,
    by_dimension,
    by_intensity,
    concordance,
    plain,
    rmse,
)
from vaflow.train.traces import Trace, predict_clips
from vaflow.train.windows import ClipRows, WindowSet

log = logging.getLogger(__name__)

UNKNOWN = "unknown"  # the group of clips without an entry in the file

NEARLY_CONSTANT = 0.02  # standard deviation of predictions below which a warning is given
CONSTANT_LABEL = 0.02  # the same for labels, which lie in [-1, 1]


def score(traces: Iterable[Trace]) -> Floats:
    """Concatenated CCC, [3]: valence, arousal and their mean (over the labelled dimensions)."""
    ccc = metrics.concordance_of_moments(np.asarray(sum(trace_moments(trace) for trace in traces)))
    return np.append(ccc, metrics.mean_over_dimensions(ccc))


def trace_moments(trace: Trace) -> Floats:
    """`metrics.video_moments` of one clip."""
    return metrics.video_moments(trace.va, _label(trace.clip), trace.clip.valid)


def _label(clip: ClipRows) -> Floats:
    return np.where(clip.valid, clip.value, 0.0)


def featureless(windows: WindowSet) -> list[ClipRows]:
    """Clips without features in any stream: their extraction failed."""
    return [clip for clip in windows.clips if len(clip.missing) == len(windows.streams)]


def failed_items(cache: Cache, split: str, fold_splits: Sequence[str] = ()) -> list[str]:
    """Clips that the failure lists of a cache name and that the cache lacks.

    An entry without a split counts for every split; one of `fold_splits` counts for each of their folds.
    """
    splits = source_splits(split, fold_splits)
    known = set(cache.items())
    failures = read_failures(cache.path)
    of_splits = [failure for failure in failures if failure.details.get("split", splits[0]) in splits]
    return sorted({failure.item for failure in of_splits if failure.item not in known})


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
    """Predict a labelled split and score it; returns the metrics, as in `metrics.json`, and every clip's trace.

    Args:
        centers: distance of the outer region centers from 0.
        allow_missing: leave out labelled clips without any features, instead of failing.
        failed: clips of the split that the cache lacks.
        resamples: bootstrap resamples over videos.

    Raises:
        DataError: labelled frames belong to clips without features, or nothing is labelled.
    """
    lost = check_complete(windows, failed, allow_missing)
    traces = list(predict_clips(model, windows, centers=centers))
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
    """Metrics of a whole split, as in `metrics.json`; `lost` and `failed` clips are left out and listed.

    Raises:
        DataError: nothing is labelled.
        UsageError: `groups` names none of the clips.
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
    """Return the labelled clips that cannot be scored.

    Raises:
        DataError: there are such clips and `allow_missing` is not set; the frames are counted and the clips named.
    """
    lost = [clip for clip in featureless(windows) if clip.valid.any()]
    if not lost and not failed:
        return []
    frames = sum(int(clip.valid.any(axis=1).sum()) for clip in lost)
    items = [*(clip.item for clip in lost), *failed]
    problem = f"{frames} labelled frames of {count(len(lost), 'clip')} have no features" if lost else ""
    absent = f"{count(len(failed), 'clip')} could not be extracted" if failed else ""
    message = f"{'; '.join(filter(None, (problem, absent)))}: {examples(items)}"
    if allow_missing:
        log.warning("%s. The metrics leave them out (--allow-missing)", message)
        return lost
    expected = "features of every labelled clip: a score of a part of the split is not comparable"
    remedy = "Run `vaflow extract` again, or leave them out with --allow-missing"
    raise DataError(explain(f"Some labelled clips cannot be scored. {message}", expected=expected, remedy=remedy))


def measure(traces: Sequence[Trace], split: str, *, centers: float = 0.66, resamples: int = 10_000) -> dict[str, Any]:
    """Metrics of labelled traces, as plain values for JSON; None where a dimension has no labels.

    The interval needs at least two videos; with one it is None.
    """
    prediction = np.concatenate([trace.va for trace in traces])
    label = np.concatenate([_label(trace.clip) for trace in traces])
    valid = np.concatenate([trace.clip.valid for trace in traces])
    by_video: dict[str, Floats] = {}
    for trace in traces:
        by_video[trace.clip.group] = by_video.get(trace.clip.group, 0) + trace_moments(trace)
    ci95: dict[str, list[float | None]] = {name: [None, None] for name in SCORES}
    if len(by_video) > 1:  # resampling one video gives that video again: an interval of width 0
        interval = bootstrap_interval(list(by_video.values()), resamples=resamples)
        ci95 = {name: [plain(edge) for edge in edges] for name, edges in zip(SCORES, interval, strict=True)}
    within, excluded = metrics.within_video_ccc((t.va, _label(t.clip), t.clip.valid) for t in traces)
    report = {
        "split": split,
        "n_frames": int(valid.any(axis=1).sum()),
        "n_videos": len(by_video),
        "n_clips": len(traces),
        "ccc": by_dimension(metrics.concordance(prediction, label, valid), mean=True),
        "ci95": ci95,
        "within_video_ccc": by_dimension(within, mean=True)
        | {"excluded": dict(zip(DIMENSIONS, excluded.tolist(), strict=True))},
        "rmse": by_dimension(metrics.rmse(prediction, label, valid), mean=True),
        "pearson": by_dimension(metrics.pearson(prediction, label, valid), mean=True),
        "smoothness": {
            "prediction": by_dimension(_smoothness((t.clip, t.va) for t in traces)),
            "label": by_dimension(_smoothness((t.clip, t.clip.value) for t in traces)),
        },
        "by_intensity": by_intensity(prediction, label, valid),
        "warnings": label_warnings(label, valid) + prediction_warnings(prediction, valid),
    }
    regions = region_accuracy(traces, centers)
    return report | ({"regions": regions} if regions else {})


def _smoothness(pairs: Iterable[tuple[ClipRows, Floats]]) -> Floats:
    """Mean over clips of the mean absolute change per second, over the labelled frames of each dimension, [2]."""
    rates = []
    for clip, value in pairs:
        masks = [clip.valid[:, k] for k in range(2)]
        rates.append([float(metrics.smoothness(value[m, k : k + 1], clip.time[m])[0]) for k, m in enumerate(masks)])
    table = np.array(rates)
    finite = np.isfinite(table)
    total = np.where(finite, table, 0).sum(axis=0)
    return np.where(finite.any(axis=0), total / np.maximum(finite.sum(axis=0), 1), np.nan)


def region_accuracy(traces: Sequence[Trace], centers: float) -> dict[str, Any]:
    """Share of frames whose most likely region is the label's, and the share of the most frequent region."""
    right, counts = 0, np.zeros(9, np.int64)
    for trace in traces:
        both = trace.clip.valid.all(axis=1)
        if trace.regions is None or not both.any():
            continue
        truth = metrics.region_of(trace.clip.value[both], centers)
        right += int((trace.regions[both].argmax(axis=-1) == truth).sum())
        counts += np.bincount(truth, minlength=9)
    total = int(counts.sum())
    return {"accuracy": right / total, "commonest": int(counts.max()) / total} if total else {}


def prediction_warnings(prediction: Floats, valid: Bools) -> list[str]:
    """Warnings about the predictions of a split, [N, 2] with their mask."""
    columns = {name: prediction[valid[:, k], k] for k, name in enumerate(DIMENSIONS)}
    return [
        f"predictions of {name} are nearly constant (standard deviation {x.std():.2g})"
        for name, x in columns.items()
        if x.size and x.std() < NEARLY_CONSTANT
    ]


def label_warnings(label: Floats, valid: Bools) -> list[str]:
    """Warnings about the labels of a split, [N, 2] with their mask."""
    warnings = []
    for k, name in enumerate(DIMENSIONS):
        y = label[valid[:, k], k]
        if not y.size:
            warnings.append(f"{name} is not labelled in this split")
        elif y.std() < CONSTANT_LABEL:
            warnings.append(
                f"labels of {name} are nearly constant (standard deviation {y.std():.2g}): their CCC is meaningless"
            )
    return warnings


@dataclass(frozen=True)
class Scored:
    """One clip, the source video it comes from, and its prediction, label and mask, [N, 2] each."""

    item: str
    video: str
    prediction: Floats
    label: Floats
    valid: Bools


def by_group(clips: Sequence[Scored], groups: Groups) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of every group of every kind; clips without an entry form the group "unknown".

    Raises:
        UsageError: the file names none of the clips or their source videos.
    """
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, members in groups.items():
        by_name: dict[str, list[Scored]] = {}
        for clip in clips:
            by_name.setdefault(members.get(clip.item) or members.get(clip.video) or UNKNOWN, []).append(clip)
        if set(by_name) == {UNKNOWN}:
            problem = f"Column {kind!r} of the groups names no clip of this split"
            expected = "items such as " + ", ".join(clip.item for clip in clips[:3])
            raise UsageError(explain(problem, expected=expected, got=", ".join(list(members)[:3]) or "empty cells"))
        result[kind] = {}
        for group in sorted(by_name):
            arrays = zip(*((c.prediction, c.label, c.valid) for c in by_name[group]), strict=True)
            prediction, label, valid = (np.concatenate(each) for each in arrays)
            result[kind][group] = {
                "n_clips": len(by_name[group]),
                "n_frames": int(valid.any(axis=1).sum()),
                "ccc": by_dimension(concordance(prediction, label, valid), mean=True),
                "rmse": by_dimension(rmse(prediction, label, valid), mean=True),
            }
    return result
