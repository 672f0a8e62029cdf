"""The record of a run, its `config.toml`: resolved settings, streams, cache, counts, environment."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import tomli_w

from vaflow import __version__
from vaflow.cache import Cache, address
from vaflow.train.batch import TargetSpec
from vaflow.train.config import BEFORE_SETTING, TrainConfig, merge
from vaflow.train.inputs import Inputs, InputStream
from vaflow.train.metrics import DIMENSIONS

_BYTES = "bytes:"


@dataclass(frozen=True)
class RunRecord:
    """The contents of `config.toml`.

    Attributes:
        config: resolved settings.
        streams: input streams.
        targets: further targets, predicted beside valence and arousal.
        tuned: of a fine-tuned run, the streams that its encoders make; empty until it is finished.
        cache: address of the cache that it was trained on; cache_relative: the same path from the run's directory.
        data: split -> {"clips", "windows", "labelled_frames", "labelled_valence", "labelled_arousal"}.
        version: of vaflow.
        environment: device, PyTorch version and float32 arithmetic of the training.
    """

    config: TrainConfig
    streams: tuple[InputStream, ...]
    cache: str
    data: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    version: str = __version__
    tuned: tuple[InputStream, ...] = ()
    targets: tuple[TargetSpec, ...] = ()
    cache_relative: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def head_streams(self) -> tuple[InputStream, ...]:
        """Input streams of the heads; fine-tuned encoders replace the streams of their features."""
        tuned = {stream.name: stream for stream in self.tuned}
        return tuple(tuned.get(stream.name, stream) for stream in self.streams)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Dimensions without labels in the training split: their predictions are meaningless."""
        counts = self.data.get(self.config.train_split, {})
        return tuple(name for name in DIMENSIONS if counts.get(f"labelled_{name}") == 0)

    def to_toml(self) -> str:
        """The record as TOML; see `document`."""
        return tomli_w.dumps(self.document())

    def document(self) -> dict[str, Any]:
        """The record as tables: `train` (settings), `data`, one `stream` each, and one `tuned` each."""
        document: dict[str, Any] = {
            "vaflow": self.version,
            "cache": _path_to_text(self.cache),
            "cache_relative": _path_to_text(self.cache_relative),
            "train": self.config.as_dict(),
            "data": {split: dict(counts) for split, counts in self.data.items()},
            "stream": [_as_table(stream) for stream in self.streams],
        }
        if self.targets:
            document["target"] = [{**asdict(target), "names": list(target.names)} for target in self.targets]
        if self.environment:
            document["environment"] = dict(self.environment)
        if self.tuned:
            document["tuned"] = [_as_table(stream) for stream in self.tuned]
        return document

    @classmethod
    def from_toml(cls, text: str) -> "RunRecord":
        """Read the text of `to_toml`.

        Raises:
            ValueError: it is not TOML, or a field is missing or invalid.
        """
        try:
            document = tomllib.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "RunRecord":
        """Read a document of `document`; other members are ignored.

        Raises:
            ValueError: it lacks a part, or has one of another type.
        """
        try:
            config = merge(BEFORE_SETTING, document["train"])
            streams, tuned = (
                tuple(map(_from_table, tables)) for tables in (document["stream"], document.get("tuned", ()))
            )
            targets = tuple(
                TargetSpec(table["name"], table["task"], tuple(table["names"])) for table in document.get("target", ())
            )
            return cls(
                config,
                streams,
                _path_from_text(document["cache"]),
                document["data"],
                document["vaflow"],
                tuned,
                targets,
                _path_from_text(document.get("cache_relative", "")),
                document.get("environment", {}),
            )
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"a field is invalid ({error})") from error


def _as_table(stream: InputStream) -> dict[str, Any]:
    facts = asdict(stream)
    return facts | {"identity": json.dumps(facts["identity"], sort_keys=True)}  # JSON: TOML has no null


def _from_table(facts: Mapping[str, Any]) -> InputStream:
    return InputStream(**{**facts, "identity": json.loads(facts["identity"])})


def _path_to_text(path: str) -> str:
    """The path, or `bytes:` and its percent-encoded bytes if it is not UTF-8, which TOML requires."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return _BYTES + quote(os.fsencode(path))
    return path


def _path_from_text(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_BYTES))) if text.startswith(_BYTES) else text


def new_record(cache: Cache | Path | str, config: TrainConfig, inputs: Inputs, run: Path | None = None) -> RunRecord:
    """The record of a run before any clip is read; `run` is its directory."""
    cache_address = address(cache.place if isinstance(cache, Cache) else cache)
    relative = "" if run is None or "://" in cache_address else os.path.relpath(cache_address, Path(run).resolve())
    return RunRecord(config, inputs.streams, cache_address, targets=inputs.targets, cache_relative=relative)
