"""Checkpoints of the Audio Spectrogram Transformer: a folder as save_pretrained writes it, or a hub's model id."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from vaflow.encoders.hub import hub_file
from vaflow.encoders.logmel import MEL_BINS, RATE
from vaflow.encoders.weights import BROKEN, check_fit
from vaflow.errors import UsageError, WeightsError, explain

DEFAULT_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974  # of AudioSet's log-Mel values, used when a checkpoint says none
MODEL_TYPE = "audio-spectrogram-transformer"
CONFIG, FEATURES = "config.json", "preprocessor_config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, and the mean and deviation that its input is normalised with: (x - mean) / (2 std)."""

    module: torch.nn.Module
    mean: float
    std: float


def load_checkpoint(name: str, source: str, *, local: bool) -> Checkpoint:
    """Load the model of encoder `name` from a folder, or (unless `local`) from the hub's model id `source`.

    Raises:
        WeightsError: the folder or the hub has no such model, or its weights do not fit.
        UsageError: the model is of another kind, or reads another kind of log-Mel.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(name, source, local)
    config, features = _read_json(folder / CONFIG), _read_json(folder / FEATURES, optional=True)
    _check_config(folder, config, features)
    module = _load_module(folder)
    if features.get("do_normalize") is False:
        return Checkpoint(module, 0.0, 0.5)  # (x - 0) / (2 * 0.5): the values stay as they are
    return Checkpoint(module, float(features.get("mean", AUDIOSET_MEAN)), float(features.get("std", AUDIOSET_STD)))


def save_checkpoint(module: Any, mean: float, std: float, folder: Path) -> Path:
    """Write a model as `load_checkpoint` reads it. The folder appears whole, in the place of an older one.

    Raises:
        WeightsError: the disk refuses.
    """
    new = folder.with_name(f".{folder.name}.{token_hex(4)}")
    features = {"sampling_rate": RATE, "num_mel_bins": MEL_BINS, "do_normalize": True, "mean": mean, "std": std}
    try:
        with _quiet():
            module.save_pretrained(str(new))
        (new / FEATURES).write_text(json.dumps(features, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    except OSError as error:
        raise WeightsError(explain(f"Cannot write {folder}", got=error.strerror)) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _fetch(name: str, source: str, local: bool) -> Path:
    """The hub cache's folder with the model's files, downloaded if need be."""
    if local or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise WeightsError(
            explain(
                f"There is no folder {source}",
                expected=f"a folder with {CONFIG}, {FEATURES} and {WEIGHT_FILES[0]}, as save_pretrained writes it",
                remedy=f"Download the model id {DEFAULT_MODEL} and pass --weights {name}=FOLDER",
            )
        )
    needs = f"a folder (PATH) with {CONFIG}, {FEATURES} and {WEIGHT_FILES[0]}"
    hub_file(source, (CONFIG,), encoder=name, needs=needs)
    hub_file(source, (FEATURES, CONFIG), encoder=name, needs=needs)  # some checkpoints have no preprocessor's config
    return hub_file(source, WEIGHT_FILES, encoder=name, needs=needs).parent


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            explain(
                f"{path} cannot be read",
                expected="JSON, as save_pretrained writes it",
                got=error,
                remedy="Download the model's folder again",
            )
        ) from error
    if not isinstance(document, dict):
        raise WeightsError(explain(f"{path} holds no settings", expected="a JSON object", got=type(document).__name__))
    return document


def _check_config(folder: Path, config: Mapping[str, Any], features: Mapping[str, Any]) -> None:
    wrong = []
    if config.get("model_type") != MODEL_TYPE:
        wrong.append(f"model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
    if config.get("num_mel_bins", MEL_BINS) != MEL_BINS:
        wrong.append(f"num_mel_bins is {config['num_mel_bins']}, the log-Mel stream has {MEL_BINS}")
    if features.get("sampling_rate", RATE) != RATE:
        wrong.append(f"sampling_rate is {features['sampling_rate']}, the sound is kept at {RATE}")
    if wrong:
        raise UsageError(
            explain(
                f"The model in {folder} cannot be used as an audio encoder: {'; '.join(wrong)}",
                remedy=f"Use an Audio Spectrogram Transformer such as {DEFAULT_MODEL}",
            )
        )


def _load_module(folder: Path) -> torch.nn.Module:
    from safetensors import SafetensorError
    from transformers import ASTModel

    try:
        with _quiet():
            module, info = ASTModel.from_pretrained(
                str(folder),
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                attn_implementation="sdpa",
                dtype=torch.float32,
            )
    except (*BROKEN, SafetensorError) as error:
        raise WeightsError(
            explain(
                f"The weights in {folder} do not load",
                expected=f"an Audio Spectrogram Transformer's {' or '.join(WEIGHT_FILES)}",
                got=(str(error).strip() or type(error).__name__).splitlines()[0],
                remedy="Download the model's folder again",
            )
        ) from error
    check_fit(
        str(folder),
        missing=info["missing_keys"],
        # A checkpoint for classification has a head, which this encoder does not use.
        unexpected=[key for key in info["unexpected_keys"] if not key.startswith("classifier.")],
        misshapen=[_name_shapes(key) for key in info["mismatched_keys"]],
    )
    loaded: torch.nn.Module = module
    return loaded


def _name_shapes(mismatch: Any) -> str:
    key, found, expected = mismatch
    return f"{key} {tuple(found)} instead of {tuple(expected)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports keys and progress on standard error; what matters of it becomes an error of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
