"""A whole run: resolve, load, fit, evaluate the best epoch, write everything into the run's folder."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.train.builder import build_model, choose_device
from vaflow.train.config import TrainConfig
from vaflow.train.data import describe_labels, load_split
from vaflow.train.evaluate import evaluate_windows, failed_items, featureless, write_predictions
from vaflow.train.heads.model import VAModel
from vaflow.train.inputs import Inputs, resolve
from vaflow.train.loop import Progress, Row, fit, seeded
from vaflow.train.runs import RunFolder, RunRecord, check_unchanged, new_record, write_tensors
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
    record = replace(record, data=_counts(config, data))
    _check_data(folder, old, record)
    folder.write_record(record)
    _describe(config, data)
    model, progress = _fit(folder, config, inputs, data, device, tensorboard=tensorboard, show=show)
    return Result(_finish(folder, cache, config, model, progress, data, allow_missing, pictures))


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


def _describe(config: TrainConfig, data: Data) -> None:
    for split, windows in ((config.train_split, data.train), (config.val_split, data.val)):
        left_out = len(windows) - len(windows.trainable)
        log.info(
            "%s: %d clips, %d windows, %d labelled frames",
            split,
            len(windows.clips),
            len(windows),
            windows.labelled_rows,
        )
        if windows is data.train and left_out:
            log.info("%s: %d windows without any label are left out of training", split, left_out)
        for stream in windows.streams:
            lacking = sum(stream.name in clip.missing for clip in windows.clips)
            if lacking:
                log.warning("%s: %d of %d clips have no %s", split, lacking, len(windows.clips), stream.name)
        if featureless(windows):
            log.warning("%s: %d clips have no features at all", split, len(featureless(windows)))
    log.info("%s", describe_labels(data.train, config.centers))


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
    with seeded(config.seed):
        model = build_model(config, inputs.specs, inputs.prototypes)
    model.to(device)
    if config.normalize == "standard":
        for stream in inputs.specs:
            model.set_statistics(stream.name, *data.train.statistics(stream.name))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=config.epochs, desc="training", unit="epoch", disable=not show))
        board = stack.enter_context(_Board(folder.path / "tensorboard")) if tensorboard else None
        progress = fit(
            model,
            data.train,
            data.val,
            config,
            checkpoint=folder.checkpoint_file,
            on_epoch=_reporter(config, bar, board),
        )
    model.load_state_dict(dict(progress.best))
    return model, progress


def _reporter(config: TrainConfig, bar: "tqdm[Any]", board: "_Board | None") -> Callable[[Row], None]:
    def report(row: Row) -> None:
        bar.n = int(row["epoch"])
        bar.set_postfix_str(f"val CCC {row['val_ccc_mean']:.3f}")
        log.info(
            "epoch %2d/%d  loss %.4f  val CCC  valence %.4f  arousal %.4f  mean %.4f  (%.1f s)",
            row["epoch"],
            config.epochs,
            row["loss_total"],
            row["val_ccc_valence"],
            row["val_ccc_arousal"],
            row["val_ccc_mean"],
            row["train_seconds"] + row["val_seconds"],
        )
        if board is not None:
            board.add(row)

    return report


class _Board:
    """TensorBoard event files; nothing of it is imported before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "_Board":
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder))
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, row: Row) -> None:
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))


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
