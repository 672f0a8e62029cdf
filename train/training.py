"""A whole run: resolve, load, fit, evaluate the best epoch, write everything into the run's folder."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vaflow.cache import Cache, address
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.train.breakdown import Groups
from vaflow.train.builder import build_model, open_tower
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.evaluate import check_complete, evaluate_windows, failed_items, score_traces, write_predictions
from vaflow.train.heads.model import VAModel
from vaflow.train.inputs import Inputs, check_same, resolve
from vaflow.train.loop import Progress, Row, fit, seeded
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.provenance import run_maker, write_sources
from vaflow.train.reporting import Board, describe, reporter, warn_of_labels
from vaflow.train.runs import RunFolder, RunRecord, check_unchanged, load_run, new_record, require_record
from vaflow.train.smoothing import Smoothing
from vaflow.train.storage import write_tensors
from vaflow.train.windows import WindowSet, without_modality

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Both splits, loaded for some settings of windows and streams; runs that share those can share it."""

    train: WindowSet
    val: WindowSet


@dataclass(frozen=True)
class Result:
    """What a run came to: its metrics, and whether it had been finished before."""

    metrics: dict[str, Any]
    was_done: bool = False


def load_data(
    cache: Cache,
    config: TrainConfig,
    inputs: Inputs,
    *,
    device: torch.device | str = "cpu",
    scratch: Path | None = None,
    show: bool = False,
) -> Data:
    """Read both splits of resolved settings.

    Raises:
        UsageError: a split is not there or has no labels.
        DataError: features or labels are unusable; the clip is named.
    """
    splits = (config.train_split, config.val_split)
    train, val = (
        load_split(cache, split, inputs.streams, config, device=device, scratch=scratch, show=show) for split in splits
    )
    if not len(train.trainable):
        raise UsageError(explain(f"No window of split {config.train_split!r} has a labelled frame"))
    return Data(train, val)


def train_run(
    cache: Cache,
    config: TrainConfig,
    out: Path,
    *,
    data: Data | None = None,
    weights: Mapping[str, Path] | None = None,
    allow_missing: bool = False,
    tensorboard: bool = True,
    pictures: bool = True,
    show: bool = False,
) -> Result:
    """Train, or go on with, the run in `out`.

    Args:
        cache: what to train on.
        config: settings; what they leave open is resolved from the cache.
        out: the run's folder.
        data: both splits, if they are loaded already, for exactly these streams and windows.
        weights: of fine-tuning, stream -> local weights of its encoder, instead of the hub's.
        allow_missing: leave labelled validation clips without features out of the metrics.
        tensorboard: write event files, too.
        pictures: draw the training curves and the predictions.
        show: progress bars.

    Raises:
        UsageError: settings, or a folder that holds another run.
        WeightsError, FingerprintError: of fine-tuning: the cache's encoders cannot be had.
        DataError: features, labels or losses are unusable; the clips are named.
    """
    if weights and not config.finetune:
        raise UsageError(explain("Heads are trained on cached features and need no weights", remedy="Add --finetune"))
    config, inputs = resolve(cache, config)
    folder = RunFolder(Path(out))
    folder.make()
    record = new_record(cache.place, config, inputs)
    old = folder.record()
    if old is not None:
        check_unchanged(folder, old, record)
        if folder.done:
            return Result(folder.read_metrics(), was_done=True)
    if config.finetune:
        from vaflow.train.finetune import run as tuning

        job = tuning.Job(cache, config, inputs, folder, record, allow_missing, tensorboard, pictures, show)
        return Result(tuning.finetune(job, weights or {}))
    device = choose_device(config.device)
    if data is None:
        data = load_data(cache, config, inputs, device=device, scratch=folder.path, show=show)
    failed = failed_items(cache, config.val_split, config.fold_splits)
    check_complete(data.val, failed, allow_missing)  # now, not after hours
    record = replace(record, data=counts(config, data))
    check_data(folder, old, record)
    folder.write_record(record)
    describe(config, data.train, data.val)
    model, progress = _fit(folder, config, inputs, data, device, tensorboard=tensorboard, show=show)
    return Result(finish(folder, cache, config, model, progress, data, allow_missing, pictures))


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
) -> dict[str, Any]:
    """Score a finished run on a split of a cache, and write the predictions into the run's folder.

    Args:
        run: the run's folder.
        cache: the one it was trained on, or another with the same streams.
        split: None: the run's validation split.
        device: "auto", "cpu" or "cuda[:N]".
        allow_missing: leave labelled clips without features out of the metrics.
        write: write `predictions/<split>/`, and `metrics.json` where this is the split that it is about.
        show: progress bars.
        without: "visual" or "audio": mark that modality as missing everywhere.
        groups: kind -> item -> group, for metrics of each group.
        smoothing: "stored": the one that `vaflow smooth` stored with the run, if any. Another one, or None, applies to
            this evaluation only: predictions go to a folder of its own, and `metrics.json` stays.

    Raises:
        UsageError: the run is not one or unfinished, the split is not there or not annotated, the run does not read
            what it is to do without, or nothing else, or the groups name none of the clips.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: features are unusable or missing; the clips are named.
    """
    target = choose_device(device)
    trained = load_run(run, target)
    only_now = smoothing != "stored"
    if smoothing != "stored":
        trained = replace(trained, smoothing=smoothing)
    config = trained.record.config
    split = config.val_split if split is None else split
    windows = read_for(run, trained.record, cache, partial(load_split, cache, split, device=target, show=show))
    failed = failed_items(cache, split, config.fold_splits)
    lost = check_complete(windows, failed, allow_missing)
    traces = list(trained.traces(windows if without is None else without_modality(windows, without)))
    report = score_traces(traces, split, lost, failed, centers=config.centers, groups=groups)
    report |= {"without": without} if without else {}
    report |= {"smoothing": trained.smoothing.summary} if trained.smoothing else {}
    if write:
        folder = RunFolder(Path(run))
        name = f"{split}-without-{without}" if without else split
        if only_now:
            name += f"-smooth-{trained.smoothing.kind if trained.smoothing else 'none'}"
        place = folder.predictions(name)
        write_predictions(place, traces)
        write_sources(place, run_maker(folder.path, trained.record), cache, [trace.clip.item for trace in traces])
        if not (without or only_now) and split == config.val_split and address(cache.place) == trained.record.cache:
            folder.update_metrics(report)
    return report


def read_for(run: Path, record: RunRecord, cache: Cache, read: Callable[..., WindowSet]) -> WindowSet:
    """Clips of a cache, as a run's heads want them; those of a fine-tuned run with what its own encoders make.

    Args:
        run: its folder.
        record: what it says.
        cache: where the clips are; extracted with the run's own encoders, its features are used as they are.
        read: streams, settings -> the clips.

    Raises:
        UsageError: the cache lacks a stream, or the pixels that the run's own encoders read.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: features are unusable; the clips are named.
    """
    if record.tuned:
        from vaflow.train.finetune.run import made_by_run, tuned_windows

        if not made_by_run(record, cache):
            check_same(record.streams, cache)
            windows = read(record.streams, record.config)
            return tuned_windows(run, record, cache, windows)
    check_same(record.wanted, cache)
    return read(record.wanted, record.config)


def counts(config: TrainConfig, data: Data) -> dict[str, dict[str, int]]:
    """Split -> how many clips, windows and labelled frames it has, of either dimension and of each."""
    pairs = ((config.train_split, data.train), (config.val_split, data.val))
    return {
        split: {"clips": len(w.clips), "windows": len(w), "labelled_frames": w.labelled_rows}
        | {f"labelled_{name}": count for name, count in zip(DIMENSIONS, w.labelled_each, strict=True)}
        for split, w in pairs
    }


def check_data(folder: RunFolder, old: RunRecord | None, new: RunRecord) -> None:
    """An interrupted run goes on with the clips that it began with only."""
    if old is None or old.data == new.data or not folder.checkpoint_file.exists():
        return
    raise UsageError(
        explain(
            f"The cache has changed since the interrupted run in {folder.path} began",
            expected=f"{old.data}",
            got=f"{new.data}",
            remedy="Choose another folder for --out, or delete this one to begin anew",
        )
    )


def new_model(config: TrainConfig, inputs: Inputs, data: Data, device: torch.device) -> VAModel:
    """Heads with fresh weights, and what they must know of the training split."""
    tower = open_tower(config, inputs, device)
    with seeded(config.seed):
        context = None if tower is None else (config.prompt_context, tower.width)
        model = build_model(config, inputs.specs, inputs.prototypes, context, inputs.targets)
    model.to(device)
    if tower is not None and model.prompt is not None:
        model.prompt.attach(tower)
    for name in model.standardized:
        model.set_statistics(name, *data.train.statistics(name))
    return model


@contextmanager
def telling(
    folder: RunFolder, config: TrainConfig, *, tensorboard: bool, show: bool
) -> Iterator[Callable[[Row], None]]:
    """What to call after every epoch, with a bar and a board that are open meanwhile."""
    with ExitStack() as stack:
        if show:  # log lines above the bar, not through it
            stack.enter_context(logging_redirect_tqdm())
        bar = stack.enter_context(tqdm(total=config.epochs, desc="training", unit="epoch", disable=not show))
        board = stack.enter_context(Board(folder.path / "tensorboard")) if tensorboard else None
        yield reporter(config, bar, board)


def _fit(
    folder: RunFolder,
    config: TrainConfig,
    inputs: Inputs,
    data: Data,
    device: torch.device,
    *,
    tensorboard: bool,
    show: bool,
) -> tuple[VAModel, Progress]:
    model = new_model(config, inputs, data, device)
    with telling(folder, config, tensorboard=tensorboard, show=show) as on_epoch:
        progress = fit(model, data.train, data.val, config, checkpoint=folder.checkpoint_file, on_epoch=on_epoch)
    model.load_state_dict(dict(progress.best))
    return model, progress


def finish(
    folder: RunFolder,
    cache: Cache,
    config: TrainConfig,
    model: VAModel,
    progress: Progress,
    data: Data,
    allow_missing: bool,
    pictures: bool,
) -> dict[str, Any]:
    """Evaluate the best epoch and write all files; `metrics.json` is the last one."""
    split = config.val_split
    predictor: nn.Module = model
    folder.write_history(progress.history)
    write_tensors(folder.weights_file, progress.best)
    for name, weights in progress.each.items():
        write_tensors(folder.each_file(name), weights)
    if progress.each:
        predictor = load_run(folder.path, next(model.parameters()).device).predictor
    failed = failed_items(cache, split, config.fold_splits)
    report, traces = evaluate_windows(
        predictor, data.val, split, centers=config.centers, allow_missing=allow_missing, failed=failed
    )
    write_predictions(folder.predictions(split), traces)
    record = require_record(folder.path)
    maker = run_maker(folder.path, record)
    write_sources(folder.predictions(split), maker, cache, [trace.clip.item for trace in traces])
    if pictures:
        from vaflow.train.plots import draw_run

        draw_run(folder.path, progress.history, data.val, traces)
    report |= {"best_epoch": progress.best_epoch, "epochs": progress.epoch}
    report |= {"best_epoch_each": dict(progress.each_epoch)} if progress.each else {}
    for warning in report["warnings"]:
        log.warning("%s: %s", split, warning)
    report["warnings"] += warn_of_labels(config, data.train)
    folder.write_metrics(report)
    folder.checkpoint_file.unlink(missing_ok=True)
    return report
