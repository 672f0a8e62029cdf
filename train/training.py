"""A whole run: resolve, load, fit, evaluate the best epoch, write everything into the run's folder."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.train.builder import build_model, choose_device
from vaflow.train.config import TrainConfig
from vaflow.train.context import open_tower
from vaflow.train.data import load_split
from vaflow.train.evaluate import check_complete, evaluate_windows, failed_items, write_predictions
from vaflow.train.heads.model import VAModel
from vaflow.train.inputs import Inputs, check_same, resolve
from vaflow.train.loop import Progress, fit, seeded
from vaflow.train.reporting import Board, describe, reporter
from vaflow.train.runs import RunFolder, RunRecord, check_unchanged, load_run, new_record
from vaflow.train.storage import write_tensors
from vaflow.train.windows import WindowSet

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
        allow_missing: leave labelled validation clips without features out of the metrics.
        tensorboard: write event files, too.
        pictures: draw the training curves and the predictions.
        show: progress bars.

    Raises:
        UsageError: settings, or a folder that holds another run.
        DataError: features, labels or losses are unusable; the clips are named.
    """
    config, inputs = resolve(cache, config)
    folder = RunFolder(Path(out))
    folder.make()
    record = new_record(cache.path, config, inputs)
    old = folder.record()
    if old is not None:
        check_unchanged(folder, old, record)
        if folder.done:
            return Result(folder.read_metrics(), was_done=True)
    device = choose_device(config.device)
    if data is None:
        data = load_data(cache, config, inputs, device=device, scratch=folder.path, show=show)
    check_complete(data.val, failed_items(cache, config.val_split), allow_missing)  # now, not after hours
    record = replace(record, data=_counts(config, data))
    _check_data(folder, old, record)
    folder.write_record(record)
    describe(config, data.train, data.val)
    model, progress = _fit(folder, config, inputs, data, device, tensorboard=tensorboard, show=show)
    return Result(_finish(folder, cache, config, model, progress, data, allow_missing, pictures))


def evaluate_run(
    run: Path,
    cache: Cache,
    split: str | None = None,
    *,
    device: str = "auto",
    allow_missing: bool = False,
    write: bool = True,
    show: bool = False,
) -> dict[str, Any]:
    """Measure a finished run on a split of a cache, and write the predictions into the run's folder.

    Args:
        run: the run's folder.
        cache: the one it was trained on, or another with the same streams.
        split: None: the run's validation split.
        device: "auto", "cpu" or "cuda[:N]".
        allow_missing: leave labelled clips without features out of the metrics.
        write: write `predictions/<split>/`.
        show: progress bars.

    Raises:
        UsageError: the run is not one or unfinished, the split is not there or not annotated.
        FingerprintError: the cache's streams were made with other settings than the run's.
        DataError: features are unusable or missing; the clips are named.
    """
    target = choose_device(device)
    trained = load_run(run, target)
    config, streams = trained.record.config, trained.record.streams
    split = config.val_split if split is None else split
    check_same(streams, cache)
    windows = load_split(cache, split, streams, config, device=target, show=show)
    report, traces = evaluate_windows(
        trained.model,
        windows,
        split,
        centers=config.centers,
        allow_missing=allow_missing,
        failed=failed_items(cache, split),
    )
    if write:
        write_predictions(RunFolder(Path(run)).predictions(split), traces)
    return report


def _counts(config: TrainConfig, data: Data) -> dict[str, dict[str, int]]:
    pairs = ((config.train_split, data.train), (config.val_split, data.val))
    return {split: {"clips": len(w.clips), "windows": len(w), "labelled_frames": w.labelled_rows} for split, w in pairs}


def _check_data(folder: RunFolder, old: RunRecord | None, new: RunRecord) -> None:
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
    tower = open_tower(config, inputs, device)
    with seeded(config.seed):
        context = None if tower is None else (config.prompt_context, tower.width)
        model = build_model(config, inputs.specs, inputs.prototypes, context)
    model.to(device)
    if tower is not None and model.prompt is not None:
        model.prompt.attach(tower)
    for name in model.standardized:
        model.set_statistics(name, *data.train.statistics(name))
    with ExitStack() as stack:
        if show:  # log lines above the bar, not through it
            stack.enter_context(logging_redirect_tqdm())
        bar = stack.enter_context(tqdm(total=config.epochs, desc="training", unit="epoch", disable=not show))
        board = stack.enter_context(Board(folder.path / "tensorboard")) if tensorboard else None
        progress = fit(
            model,
            data.train,
            data.val,
            config,
            checkpoint=folder.checkpoint_file,
            on_epoch=reporter(config, bar, board),
        )
    model.load_state_dict(dict(progress.best))
    return model, progress


def _finish(
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
    folder.write_history(progress.history)
    write_tensors(folder.weights_file, progress.best)
    failed = failed_items(cache, split)
    report, traces = evaluate_windows(
        model, data.val, split, centers=config.centers, allow_missing=allow_missing, failed=failed
    )
    write_predictions(folder.predictions(split), traces)
    if pictures:
        from vaflow.train.plots import draw_run

        draw_run(folder.path, progress.history, data.val, traces)
    report |= {"best_epoch": progress.best_epoch, "epochs": progress.epoch}
    for warning in report["warnings"]:
        log.warning("%s: %s", split, warning)
    folder.write_metrics(report)
    folder.checkpoint_file.unlink(missing_ok=True)
    return report
