"""What a training logs: the loaded splits and their labels, the progress bar, the scores of each epoch, TensorBoard."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vaflow.encoders import warn_of_demonstration
from vaflow.encoders.prompts import region_table
from vaflow.train.checkpoint import Row
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.metrics import SCORES, region_occupancy
from vaflow.train.scores import featureless, label_warnings
from vaflow.train.windows import WindowSet

log = logging.getLogger(__name__)


def describe(config: TrainConfig, train: WindowSet, val: WindowSet) -> None:
    """Log the sizes of both splits, missing features, unused windows and the distribution of the labels."""
    warn_of_demonstration((*config.visual, *config.audio))
    for split, windows in ((config.train_split, train), (config.val_split, val)):
        left_out = len(windows) - len(windows.trainable)
        sizes = len(windows.clips), len(windows), windows.labelled_rows
        log.info("%s: %d clips, %d windows, %d labelled frames", split, *sizes)
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


def reporter(config: TrainConfig, bar: "tqdm[Any]", write: Callable[[Row], None] | None) -> Callable[[Row], None]:
    """A function that reports an epoch to the progress bar, the log and TensorBoard."""

    def score(value: float) -> str:
        return "-" if np.isnan(value) else f"{value:.3f}"  # a dimension can lack labels

    def report(row: Row) -> None:
        bar.n = int(row["epoch"])
        bar.set_postfix_str(f"val CCC {row['val_ccc_mean']:.3f}")
        scores = "  ".join(f"{name} {score(row[f'val_ccc_{name}'])}" for name in SCORES)
        last = "" if config.epochs == AUTO else f"/{config.epochs}"
        # fits a terminal of 80 columns
        log.info("epoch %2d%s  loss %.3f  val CCC  %s", row["epoch"], last, row["loss_total"], scores)
        if write is not None:
            write(row)

    return report


@contextmanager
def tensorboard_writer(folder: Path) -> Iterator[Callable[[Row], None]]:
    """A function that writes the values of one epoch to event files of TensorBoard, which is imported here."""
    from torch.utils.tensorboard import SummaryWriter

    hook = threading.excepthook

    def failed(arguments: threading.ExceptHookArgs) -> None:
        """Silence a write error of the event thread: the next epoch raises it again."""
        if arguments.exc_type is None or not issubclass(arguments.exc_type, OSError):
            hook(arguments)

    def add(row: Row) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))

    threading.excepthook = failed
    try:
        with closing(SummaryWriter(str(folder))) as writer:
            yield add
    finally:
        threading.excepthook = hook
