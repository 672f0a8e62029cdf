"""The space of a search: for every setting a fixed value, a list of choices, or a range, read from a TOML file."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaflow.errors import UsageError, explain
from vaflow.settings import settings_of
from vaflow.train.config import TrainConfig, coerce, merge

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RESERVED = ("folds", "fold", "fold_groups", "fold_splits", "train_split", "val_split", "finetune", "device", "init")
RANGE = {"low", "high", "log", "step"}
EXAMPLE = "lr = { low = 1e-5, high = 1e-3, log = true }"


@dataclass(frozen=True)
class Choice:
    """A choice: values as `--set` writes them."""

    values: tuple[str, ...]

    def distribution(self) -> "BaseDistribution":
        """The distribution for Optuna."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Range:
    """A number between two limits.

    Attributes:
        low, high: the limits, both included.
        log: draw the logarithm uniformly.
        step: distance of two values; None: every number (integers: 1).
        whole: only integers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def distribution(self) -> "BaseDistribution":
        """The distribution for Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Space:
    """Searched settings, and settings that stay fixed.

    Attributes:
        fixed: setting -> value.
        searched: setting -> choice or range, in the order of the file.
    """

    fixed: Mapping[str, Any]
    searched: Mapping[str, Choice | Range]

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The settings of a trial.

        Raises:
            UsageError: the values do not go together.
        """
        return merge(self.fixed, values)


def read_space(path: Path) -> Space:
    """Read a space from a TOML file.

    Raises:
        UsageError: the file cannot be read, is not TOML, or an entry does not fit its setting.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(explain(f"Cannot read the space {path}", got=error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(explain(f"{path} is not TOML", expected=f"lines such as `{EXAMPLE}`", got=error)) from error
    fixed: dict[str, Any] = {}
    searched: dict[str, Choice | Range] = {}
    if unknown := [key for key in document if key not in settings_of(TrainConfig)]:
        raise UsageError(explain(f"Unknown setting in {path}", got=unknown[0], choices=settings_of(TrainConfig)))
    for key, value in document.items():
        if key in RESERVED:
            raise UsageError(explain(f"{path}: {key} cannot be set in a search: the search sets it"))
        if isinstance(value, list):
            searched[key] = _choice(key, value)
        elif isinstance(value, dict):
            searched[key] = _range(key, value)
        else:
            fixed[key] = coerce(key, value)
    if not searched:
        raise UsageError(explain(f"{path} leaves nothing to search", expected=f"a list or a range, as `{EXAMPLE}`"))
    merge(fixed)
    return Space(fixed, searched)


def _choice(key: str, values: list[Any]) -> Choice:
    described = settings_of(TrainConfig)[key]
    typed = [coerce(key, value) for value in values]
    for value in typed:
        described.check(value)
    texts = [described.text(value) for value in typed]
    if len(set(texts)) < max(2, len(values)):
        raise UsageError(explain(f"{key} needs at least two different choices", got=values))
    return Choice(tuple(texts))


def _range(key: str, table: Mapping[str, Any]) -> Range:
    low, high = (coerce(key, table.get(limit)) for limit in ("low", "high"))
    described = settings_of(TrainConfig)[key]
    numeric = described.kind in (int, float) and None not in (low, high) and table.keys() <= RANGE
    log, step = table.get("log", False), table.get("step")
    stepped = step is None or (type(step) in (int, float) and math.isfinite(step) and step > 0 and not log)
    if not numeric or type(log) is not bool or not stepped or not low < high or (log and low <= 0):
        expected = f"low < high, log or step, as `{EXAMPLE}`"
        raise UsageError(explain(f"The range of {key} is not valid", expected=expected, got=table))
    for limit in (low, high):
        described.check(limit)
    return Range(low, high, log, step, described.kind is int)
