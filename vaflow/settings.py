"""Settings of a config dataclass, each described once in its field's metadata.

    @dataclass(frozen=True)
    class Config:
        lr: float = setting(1e-4, "Learning rate of the heads", "optimization", above=0, option="--lr")

        def __post_init__(self) -> None:
            check(self)

From the description follow the conversion and the checks of values (`coerce`, `check`), the keys of `--set`
(`parse_pairs`), the options of a command (`vaflow.cli.options`) and the reference page (`scripts/settings_page.py`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vaflow.errors import UsageError, explain

NONE = "none"
TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple: "names, separated by commas",
    Path: "a path",
    str: "text",
}


@dataclass(frozen=True)
class Setting:
    """One setting: its values, and what people read about it.

    Attributes:
        name: of the configuration's field; default: of that field.
        kind: bool, int, float, str, tuple (of str) or Path.
        optional: None is a value, written `none`.
        help: a noun phrase or an imperative, without a full stop.
        group: heading under which the setting is listed.
        unit: of a number, as "seconds".
        unset: what the default stands for where it is None or empty, as "as in the cache".
        choices: the values of a text setting; (): any text.
        words: words for special values, as {"auto": 0}.
        at_least, above, below: limits of a number. Infinity and NaN are refused wherever one of them is given.
        pattern: regular expression of a text setting; `form` describes it to people.
        source: where the default comes from: an equation of a paper, or the title of a decision.
        option: option of the command line; empty: `--set` only.
        shown: whether the option is listed by `--help`; `--help-all` lists all.
        metavar: placeholder of the value.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    group: str
    unit: str = ""
    unset: str = ""
    choices: tuple[str, ...] = ()
    words: Mapping[str, Any] = field(default_factory=dict)
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    pattern: str = ""
    form: str = ""
    source: str = ""
    option: str = ""
    shown: bool = False
    metavar: str = ""

    @property
    def label(self) -> str:
        """The name in error messages: the option, or the key of `--set`."""
        return self.option or self.name

    @property
    def values(self) -> str:
        """The values that the setting takes: `gru, tcn or lstm`, `an integer >= 1`."""
        if self.choices:
            return _either(self.choices)
        if self.form:
            return self.form
        limits = [f"{sign} {limit:g}" for sign, limit in self._limits() if limit is not None]
        text = " and ".join([" ".join([TYPE_NAMES[self.kind], *limits[:1]]), *limits[1:]])
        return _either([text, *self.words, *([NONE] if self.optional else [])])

    @property
    def default_text(self) -> str:
        """The default as a person reads it; `coerce` reads it back except where `unset` describes it."""
        if self.unset and self.default in (None, (), "", 0):
            return self.unset
        return self.text(self.default)

    @property
    def summary(self) -> str:
        """The line of the help page: the description, the choices and the default."""
        values = f": {self.values}" if self.choices or self.words else ""
        repeatable = " Repeatable." if self.kind is tuple and self.option else ""
        return f"{self.help}{values}.{repeatable}" + ("" if self.flag else f" [{self.default_text}]")

    @property
    def flag(self) -> bool:
        """Whether the option takes no value."""
        return self.kind is bool and bool(self.option)

    @property
    def placeholder(self) -> str:
        """The placeholder of the value in `--option PLACEHOLDER`."""
        names = {int: "N", float: "X", Path: "FILE", bool: "BOOL"}
        return self.metavar or self.unit.upper() or names.get(self.kind, "NAME")

    def text(self, value: Any) -> str:
        """A value as `--set` takes it."""
        word = next((word for word, meant in self.words.items() if meant == value), None)
        if word is not None and not isinstance(value, bool):
            return word
        if value is None:
            return NONE
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return ",".join(value)
        if isinstance(value, float) and 0 < abs(value) < 1e-3:
            mantissa, _, exponent = f"{value:e}".partition("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def coerce(self, value: Any) -> Any:
        """Convert text (the command line) or a plain value (TOML) to the setting's type.

        Raises:
            UsageError: the value is not of the type.
        """
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if self.optional and value in (None, NONE):
            return None
        result = self._convert(value)
        special = isinstance(value, str) and result in self.words.values()  # a person writes the word
        if result is None or (special and not self._within_limits(result)):
            raise UsageError(explain(f"{self.label} must be {self.values} (got {value!r})"))
        return result

    def _convert(self, value: Any) -> Any:
        """The value in the setting's type, or None where it does not fit."""
        if self.kind is tuple:
            names = value.strip("[]").replace('"', "").split(",") if isinstance(value, str) else value
            listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            return tuple(name.strip() for name in names if name.strip()) if listed else None
        if self.kind is bool:
            return {"true": True, "false": False}.get(str(value).lower())
        if self.kind in (int, float) and not isinstance(value, bool):
            try:
                number = self.kind(value)
            except (TypeError, ValueError, OverflowError):
                return None
            return number if isinstance(value, str) or number == value or number != number else None
        if self.kind is Path and isinstance(value, str | Path):
            return Path(value)
        return value if self.kind is str and isinstance(value, str) else None

    def check(self, value: Any) -> None:
        """Refuse a value outside the choices, the pattern or the limits.

        Raises:
            UsageError: the value does not fit.
        """
        if (value is None and self.optional) or value in self.words.values():
            return
        if self.choices and value not in self.choices:
            raise UsageError(explain(f"Unknown value of {self.label}", got=value, choices=self.choices))
        if not self._within_limits(value) or (self.pattern and not re.fullmatch(self.pattern, str(value))):
            unit = f" {self.unit}" if self.unit else ""
            number = self.values.removesuffix(f" or {NONE}")
            other = "" if self.values == number else f", or {NONE}" if unit else f" or {NONE}"
            raise UsageError(explain(f"{self.label} must be {number}{unit}{other} (got {value})"))

    def _within_limits(self, value: Any) -> bool:
        return not any(limit is not None for _, limit in self._limits()) or (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and abs(value) < float("inf")
        )

    def _limits(self) -> tuple[tuple[str, float | None], ...]:
        return (">=", self.at_least), (">", self.above), ("<", self.below)


def _either(values: Iterable[str]) -> str:
    *first, last = values
    return f"{', '.join(first)} or {last}" if first else last


def setting(default: Any, help: str, group: str, **description: Any) -> Any:
    """A dataclass field with its description; `description` are the other attributes of `Setting`."""
    return field(default=default, metadata={"setting": {"help": help, "group": group, **description}})


@cache
def settings_of(config: Any) -> dict[str, Setting]:
    """Name -> description of every described field of a config dataclass, in its order."""
    hints = get_type_hints(config)
    result = {}
    for item in fields(config):
        if "setting" in item.metadata:
            kind, optional = hints[item.name], False
            if isinstance(kind, UnionType):
                kind, optional = next(part for part in get_args(kind) if part is not NoneType), True
            kind = get_origin(kind) or kind
            result[item.name] = Setting(item.name, kind, optional, item.default, **item.metadata["setting"])
    return result


def check(config: Any) -> None:
    """Check every value of a config against its description; call it in `__post_init__`.

    Raises:
        UsageError: a value does not fit.
    """
    kind: Any = type(config)
    for name, described in settings_of(kind).items():
        described.check(getattr(config, name))


def coerce(config: type, key: str, value: Any) -> Any:
    """Convert the value of one setting of a config dataclass to its type.

    Raises:
        UsageError: an unknown key, or a value of another type.
    """
    known = settings_of(config)
    if key not in known:
        raise UsageError(explain("Unknown setting", got=key, choices=known))
    return known[key].coerce(value)


def parse_pairs(config: type, pairs: Iterable[str]) -> dict[str, Any]:
    """Read the values of `--set`: ["lr=3e-4"] -> {"lr": 3e-4}; dashes in keys count as underscores.

    Raises:
        UsageError: a pair is not KEY=VALUE, its key is unknown, or its value is of another type.
    """
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(explain("--set takes KEY=VALUE", expected="for example --set lr=3e-4", got=pair))
        result[key] = coerce(config, key, value.strip())
    return result
