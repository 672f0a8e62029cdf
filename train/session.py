"""What training of heads and fine-tuning share: loaded splits, new heads, checks, and the files of a run."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vaflow.cache import Cache
from vaflow.device import forbid_tf32, keep_memory
from vaflow.encoders import build_encoder, context_tower, demonstration_notice
from vaflow.encoders.base import recorded_identity
from vaflow.encoders.clip import ContextTower
from vaflow.errors import FingerprintError, UsageError, command, explain
from vaflow.files import write_file, write_tensors
from vaflow.train.config import AUTO, TEXT_SUFFIX, TrainConfig
from vaflow.train.data import Data
from vaflow.train.heads import VAModel
from vaflow.train.inputs import Inputs
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.prediction_files import Maker, write_evaluation
from vaflow.train.run_folder import RunFolder, build_model, load_run, require_record
from vaflow.train.run_record import RunRecord, describe, is_utf8, reporter, tensorboard_writer, warn_of_labels
from vaflow.train.scores import check_complete, evaluate_windows, failed_items
from vaflow.train.smoothing import FILE as SMOOTHING
from vaflow.train.smoothing import write_smoothing
from vaflow.train.training_loop import Progress, Row, seeded
from vaflow.train.uncertainty import (
    CALIBRATION,
    TrainingFeatures,
    calibrate,
    calibrated,
    uncertainty_report,
    write_calibration,
)

log = logging.getLogger(__name__)


def open_tower(config: TrainConfig, inputs: Inputs, device: torch.device) -> ContextTower | None:
    """The text tower for `config.prompt_context` vectors; None without context vectors.

    Raises:
        UsageError: the cache has no prototypes or no descriptions, or the encoder does not support context vectors.
        FingerprintError: the encoder is not the one that made the cache's prototypes.
        WeightsError: the weights cannot be loaded.
    """
    if not config.prompt_context:
        return None
    if not inputs.descriptions:
        problem = "prompt_context requires the descriptions of the nine regions"
        expected = "prompt embeddings that `vaflow extract` or `vaflow cache prompts` made"
        got = f"stream {inputs.text!r}" if inputs.text else "a cache without prompt embeddings"
        raise UsageError(explain(problem, expected=expected, got=got))
    name = inputs.text.removesuffix(TEXT_SUFFIX)
    weights = Path(config.text_weights) if config.text_weights else None
    encoder = build_encoder(name, weights=weights, device=str(device))
    if encoder.identity != recorded_identity(inputs.text_identity):
        problem = f"{name} is not the encoder that made the cache's prompt embeddings"
        expected = f"weights {inputs.text_identity.get('weights')}"
        got = f"weights {encoder.identity.get('weights')}"
        remedy = "Pass the same weights: --set text_weights=PATH"
        raise FingerprintError(explain(problem, expected=expected, got=got, remedy=remedy))
    return context_tower(encoder, inputs.descriptions, config.prompt_context)


def new_model(config: TrainConfig, inputs: Inputs, data: Data, device: torch.device) -> VAModel:
    """Build heads with new weights and the feature statistics of the training split."""
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


@dataclass(frozen=True)
class Session:
    """One call of `vaflow train`: the cache, the resolved settings, the run's folder, and what to write.

    Attributes:
        cache, config, inputs: as resolved.
        folder: of the run; record: its `config.toml`.
        allow_missing: leave labelled validation clips without features out of the scores.
        keep_checkpoint: keep the last epoch's state, from which `--epochs` can continue.
        fresh: delete the run in the folder before anything is written.
        clips: text of `clips.json`, which the first start writes; None: the run is resumed.
    """

    cache: Cache
    config: TrainConfig
    inputs: Inputs
    folder: RunFolder
    record: RunRecord
    allow_missing: bool = False
    tensorboard: bool = True
    figures: bool = True
    show: bool = False
    keep_checkpoint: bool = True
    fresh: bool = False
    clips: str | None = None

    def begin(self, data: Data, *, write: bool = True) -> "Session":
        """Check the loaded data, write `config.toml` and log the contents; returns the session with both in it.

        What an earlier training left is deleted only now, when nothing can be refused any more: the whole run if
        `fresh`, or the scores of a run that is trained longer, which is not finished until it is again.

        Raises:
            DataError: labelled validation clips lack features.
        """
        check_complete(data.val, self._failed(), self.allow_missing)  # fails here rather than after hours
        pairs = ((self.config.train_split, data.train), (self.config.val_split, data.val))
        counts = {
            split: {"clips": len(w.clips), "windows": len(w), "labelled_frames": w.labelled_rows}
            | {f"labelled_{name}": count for name, count in zip(DIMENSIONS, w.labelled_each, strict=True)}
            for split, w in pairs
        }
        record = replace(self.record, data=counts)
        if write:
            if self.fresh:
                self.folder.clear()
            if self.clips is not None:
                write_file(self.folder.clips_file, self.clips)
            self.folder.metrics_file.unlink(missing_ok=True)
            self.folder.write_record(record)
        describe(self.config, data.train, data.val)
        return replace(self, record=record)

    def unscored(self, data: Data) -> list[str]:
        """Validation clips that --allow-missing leaves out of the scores."""
        return [clip.item for clip in check_complete(data.val, self._failed(), self.allow_missing)]

    def _failed(self) -> list[str]:
        return failed_items(self.cache, self.config.val_split, self.config.fold_splits)

    @contextmanager
    def reporting(self) -> Iterator[Callable[[Row], None]]:
        """A function to call after every epoch; inside, a progress bar and TensorBoard are open."""
        with ExitStack() as stack:
            if self.show:  # prints log lines above the progress bar
                stack.enter_context(logging_redirect_tqdm())
            total = None if self.config.epochs == AUTO else self.config.epochs
            bar = stack.enter_context(tqdm(total=total, desc="training", unit="epoch", disable=not self.show))
            write = None
            if self.tensorboard and not is_utf8(str(self.folder.path)):
                log.warning("No TensorBoard files are written: TensorBoard requires folder names in UTF-8")
            elif self.tensorboard:
                write = stack.enter_context(tensorboard_writer(self.folder.path / "tensorboard"))
            yield reporter(self.config, bar, write)

    def finish(self, model: VAModel, progress: Progress, data: Data) -> dict[str, Any]:
        """Evaluate the best epoch, write all files and return the metrics; `metrics.json` is written last."""
        config, split = self.config, self.config.val_split
        predictor: nn.Module = model
        self._remove_corrections()
        self.folder.write_history(progress.history)
        write_tensors(self.folder.weights_file, progress.best)
        for name, weights in progress.each.items():
            write_tensors(self.folder.each_file(name), weights)
        if progress.each:
            predictor = load_run(self.folder.path, next(model.parameters()).device, finishing=True).predictor
        missing: dict[str, Any] = {"allow_missing": self.allow_missing, "failed": self._failed()}
        report, traces = evaluate_windows(predictor, data.val, split, centers=config.centers, **missing)
        if config.uncertainty != "none":
            left_out = set(report["missing"]["clips"])
            calibration = calibrate([t for t in traces if t.clip.item not in left_out], split)
            write_calibration(self.folder.path, calibration)
            features = TrainingFeatures.fit(data.train, data.val)
            features.write(self.folder.path)
            traces = list(features.mark(data.val, calibrated(traces, calibration)))
            report |= uncertainty_report([t for t in traces if t.clip.item not in left_out], split, split)
        maker = Maker(self.folder.path, {self.folder.path: require_record(self.folder.path)})
        write_evaluation(self.folder.output_folder(split), maker, self.cache, traces)
        report |= {"best_epoch": progress.best_epoch, "epochs": progress.epoch}
        report |= {"best_epoch_each": dict(progress.each_epoch)} if progress.each else {}
        report |= {"layer_shares": model.layer_shares} if model.layer_shares else {}
        for warning in report["warnings"]:
            log.warning("%s: %s", split, warning)
        report["warnings"] += warn_of_labels(config, data.train)
        self.folder.write_metrics(report)
        if not self.keep_checkpoint:
            self.folder.checkpoint_file.unlink(missing_ok=True)
        if self.figures:
            self._draw(progress, traces)
        return report

    def _remove_corrections(self) -> None:
        """Remove the smoothing and the calibration of a run that was trained longer: they belong to other weights."""
        path = self.folder.path
        if (path / SMOOTHING).is_file():
            again = command("smooth", path)
            log.warning("%s was trained longer; its smoothing is removed. To choose one again: %s", path, again)
        write_smoothing(path, None)
        (path / CALIBRATION).unlink(missing_ok=True)

    def _draw(self, progress: Progress, traces: Any) -> None:
        """Draw the figures. A failure is logged; the run is complete without them."""
        from vaflow.train.plots import draw_run

        try:
            note = demonstration_notice(stream.name for stream in self.inputs.streams)
            draw_run(self.folder.path, progress.history, traces, note)
        except (OSError, ValueError, RuntimeError) as error:  # such as a full disk, or an error of Matplotlib
            log.warning("The figures of %s could not be drawn: %s", self.folder.path, error)


@contextmanager
def reproducible(session: Session, device: torch.device) -> Iterator[Session]:
    """Set the float32 arithmetic and the algorithms of the training inside; yields the session that records them."""
    forbid_tf32()
    keep_memory()
    deterministic = session.config.deterministic
    before = torch.get_deterministic_debug_mode()
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    environment = {"device": name, "torch": torch.__version__, "tf32": False, "deterministic": deterministic}
    torch.set_deterministic_debug_mode("error" if deterministic else before)
    try:
        yield replace(session, record=replace(session.record, environment=environment))
    finally:
        torch.set_deterministic_debug_mode(before)
