"""Evaluation of a finished run on a split of a cache, and the choice of its smoothing."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vaflow.cache import Cache, address, is_cache, open_cache
from vaflow.cache.maintenance import other_versions
from vaflow.device import choose_device
from vaflow.encoders import warn_of_demonstration
from vaflow.errors import CacheError, UsageError, VaflowError, count, examples, explain
from vaflow.files import read_failures
from vaflow.train.config import NONE, TrainConfig
from vaflow.train.data import load_split
from vaflow.train.folds import Groups, split_items
from vaflow.train.inputs import InputStream, check_same, check_same_targets
from vaflow.train.prediction_files import Maker, weights_digests, write_evaluation
from vaflow.train.run_folder import RunFolder, load_run, require_record, width_of
from vaflow.train.run_record import (
    ClipDigest,
    RunRecord,
    cache_places,
    clip_digests,
    shared_recordings,
    streams_read,
)
from vaflow.train.scores import check_complete, failed_items, featureless, score_traces
from vaflow.train.smoothing import FILTERS, Smoothing, candidate_widths, choose_width, write_smoothing
from vaflow.train.traces import Trace
from vaflow.train.uncertainty import calibrate, uncertainty_report, write_calibration
from vaflow.train.windows import WindowSet, without_modality

log = logging.getLogger(__name__)


def evaluate_run(
    run: Path,
    cache: Cache,
    split: str | None = None,
    *,
    device: str = "auto",
    allow_missing: bool = False,
    write: bool = True,
    show: bool = False,
    without: str | None = None,
    groups: Groups | None = None,
    smoothing: Smoothing | Literal["stored"] | None = "stored",
    fold_splits: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Score a finished run on a split of a cache, and write the predictions into the run's folder.

    Args:
        cache: the one it was trained on, or another with the same streams.
        split: None: the run's validation split.
        allow_missing: leave labelled clips without features out of the metrics.
        write: write `predictions/<split>/`, and `metrics.json` where this is the split that it is about.
        without: "visual" or "audio": mark that modality as missing everywhere.
        groups: kind -> item -> group, for metrics of each group.
        smoothing: "stored": the one that `vaflow smooth` stored with the run, if any. Another one, or None, applies to
            this evaluation only: predictions go to a folder of its own, and `metrics.json` stays.
        fold_splits: splits that are divided where `split` is a fold; None: those of the run.

    Raises:
        UsageError: the run is unfinished or no run, the split does not exist or is not annotated, the run does not
            read the modality `without` or no other one, or the groups name none of the clips.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: features are unusable or missing; the clips are named.
        VaflowError: another process trained or smoothed the run meanwhile; nothing is written.
    """
    target = choose_device(device)
    weights = weights_digests(Path(run)) if write else {}
    trained = load_run(run, target)
    if smoothing != "stored":
        trained = trained.with_smoothing(smoothing)
    config = trained.record.config
    warn_of_demonstration((*config.visual, *config.audio))
    split = config.val_split if split is None else split
    divided = config.fold_splits if fold_splits is None else fold_splits

    def read(streams: Sequence[InputStream], settings: TrainConfig) -> WindowSet:
        return load_split(cache, split, streams, replace(settings, fold_splits=divided), device=target, show=show)

    windows = read_for(run, trained.record, cache, read)
    check_same_targets(trained.record.targets, cache)
    failed = failed_items(cache, split, divided)
    lost = check_complete(windows, failed, allow_missing)
    traces = list(trained.traces(windows if without is None else without_modality(windows, without)))
    report = score_traces(traces, split, lost, failed, centers=config.centers, groups=groups)
    if trained.calibration is not None and not without:
        used = [trace for trace in traces if trace.clip.item not in report["missing"]["clips"]]
        calibrated_on = trained.calibration.split
        if not _holds_validation_clips(run, trained.record, cache):
            calibrated_on += " of the training cache"  # no label here has helped to choose the intervals
        report |= uncertainty_report(used, split, calibrated_on)
    items = [trace.clip.item for trace in traces]
    report["warnings"] += data_warnings({run: trained.record}, cache, split, items, report["ccc"])
    report |= {"without": without} if without else {}
    report |= {"smoothing": trained.smoothing.summary} if trained.smoothing else {}
    if write:
        name = f"{split}-without-{without}" if without else split
        if smoothing != "stored":
            name += f"-smooth-{trained.smoothing.kind if trained.smoothing else 'none'}"
        metrics = report if name == split == config.val_split else None
        _write(Path(run), trained.record, weights, cache, name, traces, metrics)
    return report


def _write(
    run: Path,
    record: RunRecord,
    weights: Mapping[str, str],
    cache: Cache,
    name: str,
    traces: Sequence[Trace],
    metrics: dict[str, Any] | None,
) -> None:
    """Write the predictions of an evaluation, and `metrics.json` if `metrics` are those of the run on its cache.

    Raises:
        VaflowError: the weights are no longer those that the evaluation began with.
    """
    if weights_digests(run) != weights:
        problem = f"{run} was trained or smoothed while it was evaluated"
        raise VaflowError(explain(problem, remedy="Evaluate it again"))
    folder = RunFolder(run)
    write_evaluation(folder.output_folder(name), Maker(run, {run: record}), cache, traces)
    if metrics is not None and address(cache.place) in cache_places(run, record):
        folder.update_metrics(metrics)


def data_warnings(
    runs: Mapping[Path, RunRecord],
    cache: Cache,
    split: str,
    items: Sequence[str],
    ccc: Mapping[str, float | None],
) -> list[str]:
    """Warnings about the data of runs: dimensions without training labels, clips that count twice or were trained on.

    Args:
        runs: run -> its record. A warning that does not hold for all of them names its run.
        cache: holds the clips `items` of `split`; it need not be the one that the runs were trained on.
        ccc: dimension -> score; None: not scored.
    """
    each: dict[Path, list[str]] = {}
    for run, record in runs.items():
        untrained = [name for name in record.untrained if ccc[name] is not None]
        each[run] = [f"{record.config.train_split}: {name} is not labelled in this split" for name in untrained]
        each[run] += _shared_recordings(run, record, cache, split, items)
    common = [text for text in next(iter(each.values())) if all(text in texts for texts in each.values())]
    own = [f"{run}: {text}" for run, texts in each.items() for text in texts if text not in common]
    streams = sorted({stream.name for record in runs.values() for stream in record.streams})
    return outdated_warnings(cache, streams, split, items) + common + own


def outdated_warnings(cache: Cache, streams: Iterable[str], split: str, items: Collection[str]) -> list[str]:
    """Warnings about clips of which a cache holds earlier data.

    They failed when they were extracted last, or were extracted again with their new labels, but not for all `streams`.
    """
    warnings = [
        f"{split}: {name} was made from another video than the labels for {count(len(behind), 'clip')} "
        f"({examples(behind)}); extract or import {name} again"
        for name, behind in other_versions(cache, streams, items).items()
    ]
    listed: dict[str, float] = {}
    for failure in read_failures(cache.path):
        if failure.stage != "features":  # of an import
            listed[failure.item] = max(failure.listed, listed.get(failure.item, 0.0))
    failed = [item for item in sorted(listed.keys() & set(items)) if _last_commit(cache, item) <= listed[item]]
    if not failed:
        return warnings
    clips = f"{count(len(failed), 'clip')} ({examples(failed)})"
    return [f"{split}: the last extraction failed for {clips}; earlier data are used", *warnings]


def _last_commit(cache: Cache, item: str) -> float:
    """When a stream of an item was last written, in seconds since 1970: lists of other shards may be older."""
    created = [cache.record(stream, item).created for stream in cache.streams() if cache.has(stream, item)]
    try:
        return max((datetime.fromisoformat(time).timestamp() for time in created if time), default=0.0)
    except (ValueError, OverflowError):  # another program's record
        return 0.0


def _shared_recordings(run: Path, record: RunRecord, cache: Cache, split: str, items: Sequence[str]) -> list[str]:
    """Warnings about clips that share a file with each other, or with clips that the run was trained on."""
    config = record.config

    def digests(of: Cache, clips: Iterable[str]) -> dict[str, ClipDigest]:
        return clip_digests(of, [stream.name for stream in record.streams if stream.name in of.streams()], clips)

    train: dict[str, ClipDigest] = {}
    places = [place for place in cache_places(run, record) if "://" not in place and is_cache(place)]
    if places and split != config.train_split:
        try:
            trained_on = cache if address(cache.place) in places else open_cache(places[0])
            train = digests(trained_on, _training_clips(run, config, trained_on))
        except (CacheError, UsageError) as error:  # such as a damaged or changed cache, while another one is scored
            log.warning("Not compared with the clips that %s was trained on: %s", run, error)
    return shared_recordings(split, digests(cache, items), train)


def _holds_validation_clips(run: Path, record: RunRecord, cache: Cache) -> bool:
    """Whether a cache is that of a run's training, or holds clips of its validation split as they were there."""
    if address(cache.place) in cache_places(run, record):
        return True
    recorded = (RunFolder(run).read_clips() or {}).get(record.config.val_split, {})
    clips = clip_digests(cache, streams_read(record.config, cache), sorted(recorded.keys() & set(cache.items())))
    return any(recorded[item] == clip.content for item, clip in clips.items())


def _training_clips(run: Path, config: TrainConfig, cache: Cache) -> list[str]:
    """Clips of a cache that a run was trained on; the split can have changed since, and so can a file of groups."""
    known = (RunFolder(run).read_clips() or {}).get(config.train_split)
    if known is None:  # a run of an older version
        return split_items(cache, config.train_split, config.fold_splits, config.fold_groups)
    return sorted(known.keys() & set(cache.items()))


def read_for(run: Path, record: RunRecord, cache: Cache, read: Callable[..., WindowSet]) -> WindowSet:
    """Load clips of a cache as inputs of a run; a fine-tuned run encodes them with its encoders.

    Args:
        cache: holds the clips; features that were extracted with the run's encoders are used unchanged.
        read: streams, settings -> the clips.

    Raises:
        UsageError: the cache lacks a stream, or the pixels that the run's own encoders read.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: features are unusable; the clips are named.
    """
    if record.tuned:
        from vaflow.train.finetune import made_by_run, tuned_windows

        if not made_by_run(record, cache):
            check_same(record.streams, cache)
            windows = read(record.streams, record.config)
            return tuned_windows(run, record, cache, windows)
    check_same(record.head_streams, cache)
    return read(record.head_streams, record.config)


def choose_smoothing(
    run: Path, cache: Cache, kind: str, seconds: float | None = None, *, device: str = "auto", show: bool = False
) -> Smoothing | None:
    """Choose a smoothing for a run's traces, None for the kind "none"; nothing is stored.

    Args:
        kind: "mean", "savgol", or "none".
        seconds: width; None: the one with the best mean CCC on the run's validation split.

    Raises:
        UsageError: an unknown kind, a negative width, or not a run.
        FingerprintError: the cache's streams were made with other settings than the run's.
    """
    if kind not in (NONE, *FILTERS):
        raise UsageError(explain("Unknown smoothing", got=kind, choices=(NONE, *FILTERS)))
    if kind == NONE:
        return None
    if seconds is not None:
        return Smoothing(kind, seconds)
    traces, config = _validation_traces(run, cache, None, device, show)
    return choose_width(traces, kind, config.val_split, candidate_widths(traces, config.grid.step))


def store_smoothing(
    run: Path, cache: Cache, smoothing: Smoothing | None, *, device: str = "auto", show: bool = False
) -> None:
    """Store a smoothing with a run, and calibrate the standard deviations of a run with a variance head for it.

    Raises:
        UsageError, FingerprintError: as `choose_smoothing`.
    """
    calibration = None
    if require_record(run).config.uncertainty != NONE:
        traces, config = _validation_traces(run, cache, smoothing, device, show)
        calibration = calibrate(traces, config.val_split, width_of(smoothing))
    write_smoothing(run, smoothing)
    if calibration is not None:
        write_calibration(run, calibration)


def _validation_traces(
    run: Path, cache: Cache, smoothing: Smoothing | None, device: str, show: bool
) -> tuple[Sequence[Trace], TrainConfig]:
    """Traces of a run on its validation split, not calibrated, of the clips with features; and its settings."""
    target = choose_device(device)
    trained = replace(load_run(run, target), smoothing=smoothing)
    config = trained.record.config
    read = partial(load_split, cache, config.val_split, device=target, show=show)
    windows = read_for(run, trained.record, cache, read)
    lost = {clip.item for clip in featureless(windows)}
    return [trace for trace in trained.raw_traces(windows) if trace.clip.item not in lost], config
