"""Report the progress of a training run: log lines, a progress bar, TensorBoard."""

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vaflow.demonstration import demonstration_notice
from vaflow.regions import region_table
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.evaluate import featureless, label_warnings
from vaflow.train.loop import Row
from vaflow.train.metrics import DIMENSIONS, region_occupancy
from vaflow.train.windows import WindowSet

log = logging.getLogger(__name__)


def describe(config: TrainConfig, train: WindowSet, val: WindowSet) -> None:
    """Log the sizes of both splits, missing features, unused windows and the distribution of the labels."""
    warn_of_demonstration((*config.visual, *config.audio))
    for split, windows in ((config.train_split, train), (config.val_split, val)):
        left_out = len(windows) - len(windows.trainable)
        log.info(
            "%s: %d clips, %d windows, %d labelled frames",
            split,
            len(windows.clips),
            len(windows),
            windows.labelled_rows,
        )
        if windows is train and left_out:
            log.info("%s: %d windows without any label are left out of training", split, left_out)
        for stream in windows.streams:
            lacking = sum(stream.name in clip.missing for clip in windows.clips)
            if lacking:
                log.warning("%s: %d of %d clips have no %s", split, lacking, len(windows.clips), stream.name)
        if featureless(windows):
            log.warning("%s: %d clips have no features at all", split, len(featureless(windows)))
    log.info("%s", describe_labels(train, config.centers))
    if config.text and config.kl_weight and not any(clip.valid.all(axis=1).any() for clip in train.clips):
        log.warning(
            "%s: no frame is labelled in both dimensions, so the prompt loss is 0; leave the prompt head out with "
            "--kl-weight 0",
            config.train_split,
        )
    warn_of_labels(config, train)


def warn_of_demonstration(streams: Iterable[str]) -> None:
    """Log that encoders with random weights are used, if they are."""
    notice = demonstration_notice(streams)
    if notice:
        log.warning("%s", notice)


def describe_labels(windows: WindowSet, centers: float) -> str:
    """Percentages of labelled frames per region, as a table: valence in rows, arousal in columns."""
    value = np.concatenate([clip.value for clip in windows.clips])
    valid = np.concatenate([clip.valid for clip in windows.clips])
    share = region_occupancy(np.where(valid, value, 0), valid, centers)
    if not np.isfinite(share).all():
        return "No frame is labelled in both dimensions: the labels have no regions"
    return f"Share of labelled frames per region:\n{region_table(share.tolist())}"


def warn_of_labels(config: TrainConfig, train: WindowSet) -> list[str]:
    """Log warnings about nearly constant labels and return them."""
    label = np.concatenate([clip.value for clip in train.clips])
    valid = np.concatenate([clip.valid for clip in train.clips])
    warnings = [f"{config.train_split}: {warning}" for warning in label_warnings(label, valid)]
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


def reporter(config: TrainConfig, bar: "tqdm[Any]", board: "Board | None") -> Callable[[Row], None]:
    """A function that reports an epoch to the progress bar, the log and TensorBoard."""

    def score(value: float) -> str:
        return "-" if np.isnan(value) else f"{value:.4f}"  # a dimension can lack labels

    def report(row: Row) -> None:
        bar.n = int(row["epoch"])
        bar.set_postfix_str(f"val CCC {row['val_ccc_mean']:.3f}")
        scores = [f"{name} {score(row[f'val_ccc_{name}'])}" for name in (*DIMENSIONS, "mean")]
        log.info(
            "epoch %2d%s  loss %.4f  val CCC  %s  (%.1f s)",
            row["epoch"],
            "" if config.epochs == AUTO else f"/{config.epochs}",
            row["loss_total"],
            "  ".join(scores),
            row["train_seconds"] + row["val_seconds"],
        )
        if board is not None:
            board.add(row)

    return report


class Board:
    """Writer of TensorBoard event files; imports TensorBoard when it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def supports(folder: Path) -> bool:
        """Whether TensorBoard can write below `folder`: it requires names in UTF-8."""
        try:
            str(folder).encode("utf-8")
        except UnicodeEncodeError:
            log.warning("No TensorBoard files are written: TensorBoard requires folder names in UTF-8")
            return False
        return True

    def __enter__(self) -> "Board":
        from torch.utils.tensorboard import SummaryWriter

        self._hook = threading.excepthook
        threading.excepthook = self._failed
        self._writer = SummaryWriter(str(self.folder))
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _failed(self, arguments: threading.ExceptHookArgs) -> None:
        """Silence a write error of the event thread: the next epoch raises it again."""
        if arguments.exc_type is None or not issubclass(arguments.exc_type, OSError):
            self._hook(arguments)

    def add(self, row: Row) -> None:
        """Write the values of one epoch."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))
