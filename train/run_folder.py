"""The directory of a training run, or its copy from the hub: its files, and building and loading its model.

RUN/config.toml          resolved settings, streams, prompt set, counts of the data
    clips.json           digest of every clip that the run was trained and validated on
    model.safetensors    weights of the best epoch, prototypes included: prediction needs no cache
    model-valence.safetensors, model-arousal.safetensors   with best=each: weights of the best epoch per dimension
    smoothing.json       smoothing of every prediction, if one was chosen
    uncertainty.json     with a variance head: calibration of the standard deviations
    training_features.safetensors   likewise: what is near to the training features
    metrics.json         scores of the validation split; a run with this file is finished
    history.csv          a row per epoch
    predictions/SPLIT/CLIP.csv, and sources.json: what they were made from
    encoders/            of a fine-tuned run: weights for `vaflow extract --weights NAME=`
    checkpoint.safetensors   state after the last epoch, to resume or to train longer
"""

import csv
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaflow.cache import is_cache
from vaflow.device import forbid_tf32
from vaflow.encoders.weights import hub_file
from vaflow.errors import CorruptError, UsageError, WeightsError, command, explain
from vaflow.files import read_tensors, read_text, refuse_links, write_file
from vaflow.train import run_record as digests
from vaflow.train.batch import StreamSpec, TargetSpec
from vaflow.train.config import TrainConfig
from vaflow.train.heads import EachModel, VAModel
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.run_record import RunRecord, cache_places
from vaflow.train.smoothing import Smoothing, read_smoothing, smoothed
from vaflow.train.traces import Trace, predict_clips
from vaflow.train.uncertainty import Calibration, TrainingFeatures, calibrated, read_calibration, read_training_features
from vaflow.train.windows import WindowSet

log = logging.getLogger(__name__)

PROTOTYPES, CONTEXT = "prompt.prototypes", "prompt.context"  # names of the model's tensors
PUBLISHED_CONFIG = "config.json"  # in a published run, instead of config.toml
ENSEMBLE_FILE = "ensemble.json"  # in the directory of an ensemble: its runs and their weights
PREFIX = "hf:"  # of a run on the hub
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PUBLISHED_FILE = re.compile(  # files that a configuration may name: no code, nothing outside the folder
    r"model(-valence|-arousal)?\.safetensors|(metrics|smoothing|uncertainty)\.json|training_features\.safetensors"
    r"|encoders/(?!\.)[^/\\\0]+(/(?!\.)[^/\\\0]+)?\.(safetensors|json|txt)"
)
WRITTEN = (  # every file and folder that a run writes; config.toml, which makes a directory a run, is deleted last
    *("metrics.json", "clips.json", "history.csv", "smoothing.json", "model*.safetensors"),
    *("checkpoint.safetensors", "predictions", "pictures", "tensorboard", "encoders", "moments.json"),
    *("uncertainty.json", "training_features.safetensors", "config.toml"),
)


class RunFolder:
    """Paths of a run's files, and reading and writing of them. Files are replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file, self.clips_file = path / "config.toml", path / "clips.json"
        self.weights_file, self.checkpoint_file = path / "model.safetensors", path / "checkpoint.safetensors"
        self.metrics_file, self.history_file = path / "metrics.json", path / "history.csv"
        self.encoders = path / "encoders"  # of a fine-tuned run

    def each_file(self, dimension: str) -> Path:
        """Weights of the best epoch of one dimension."""
        return self.path / f"model-{dimension}.safetensors"

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.metrics_file.is_file() and self.weights_file.is_file()

    def predictions(self, split: str) -> Path:
        """Folder of a split's prediction CSVs."""
        return self.path / "predictions" / split

    def output_folder(self, name: str) -> Path:
        """Folder of predictions that are about to be written; `name` is a split, or a variant of one.

        Raises:
            UsageError: a link is in the way: it would lead the files out of the run.
        """
        folder = self.predictions(name)
        try:
            refuse_links(self.path, folder)
        except OSError as error:
            remedy = "Remove the link"
            raise UsageError(explain(f"Cannot write to {folder}", got=error.strerror, remedy=remedy)) from error
        return folder

    def make(self) -> None:
        """Create the directory.

        Raises:
            UsageError: it cannot be created, or is not empty and not a run directory.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = not self.config_file.exists() and any(
                not entry.name.startswith(".") and entry.name != "clips.json" for entry in self.path.iterdir()
            )
        except OSError as error:
            raise UsageError(explain(f"Cannot write the run directory {self.path}", got=error.strerror)) from error
        if foreign:
            problem = f"{self.path} is not empty and is not a run directory"
            expected = "a new or empty directory, or that of an earlier run"
            raise UsageError(explain(problem, expected=expected, remedy="Choose another --out"))

    def refuse(self) -> None:
        """Raise UsageError if the directory is that of a run: results of other commands do not belong into it."""
        if self.config_file.exists():
            raise UsageError(explain(f"{self.path} is a run directory", remedy="Choose another --out"))

    def clear(self) -> None:
        """Delete every file that a run writes; other files stay. Links are removed, not followed."""
        for pattern in WRITTEN:
            for path in self.path.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def read_clips(self) -> dict[str, dict[str, str]] | None:
        """Read `clips.json`: split -> item -> digest; None if an older version wrote the run.

        Raises:
            CorruptError: it is damaged.
        """
        if not self.clips_file.is_file():
            return None
        return digests.from_json(read_text(self.clips_file), str(self.clips_file))

    def record(self) -> RunRecord | None:
        """Read `config.toml`, or `config.json` of a published run; None if the run has not started.

        Raises:
            CorruptError: the file is damaged.
        """
        file = self.config_file if self.config_file.is_file() else self.path / PUBLISHED_CONFIG
        try:
            text = read_text(file)
            if file.suffix == ".json":
                return RunRecord.from_document(json.loads(text))
            return _located(RunRecord.from_toml(text), self.path)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise CorruptError(explain(f"{file} cannot be read", got=error)) from error

    def write_record(self, record: RunRecord) -> None:
        """Write `config.toml`."""
        write_file(self.config_file, record.to_toml())

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        write_file(self.metrics_file, (json.dumps(metrics, indent=2, allow_nan=False) + "\n"))

    def update_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Replace the scores in `metrics.json` of a finished run; the facts about its training stay."""
        if not self.done:
            return
        about = ("best_epoch", "best_epoch_each", "epochs", "layer_shares")
        old = self.read_metrics()
        self.write_metrics({**metrics, **{key: old[key] for key in about if key in old}})

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`.

        Raises:
            CorruptError: it is damaged.
        """
        try:
            result: dict[str, Any] = json.loads(read_text(self.metrics_file))
        except (ValueError, RecursionError) as error:
            raise CorruptError(explain(f"{self.metrics_file} cannot be read", got=error)) from error
        if not isinstance(result, dict):
            raise CorruptError(explain(f"{self.metrics_file} cannot be read", expected="a JSON object"))
        return result

    def write_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write `history.csv`: one column per key of the last row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[-1]) if rows else ["epoch"], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.history_file, text.getvalue())


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to predict.

    Attributes:
        model: with the weights of the best epoch.
        each: with best=each: the model with the best epoch of each dimension.
        smoothing: of its traces, if one was chosen.
        calibration: of its standard deviations, for that smoothing; None: it has none.
        training_features: to mark frames that are far from them.
    """

    record: RunRecord
    model: VAModel
    each: EachModel | None = None
    smoothing: Smoothing | None = None
    calibration: Calibration | None = None
    training_features: TrainingFeatures | None = None

    @property
    def predictor(self) -> nn.Module:
        """The model that predicts."""
        return self.model if self.each is None else self.each

    def with_smoothing(self, smoothing: Smoothing | None) -> "LoadedRun":
        """Return the run with another smoothing; without its calibration, unless the smoothing is the same."""
        same = width_of(smoothing) == width_of(self.smoothing)
        return replace(self, smoothing=smoothing, calibration=self.calibration if same else None)

    def raw_traces(self, windows: WindowSet) -> Iterator[Trace]:
        """Predict every clip, with the run's smoothing, without calibration; raises as `predict_clips`."""
        traces = predict_clips(self.predictor, windows, centers=self.record.config.centers)
        return smoothed(traces, self.smoothing)

    def traces(self, windows: WindowSet) -> Iterator[Trace]:
        """Predict every clip, with smoothing, calibrated deviations and marks; raises as `predict_clips`."""
        traces = calibrated(self.raw_traces(windows), self.calibration)
        return traces if self.training_features is None else self.training_features.mark(windows, traces)


def _located(record: RunRecord, run: Path) -> RunRecord:
    """The record of a run that may have been moved together with the file of `fold_groups`."""
    path, _, column = record.config.fold_groups.rpartition(":")
    if not record.groups_relative or Path(path).is_file():
        return record
    moved = os.path.normpath(run.resolve() / record.groups_relative)
    return replace(record, config=replace(record.config, fold_groups=f"{moved}:{column}"))


def refuse_ensemble(path: Path) -> None:
    """Raise UsageError if a directory that should be a run is an ensemble."""
    if (path / ENSEMBLE_FILE).is_file():
        remedy = "`vaflow predict`, `submit`, `view` and `provenance` accept it as it is; "
        remedy += "`vaflow ensemble RUN... --split SPLIT` scores its runs on another split"
        raise UsageError(explain(f"{path} is an ensemble, not a run", remedy=remedy))


def require_record(path: Path) -> RunRecord:
    """Read `config.toml` of a run directory.

    Raises:
        UsageError: it is not a run directory.
        CorruptError: the file is damaged.
    """
    folder = RunFolder(Path(path))
    record = folder.record() if folder.path.is_dir() else None
    if record is None:
        refuse_ensemble(folder.path)
        expected = "a directory with config.toml and model.safetensors, as written by `vaflow train`"
        got = "no config.toml" if folder.path.is_dir() else "no such directory"
        raise UsageError(explain(f"{path} is not a run directory", expected=expected, got=got))
    return record


def local_run(run: Path | str) -> Path:
    """The folder of a run; `hf:USER/NAME` is taken from the hub's local cache, or downloaded into it.

    Raises:
        UsageError: the name is not USER/NAME.
        WeightsError: the hub cannot be reached or stalls, or the model does not exist or was not made by vaflow.
    """
    name = str(run)
    if not name.startswith(PREFIX):
        return Path(run)
    repository = name.removeprefix(PREFIX)
    if not _REPOSITORY.fullmatch(repository):
        problem = "A model of the Hugging Face hub is named by user and name"
        raise UsageError(explain(problem, expected="hf:USER/NAME", got=name))
    remedy = "Download the repository on a machine with a connection and pass its folder"

    def download(file: str) -> Path:
        return hub_file(repository, (file,), encoder=name, remedy=remedy)

    for _ in range(2):  # the second round takes the newest of all files, if the repository changed during the first
        config = download(PUBLISHED_CONFIG)
        files = named_files(config)
        if all(download(file) == config.parent / file for file in files):
            return config.parent
    raise WeightsError(explain(f"{name} changed while it was downloaded", remedy="Run the same command again"))


def named_files(config: Path) -> list[str]:
    """Names of the files that the `config.json` of a published run states.

    Raises:
        CorruptError: it is not one that `vaflow export` wrote.
    """
    try:
        document = json.loads(read_text(config))
        files = document["files"]
        RunRecord.from_document(document)
        wrong = [file for file in files if not isinstance(file, str) or not _PUBLISHED_FILE.fullmatch(file)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        expected = "a model that `vaflow export` wrote"
        problem = f"{config} does not describe a vaflow model"
        raise CorruptError(explain(problem, expected=expected, got=error)) from error
    if wrong or "model.safetensors" not in files:
        got = repr(wrong[0]) if wrong else "no model.safetensors"
        raise CorruptError(explain(f"{config} names files that a vaflow model does not have", got=got))
    return files


def load_run(path: Path, device: torch.device | str = "cpu", *, finishing: bool = False) -> LoadedRun:
    """Load a finished run; no cache is needed. If a longer training was interrupted, the weights before it are loaded.

    Args:
        finishing: `vaflow train` is about to mark the run as finished.

    Raises:
        UsageError: it is not a run directory, or its training has not finished.
        CorruptError: a file is damaged, or the weights do not fit the settings.
    """
    folder, record = RunFolder(Path(path)), require_record(path)
    forbid_tf32()  # as in training
    if not folder.weights_file.is_file():
        problem = f"The run {path} was interrupted before it finished"
        remedy = f"Resume it: {command('train', record.cache, '--out', path, '--config', folder.config_file)}"
        raise UsageError(explain(problem, expected="model.safetensors", remedy=remedy))
    if not (finishing or folder.done) and folder.config_file.is_file():
        resume = command("train", record.cache, "--out", path, "--config", folder.config_file)
        log.warning("%s is trained longer and not finished; its earlier weights are used. To resume: %s", path, resume)
    model = _read_model(record, folder.weights_file).to(device).eval()
    each = None
    if record.config.best == "each":
        both = [_read_model(record, folder.each_file(name)).to(device) for name in DIMENSIONS]
        each = EachModel(*both).eval()
    smoothing, calibration = read_smoothing(folder.path), read_calibration(folder.path)
    if calibration is not None and dict(calibration.smoothing) != width_of(smoothing):
        log.warning(
            "%s: the standard deviations are calibrated for another smoothing and left out; calibrate them with "
            "`vaflow smooth %s`",
            *(path, path),
        )
        calibration = None
    return LoadedRun(record, model, each, smoothing, calibration, read_training_features(folder.path))


def width_of(smoothing: Smoothing | None) -> dict[str, str | float]:
    """Kind and seconds of a smoothing; empty for none."""
    return {"kind": smoothing.kind, "seconds": smoothing.seconds} if smoothing and smoothing.seconds else {}


def build_model(
    config: TrainConfig,
    streams: Sequence[StreamSpec],
    prototypes: Tensor | None,
    context: tuple[int, int] | None = None,
    targets: Sequence[TargetSpec] = (),
) -> VAModel:
    """Build a model with new weights, on the CPU; seed the generator before.

    Args:
        prototypes: [9, D], or None: without a prompt head.
        context: number and width of the learned context vectors; None: fixed prototypes.

    Raises:
        UsageError: settings that do not go together.
    """
    return VAModel(streams, prototypes, context=context, targets=targets, **model_options(config))


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of `VAModel` from the settings."""
    options: dict[str, Any] = {"layers": config.layers} if config.layers else {}
    if config.temporal == "tcn":
        options["causal"] = config.causal
    if config.temporal == "transformer":
        options["heads"] = config.attention_heads
    return {
        "hidden": config.hidden,
        "temporal": config.temporal,
        "temporal_options": options,
        "fusion": config.fusion,
        "attention_heads": config.attention_heads,
        "attention_positions": config.attention_positions,
        "dropout": config.dropout,
        "normalize": config.normalize,
        "learnable_prototypes": config.learnable_prompts,
        "variance": config.uncertainty == "variance",
    }


def _read_model(record: RunRecord, path: Path) -> VAModel:
    """Build the model of `record` with the weights of `path`; both are compared before memory is allocated."""
    if not path.is_file():
        raise CorruptError(explain(f"{path.parent} is incomplete", expected=path.name))
    weights, _ = read_tensors(path)
    context = tuple(weights[CONTEXT].shape) if CONTEXT in weights else None
    specs = [stream.spec for stream in record.streams]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    sizes = {"layers": record.config.layers, "streams": len(specs), "targets": len(record.targets)}
    for name, size in sizes.items():
        if size > len(weights):  # a layer has several tensors; counts above this are rejected without reading shapes
            raise CorruptError(explain(f"{path} does not fit its config.toml", got=f"{size} {name}"))
    build = partial(build_model, record.config, specs, weights.get(PROTOTYPES), context, record.targets)  # type: ignore[arg-type]
    with torch.device("meta"):
        planned = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    wrong = sorted(name for name in {*planned, *shapes} if planned.get(name) != shapes.get(name))
    if wrong:
        got = f"{wrong[0]} {shapes.get(wrong[0], 'missing')}"
        expected = f"{wrong[0]} {planned.get(wrong[0], 'absent')}"
        raise CorruptError(explain(f"{path} does not fit its config.toml", expected=expected, got=got))
    model = build()
    model.load_state_dict(weights)
    return model


def cache_of(run: Path) -> str:
    """Return the address of a run's training cache: the recorded one, or the same path relative to the run.

    Raises:
        UsageError: it is not a run, or its cache is at neither place.
    """
    candidates = cache_places(run, require_record(run))
    for number, candidate in enumerate(candidates):
        if "://" in candidate or Path(candidate).is_dir():
            for other in candidates[number + 1 :]:  # of a folder that was copied with its cache
                if is_cache(other) and not Path(other).samefile(candidate):
                    log.warning("%s was trained on %s, which is read; to read %s, pass --cache", run, candidate, other)
            return candidate
    remedy = "Name it with --cache CACHE"
    if not candidates:
        raise UsageError(explain(f"{run} is an exported run, which does not name its cache", remedy=remedy))
    expected = "a cache at " + " or ".join(dict.fromkeys(candidates))
    raise UsageError(explain(f"The cache that {run} was trained on does not exist", expected=expected, remedy=remedy))
