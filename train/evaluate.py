"""Windows -> traces at every annotated frame -> metrics.

Overlapping windows are averaged, values are clipped to [-1, 1], and the frames of all clips are concatenated (ABAW).
"""

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
from vaflow.encoders.prompts import REGIONS
from vaflow.errors import DataError, count, examples, explain
from vaflow.files import write_file
from vaflow.items import read_failures
from vaflow.timeline import Bools, Floats, Ints, nearest, stitch
from vaflow.train import metrics
from vaflow.train.batch import AUDIO, VISUAL, extra_scores, probabilities
from vaflow.train.groups import Groups, Scored, by_group, source_splits
from vaflow.train.losses import CENTERS
from vaflow.train.metrics import DIMENSIONS, SCORES, by_dimension, by_intensity, plain
from vaflow.train.windows import ClipRows, Prefetcher, WindowSet

log = logging.getLogger(__name__)

PREDICT_BATCH = {"cpu": 64, "cuda": 1024}  # windows; a GPU waits for kernel launches with fewer
EXTRA = "extra/"  # prefix of further targets among a model's outputs
NEARLY_CONSTANT = 0.02  # standard deviation of predictions below which a warning is given
CONSTANT_LABEL = 0.02  # the same for labels, which lie in [-1, 1]


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
        interval = metrics.bootstrap_interval(list(by_video.values()), resamples=resamples)
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


def write_predictions(folder: Path, traces: Iterable[Trace]) -> None:
    """Write one CSV per clip, `<item>.csv`; see `prediction_csv`."""
    for trace in traces:
        write_file(below(folder, f"{trace.clip.item}.csv"), prediction_csv(trace))


def prediction_csv(trace: Trace) -> str:
    """Text of a prediction CSV, a row per frame.

    Columns: frame (0-based), time (s), valence, arousal; label_valence, label_arousal where the clip is annotated
    (empty where a row is not); face, audio (0 or 1) where the run reads such a stream; region; valence_std,
    arousal_std and far_from_training (0 or 1) of runs with a variance head; interpolated (0 or 1); face_quality (0 to
    1) and speech (0 or 1) where the cache holds them.
    """
    clip = trace.clip
    columns: dict[str, Iterable[str]] = {
        "frame": map(str, range(len(clip.time))),
        "time": (f"{t:.6f}" for t in clip.time.tolist()),
    }
    columns |= {name: [f"{x:.6f}" for x in trace.va[:, k].tolist()] for k, name in enumerate(DIMENSIONS)}
    if clip.valid.any():
        for k, name in enumerate(DIMENSIONS):
            pairs = zip(clip.value[:, k].tolist(), clip.valid[:, k].tolist(), strict=True)
            columns[f"label_{name}"] = [f"{x:.6f}" if valid else "" for x, valid in pairs]
    flags = {"face": trace.face, "audio": trace.audio}
    columns |= {name: map(str, mask.astype(int).tolist()) for name, mask in flags.items() if mask is not None}
    columns["region"] = ("_".join(REGIONS[k]) for k in trace.region.tolist())
    if trace.std is not None:
        columns |= {f"{name}_std": [f"{x:.6f}" for x in trace.std[:, k].tolist()] for k, name in enumerate(DIMENSIONS)}
    flags = {"far_from_training": trace.far, "interpolated": trace.interpolated}
    columns |= {name: map(str, mask.astype(int).tolist()) for name, mask in flags.items() if mask is not None}
    if trace.face_quality is not None:
        columns["face_quality"] = [f"{x:.3f}" for x in trace.face_quality.tolist()]
    if trace.speech is not None:
        columns["speech"] = map(str, trace.speech.astype(int).tolist())
    rows = (",".join(row) for row in zip(*columns.values(), strict=True))
    return "\n".join([",".join(columns), *rows]) + "\n"
