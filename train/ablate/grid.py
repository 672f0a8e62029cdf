"""Tables of `vaflow ablate`: reading and checking their TOML file, and the table of a cache's encoders.

The format is described at the head of the built-in file, `vaflow/train/paper_tables.toml`.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.train.config import NONE, TrainConfig, coerce, merge, preset

ALL = "all"
ENCODERS = "encoders"  # name of the table of a cache's encoders
EACH = ("prompts",)
SCORES = ("valence", "arousal", "mean")
ROW_KEYS = ("name", "preset", "paper", "each")  # the other keys of a row are settings

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One configuration of a table.

    Attributes:
        table, name: name of its table, and its own.
        settings: those that differ from the base.
        preset: preset applied before these settings; empty: none.
        paper: published concordance (valence, arousal, mean), or None.
        each: "prompts": a row for every prompt set but the default one; empty: the row as it is.
    """

    table: str
    name: str
    settings: Settings = field(default_factory=dict)
    preset: str = ""
    paper: tuple[float, float, float] | None = None
    each: str = ""


@dataclass(frozen=True)
class Table:
    """A named list of rows."""

    name: str
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Study:
    """All tables of a file, the settings that every row starts from (the full model), and the file's text."""

    base: Settings
    tables: tuple[Table, ...]
    text: str

    def choose(self, names: Sequence[str]) -> tuple[Table, ...]:
        """Return the named tables in the file's order; all of them for "all" or no name.

        Raises:
            UsageError: there is no such table.
        """
        known = {table.name: table for table in self.tables}
        for name in names:
            if name != ALL and name not in known:
                raise UsageError(explain("Unknown table", got=name, choices=[*known, ALL]))
        return self.tables if not names or ALL in names else tuple(t for t in self.tables if t.name in names)

    def config(self, row: Row | None, overrides: Settings) -> TrainConfig:
        """Return the settings of a row or of the full model: base < preset of the row < `overrides` < settings of the
        row.

        Raises:
            UsageError: values that do not fit.
        """
        if row is None:
            return merge(self.base, overrides)
        return merge(self.base, preset(row.preset) if row.preset else {}, overrides, row.settings)

    def streams(self) -> set[str]:
        """Return all streams named by rows."""
        configs = [self.config(row, {}) for row in (None, *(row for table in self.tables for row in table.rows))]
        return {name for config in configs for name in (*config.visual, *config.audio)}


def load_study(path: Path | None = None) -> Study:
    """Read a file of tables; None: the built-in one.

    Raises:
        UsageError: it cannot be read, is not TOML, or a part of it is not understood; the row is named.
    """
    name = str(path or "paper_tables.toml")
    try:
        text = (path or resources.files("vaflow.train").joinpath("paper_tables.toml")).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(explain(f"{name} is not TOML", expected="UTF-8", got=error)) from error
    except OSError as error:
        raise UsageError(explain(f"Cannot read the tables {name}", got=error.strerror)) from error
    return parse_study(text, name)


def parse_study(text: str, name: str) -> Study:
    """Parse the text of a file of tables; `name` stands in messages.

    Raises:
        UsageError: it is not TOML, or a part of it is not understood; the row is named.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, brackets without end
        expected = "tables as in the built-in file"
        raise UsageError(explain(f"{name} is not TOML", expected=expected, got=error)) from error
    tables = document.get("table")
    if not isinstance(tables, dict) or not tables:
        raise UsageError(explain(f"{name} has no tables", expected="[table.NAME] with rows [[table.NAME.row]]"))
    _only(document, ("base", "table"), name)
    base = document.get("base", {})
    if not isinstance(base, dict):
        raise UsageError(explain(f"{name}: [base] is not a table of settings", got=base))
    settings = {key: setting for key, setting in base.items() if key != "preset"}
    _check_settings(settings, f"{name}, [base]")
    if "preset" in base:
        settings = preset(str(base["preset"])) | settings
    study = Study(settings, tuple(_table(key, value, name) for key, value in tables.items()), text)
    for table in study.tables:
        for row in table.rows:
            try:
                study.config(row, {})
            except UsageError as error:
                raise UsageError(f"{name}, table {row.table}, row {row.name!r}: {error}") from error
    return study


def _table(name: str, value: object, file: str) -> Table:
    where = f"{file}, table {name}"
    if name == ALL or not isinstance(value, dict):
        raise UsageError(explain(f"{where} is not understood", expected=f"[table.NAME], NAME not {ALL!r}", got=value))
    _only(value, ("title", "row"), where)
    rows = value.get("row")
    if not isinstance(rows, list) or not rows:
        raise UsageError(explain(f"{where} has no rows", expected=f"[[table.{name}.row]] with a name and settings"))
    parsed = tuple(_row(name, row, where) for row in rows)
    names = [row.name for row in parsed]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UsageError(explain(f"{where} has two rows of one name", got=twice))
    return Table(name, str(value.get("title", "")), parsed)


def _row(table: str, value: object, where: str) -> Row:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str) or not name.strip():
        raise UsageError(explain(f"{where}: a row has no name", expected='name = "..."', got=value))
    where = f"{where}, row {name!r}"
    settings = {key: setting for key, setting in value.items() if key not in ROW_KEYS}
    _check_settings(settings, where)
    if "seed" in settings:
        raise UsageError(explain(f"{where} sets a seed", remedy="Every row is trained with every seed: --seeds N"))
    each = value.get("each", "")
    if each and each not in EACH:
        raise UsageError(explain(f"{where}: unknown value for each", got=each, choices=EACH))
    return Row(table, name, settings, str(value.get("preset", "")), _paper(value.get("paper"), where), each)


def _check_settings(settings: Settings, where: str) -> None:
    """Raise an error that names the position of an unknown setting or a value of another type."""
    for key, value in settings.items():
        try:
            coerce(key, value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error


def _paper(value: object, where: str) -> tuple[float, float, float] | None:
    if value is None:
        return None
    if isinstance(value, dict) and set(value) == set(SCORES):
        numbers = [float(value[name]) for name in SCORES if isinstance(value[name], int | float)]
        if len(numbers) == len(SCORES) and all(-1 <= number <= 1 for number in numbers):
            return numbers[0], numbers[1], numbers[2]
    expected = "{ valence = 0.1, arousal = 0.1, mean = 0.1 }"
    raise UsageError(explain(f"{where}: paper is not understood", expected=expected, got=value))


def _only(value: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise UsageError(explain(f"{where}: unknown key", got=key, choices=known))


def expand(table: Table, prompt_sets: Iterable[str]) -> Table:
    """Return the table with rows expanded: one per prompt set except the run's default."""
    others = sorted(set(prompt_sets) - {TrainConfig.prompts})
    rows: list[Row] = []
    for row in table.rows:
        if not row.each:
            rows.append(row)
            continue
        rows += [
            replace(row, name=row.name.replace("{prompts}", name), settings={**row.settings, "prompts": name}, each="")
            for name in others
        ]
    return replace(table, rows=tuple(rows))


def encoder_study(cache: Cache) -> Study:
    """Table `encoders`: the same heads on every stream of a cache, every pair, and all visual streams together.

    It is written as the TOML of any other table, so that `tables.toml` of the study repeats it. The full model has the
    first visual and the first audio stream.

    Raises:
        UsageError: the cache has no stream of an encoder.
    """
    visual, audio = encoder_streams(cache, "visual"), encoder_streams(cache, "audio")
    if not visual and not audio:
        raise UsageError(explain(f"{cache.place} has no encoder's stream", expected="a visual or an audio stream"))
    lines = ["[base]", 'preset = "p1"', *_selected(visual[:1], audio[:1]), ""]
    lines += [f"[table.{ENCODERS}]", 'title = "Encoders of the cache"', ""]
    rows = {name: _selected([name], []) for name in visual} | {name: _selected([], [name]) for name in audio}
    rows |= {f"{one} + {other}": _selected([one], [other]) for one in visual for other in audio}
    if len(visual) > 1:
        rows["all visual"] = _selected(visual, [])
    for name, settings in rows.items():
        lines += [f"[[table.{ENCODERS}.row]]", f"name = {json.dumps(name)}", *settings, ""]
    return parse_study("\n".join(lines), f"table {ENCODERS}")


def encoder_streams(cache: Cache, kind: str) -> list[str]:
    """Names of the visual or audio streams of a cache."""
    return [name for name, info in cache.streams().items() if info.kind == kind]


def _selected(visual: Sequence[str], audio: Sequence[str]) -> list[str]:
    return [f"visual = {json.dumps(list(visual) or [NONE])}", f"audio = {json.dumps(list(audio) or [NONE])}"]
