"""A run's folder: what was resolved, the weights, the history, the metrics; and the way back to a model.

RUN/config.toml          settings, streams, prompt set, data: everything that was resolved
    model.safetensors    weights of the best epoch, prototypes included: prediction needs no cache
    model-valence.safetensors, model-arousal.safetensors   where asked for: of the epochs best in one dimension
    smoothing.json       where chosen: how every prediction is smoothed
    metrics.json         of the validation split; written last: where it is, the run is done
    history.csv          a row per epoch
    predictions/SPLIT/CLIP.csv, and sources.json: what they were made from
    encoders/            of a fine-tuned run, as `vaflow extract --weights NAME=` takes them
    checkpoint.safetensors   only while training: what a second start goes on from
"""

import csv
import io
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from vaflow import __version__
from vaflow.cache import address
from vaflow.errors import CorruptError, UsageError, explain
from vaflow.files import write_file
from vaflow.train.batch import TargetSpec
from vaflow.train.builder import build_model
from vaflow.train.config import TrainConfig, differences, merge
from vaflow.train.evaluate import Trace, predict_clips
from vaflow.train.heads.model import EachModel, VAModel
from vaflow.train.inputs import Inputs, InputStream
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.smoothing import Smoothing, read_smoothing, smoothed
from vaflow.train.storage import read_tensors
from vaflow.train.windows import WindowSet

ENSEMBLE_FILE = "ensemble.json"  # in an ensemble directory: its runs and their weights
PROTOTYPES, CONTEXT = "prompt.prototypes", "prompt.context"  # their names among the model's tensors


@dataclass(frozen=True)
class RunRecord:
    """What `config.toml` says.

    Attributes:
        config: resolved settings.
        streams: what is read.
        targets: what the model says beside valence and arousal.
        tuned: of a fine-tuned run, the streams that its own encoders make; empty until it is done.
        cache: the folder that it was trained on.
        data: split -> {"clips", "windows", "labelled_frames", "labelled_valence", "labelled_arousal"}.
        version: of vaflow.
    """

    config: TrainConfig
    streams: tuple[InputStream, ...]
    cache: str
    data: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    version: str = __version__
    tuned: tuple[InputStream, ...] = ()
    targets: tuple[TargetSpec, ...] = ()

    @property
    def wanted(self) -> tuple[InputStream, ...]:
        """The streams as the run's heads want them: where encoders were trained, what those make."""
        own = {stream.name: stream for stream in self.tuned}
        return tuple(own.get(stream.name, stream) for stream in self.streams)

    @property
    def untrained(self) -> tuple[str, ...]:
        """The dimensions that the training split had no label of: what the run says of them means nothing."""
        seen = self.data.get(self.config.train_split, {})
        return tuple(name for name in DIMENSIONS if seen.get(f"labelled_{name}") == 0)

    def to_toml(self) -> str:
        """TOML with the tables `train` (settings), `data` and one `stream` each, and one `tuned` each."""
        document: dict[str, Any] = {
            "vaflow": self.version,
            "cache": self.cache,
            "train": self.config.as_dict(),
            "data": {split: dict(counts) for split, counts in self.data.items()},
            "stream": [_as_table(stream) for stream in self.streams],
        }
        if self.targets:
            document["target"] = [{**asdict(target), "names": list(target.names)} for target in self.targets]
        if self.tuned:
            document["tuned"] = [_as_table(stream) for stream in self.tuned]
        return tomli_w.dumps(document)

    @classmethod
    def from_toml(cls, text: str) -> "RunRecord":
        """Read what `to_toml` wrote.

        Raises:
            ValueError: it is not TOML, or lacks a part.
        """
        try:
            document = tomllib.loads(text)
            config = merge(document["train"])
            streams, tuned = (
                tuple(map(_from_table, tables)) for tables in (document["stream"], document.get("tuned", ()))
            )
            targets = tuple(
                TargetSpec(said["name"], said["task"], tuple(said["names"])) for said in document.get("target", ())
            )
            return cls(config, streams, document["cache"], document["data"], document["vaflow"], tuned, targets)
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"a part of it is not what a run writes ({error})") from error


def _as_table(stream: InputStream) -> dict[str, Any]:
    facts = asdict(stream)
    return facts | {"identity": json.dumps(facts["identity"], sort_keys=True)}  # JSON: TOML has no null


def _from_table(facts: Mapping[str, Any]) -> InputStream:
    return InputStream(**{**facts, "identity": json.loads(facts["identity"])})


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and reading and writing of what lies there. Files appear whole or not at all."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def weights_file(self) -> Path:
        return self.path / "model.safetensors"

    def each_file(self, dimension: str) -> Path:
        """Weights of the epoch that was best in one dimension."""
        return self.path / f"model-{dimension}.safetensors"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def history_file(self) -> Path:
        return self.path / "history.csv"

    @property
    def encoders(self) -> Path:
        """The folder of a fine-tuned run's encoders."""
        return self.path / "encoders"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def done(self) -> bool:
        """Whether the run went to its end."""
        return self.metrics_file.is_file() and self.weights_file.is_file()

    def predictions(self, split: str) -> Path:
        """The folder of a split's prediction CSVs."""
        return self.path / "predictions" / split

    def make(self) -> None:
        """Make the folder.

        Raises:
            UsageError: it cannot be made, or holds something that is not a run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = not self.config_file.exists() and any(
                not entry.name.startswith(".") for entry in self.path.iterdir()
            )
        except OSError as error:
            raise UsageError(explain(f"Cannot write the run folder {self.path}", got=error.strerror)) from error
        if foreign:
            raise UsageError(
                explain(
                    f"{self.path} holds files that no run wrote",
                    expected="a new folder, an empty one, or that of an earlier run",
                    remedy="Choose another folder for --out",
                )
            )

    def record(self) -> RunRecord | None:
        """What was resolved; None where the run has not begun.

        Raises:
            CorruptError: `config.toml` is damaged.
        """
        try:
            return RunRecord.from_toml(self.config_file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptError(explain(f"{self.config_file} cannot be read", got=error)) from error

    def write_record(self, record: RunRecord) -> None:
        """Write `config.toml`."""
        write_file(self.config_file, record.to_toml())

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        write_file(self.metrics_file, (json.dumps(metrics, indent=2, allow_nan=False) + "\n"))

    def update_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json` of a finished run anew; what training said of itself stays."""
        if not self.done:
            return
        about = ("best_epoch", "best_epoch_each", "epochs")
        old = self.read_metrics()
        self.write_metrics({**metrics, **{key: old[key] for key in about if key in old}})

    def read_metrics(self) -> dict[str, Any]:
        """Read `metrics.json`.

        Raises:
            CorruptError: it is damaged.
        """
        try:
            result: dict[str, Any] = json.loads(self.metrics_file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptError(explain(f"{self.metrics_file} cannot be read", got=error)) from error
        if not isinstance(result, dict):
            raise CorruptError(explain(f"{self.metrics_file} cannot be read", expected="a JSON object"))
        return result

    def write_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write `history.csv`: one column per key of the first row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["epoch"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.history_file, text.getvalue())

    def read_history(self) -> list[dict[str, float]]:
        """Read `history.csv`; empty where there is none. Empty fields become NaN."""
        if not self.history_file.is_file():
            return []
        with self.history_file.open(encoding="utf-8", newline="") as file:
            return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]


@dataclass(frozen=True)
class Run:
    """A finished run, ready to predict.

    Attributes:
        record: what was resolved.
        model: with the weights of the best epoch.
        each: valence and arousal from epochs of their own, where the run kept those.
        smoothing: of its traces, where one was chosen.
    """

    record: RunRecord
    model: VAModel
    each: EachModel | None = None
    smoothing: Smoothing | None = None

    @property
    def predictor(self) -> nn.Module:
        """What predictions are made with."""
        return self.model if self.each is None else self.each

    def traces(self, windows: WindowSet) -> Iterator[Trace]:
        """What the run says of every clip, smoothed as was chosen for it; raises as `predict_clips`."""
        return smoothed(predict_clips(self.predictor, windows), self.smoothing)


def require_record(path: Path) -> RunRecord:
    """What `config.toml` of a run folder says.

    Raises:
        UsageError: the folder is no run.
        CorruptError: the file is damaged.
    """
    folder = RunFolder(Path(path))
    record = folder.record() if folder.path.is_dir() else None
    if record is None and (folder.path / ENSEMBLE_FILE).is_file():
        raise UsageError(
            explain(
                f"{path} is an ensemble, not a run",
                remedy="`vaflow predict`, `submit` and `trace` take it as it is; "
                "`vaflow ensemble RUN... --split SPLIT` scores its runs on another split",
            )
        )
    if record is None:
        raise UsageError(
            explain(
                f"{path} is not a run folder",
                expected="a folder with config.toml and model.safetensors, as `vaflow train` writes",
                got="no config.toml" if folder.path.is_dir() else "no such folder",
            )
        )
    return record


def load_run(path: Path, device: torch.device | str = "cpu") -> Run:
    """Read a finished run; no cache is needed.

    Raises:
        UsageError: the folder is no run, or its training has not finished.
        CorruptError: a file of it is damaged, or the weights do not fit the settings.
    """
    folder, record = RunFolder(Path(path)), require_record(path)
    if not folder.weights_file.is_file():
        raise UsageError(
            explain(
                f"The run {path} was interrupted before it finished",
                expected="model.safetensors",
                remedy=f"Go on with it: vaflow train {record.cache} --out {path} --config {folder.config_file}",
            )
        )
    model = _read_model(record, folder.weights_file).to(device).eval()
    each = None
    if record.config.best == "each":
        both = [_read_model(record, folder.each_file(name)).to(device) for name in DIMENSIONS]
        each = EachModel(*both).eval()
    return Run(record, model, each, read_smoothing(folder.path))


def _read_model(record: RunRecord, path: Path) -> VAModel:
    if not path.is_file():
        raise CorruptError(explain(f"{path.parent} lacks a file of its own", expected=path.name))
    weights, _ = read_tensors(path)
    context = tuple(weights[CONTEXT].shape) if CONTEXT in weights else None
    specs = [stream.spec for stream in record.streams]
    model = build_model(record.config, specs, weights.get(PROTOTYPES), context, record.targets)  # type: ignore[arg-type]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CorruptError(explain(f"{path} does not fit its config.toml", got=error)) from error
    return model


def new_record(cache: Path | str, config: TrainConfig, inputs: Inputs) -> RunRecord:
    """What is known before any clip is read."""
    return RunRecord(config, inputs.streams, address(cache), targets=inputs.targets)


def check_unchanged(folder: RunFolder, old: RunRecord, new: RunRecord) -> None:
    """A run goes on only with the settings and streams that it began with.

    Raises:
        UsageError: something differs; every difference is named.
    """
    changed = differences(old.config, new.config)
    prints = {stream.name: stream.fingerprint for stream in old.streams}
    changed += [
        f"stream {stream.name}: made with other settings"
        for stream in new.streams
        if prints.get(stream.name, stream.fingerprint) != stream.fingerprint
    ]
    if changed:
        raise UsageError(
            explain(
                f"{folder.path} holds a run with other settings",
                expected="the settings that the run began with",
                got="; ".join(changed),
                remedy="Choose another folder for --out, or delete this one",
            )
        )
