"""Settings in TOML: presets of the papers, user files, and the text stored in runs and sent to workers."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from vaflow.errors import UsageError, explain
from vaflow.train.config import BEFORE_SETTING, TrainConfig, coerce, merge


def preset(name: str) -> dict[str, Any]:
    """Settings of a preset: "p1" (arXiv 2603.13415) or "p2" (arXiv 2503.10523).

    Raises:
        UsageError: there is no such preset.
    """
    presets = tomllib.loads(resources.files("vaflow.train").joinpath("presets.toml").read_text("utf-8"))
    if name not in presets:
        raise UsageError(explain("Unknown preset", got=name, choices=presets))
    return dict(presets[name])


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a TOML file: its keys, or those of its table `train`, as in a run's `config.toml`.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has unknown keys.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(explain(f"Cannot read the settings file {path}", got=error.strerror)) from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, brackets without end
        raise UsageError(explain(f"{path} is not TOML", expected="lines such as `lr = 3e-4`", got=error)) from error
    table = document.get("train", document)
    settings = dict(table) if isinstance(table, dict) else document
    if "vaflow" in document:  # a run's config.toml
        settings = {**BEFORE_SETTING, **settings}
    for key, value in settings.items():
        coerce(key, value)
    return settings


def to_toml(config: TrainConfig) -> str:
    """The settings as flat TOML; `from_toml` reads it back."""
    return tomli_w.dumps(config.as_dict())


def from_toml(text: str) -> TrainConfig:
    """Read the text of `to_toml`.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    return merge(tomllib.loads(text))
