"""Tables of `vaflow ablate`, and their schedule: the runs to train, their hashes, and rows that cannot be trained.

The format of the tables is described at the head of the built-in file, `vaflow/train/paper_tables.toml`.
"""

import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.cache.layout import canonical
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS
from vaflow.encoders import is_encoder
from vaflow.errors import UsageError, explain
from vaflow.timeline import Grid
from vaflow.train.config import BEFORE_SETTING, NONE, TrainConfig, coerce, merge, preset, with_aliases
from vaflow.train.data import data_key
from vaflow.train.folds import split_items
from vaflow.train.inputs import Inputs, resolve, sampling
from vaflow.train.metrics import SCORES

ALL = "all"
EACH = ("prompts",)
ROW_KEYS = ("name", "preset", "paper", "each")  # the other keys of a row are settings

Settings = Mapping[str, Any]
HASH_BYTES = 8
REFERENCE = "full model"  # name of the reference row, if no table contains it
IMPORTED = "imported"  # encoder of imported streams
STORED, FACES = "float16", "auto"  # defaults of `vaflow extract`
NO_PROMPTS = "without the prompt head: the cache has no prompt embeddings"


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
        """Settings of a row, or of the full model: base < preset of the row < `overrides` < settings of the row.

        Raises:
            UsageError: values that do not fit.
        """
        row = row or Row("", REFERENCE)
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
    """The table with one row per prompt set but the run's default, for every row that is for each of them."""
    others = sorted(set(prompt_sets) - {TrainConfig.prompts})
    rows: list[Row] = []
    for row in table.rows:
        if row.each:
            sets = {name: {**row.settings, "prompts": name} for name in others}
            rows += [replace(row, name=row.name.replace("{prompts}", n), settings=s, each="") for n, s in sets.items()]
        else:
            rows.append(row)
    return replace(table, rows=tuple(rows))


@dataclass(frozen=True)
class Options:
    """Options of a study besides its tables.

    Attributes:
        seeds: number of seeds, counted up from that of the settings.
        overrides: settings for every row; a row's own settings win.
        aliases: stream of the tables -> the stream used instead.
        allow_missing: leave labelled clips without features out of the metrics.
    """

    seeds: int = 3
    overrides: Settings = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(explain(f"--seeds must be >= 1 (got {self.seeds})"))


@dataclass(frozen=True)
class ScheduledRun:
    """One run: its hash, its resolved settings, and its name in messages."""

    key: str
    config: TrainConfig
    name: str


@dataclass(frozen=True)
class Entry:
    """A row with its settings and runs.

    Attributes:
        row: of the table; the reference is a row without a table.
        config: its settings, resolved if no stream is missing.
        keys: hash of the run of every seed; empty if there is a problem.
        stands_in: (named, used instead) for every stream with an alias.
        problem, error: why it cannot be trained, and the class of that error; empty: it can.
        note: remark on its numbers; empty: none.
        missing: (kind, stream) that the cache lacks.
    """

    row: Row
    config: TrainConfig
    keys: tuple[str, ...] = ()
    stands_in: tuple[tuple[str, str], ...] = ()
    problem: str = ""
    error: str = ""
    note: str = ""
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Rows of the chosen tables, the full model, and every run once, in the order of training."""

    tables: tuple[tuple[Table, tuple[Entry, ...]], ...]
    reference: Entry
    runs: tuple[ScheduledRun, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every row."""
        return tuple(entry for _, entries in self.tables for entry in entries)


def make_schedule(cache: Cache, study: Study, names: Sequence[str], options: Options) -> Schedule:
    """Resolve every row of the chosen tables against the cache.

    Raises:
        UsageError: an unknown table, or an alias that no row uses or that the cache cannot serve.
    """
    used, known = study.streams() - {NONE}, cache.streams()
    for name, other in options.aliases.items():
        if name not in used:
            raise UsageError(explain("No row names the stream of --alias", got=name, choices=used))
        if other != NONE and other not in known:
            raise UsageError(explain(f"{cache.place} lacks the stream to use for {name}", got=other, choices=known))
    sets = {s for name, info in known.items() if info.kind == "text" for s in cache.items(stream=name)}
    scheduler = _Scheduler(cache, study, options)
    tables = [expand(table, sets) for table in study.choose(names)]
    planned = tuple((table, tuple(scheduler.entry(row) for row in table.rows)) for table in tables)
    reference = scheduler.entry(None)
    return Schedule(planned, reference, scheduler.ordered())


class _Scheduler:
    """Collects runs while rows are resolved; rows with equal settings and streams share a run."""

    def __init__(self, cache: Cache, study: Study, options: Options) -> None:
        self._cache, self._study, self._options = cache, study, options
        self._known = cache.streams()
        self._has_text = any(info.kind == "text" for info in self._known.values())
        self._digests: dict[tuple[object, ...], str] = {}
        self._runs: dict[str, ScheduledRun] = {}

    def entry(self, row: Row | None) -> Entry:
        """Resolve a row; None: the full model."""
        shown = row or Row("", REFERENCE)
        named = self._study.config(row, self._options.overrides)
        aliases = self._options.aliases
        stands_in = tuple((name, aliases[name]) for name in aliases if name in {*named.visual, *named.audio})
        try:
            config = with_aliases(named, aliases)
        except UsageError as error:
            return Entry(shown, named, (), stands_in, str(error), type(error).__name__)
        if not self._has_text:
            config = replace(config, text="")
        streams = [(kind, name) for kind in ("visual", "audio") for name in getattr(config, kind) if name != NONE]
        missing = tuple(pair for pair in streams if pair[1] not in self._known)
        if missing:
            problem = explain(
                f"The cache has no stream {' and no stream '.join(name for _, name in missing)}",
                remedy=f"Add it (nothing else is encoded again): {add_command(self._cache, missing)}",
            )
            return Entry(shown, config, (), stands_in, problem, "MissingError", missing=missing)
        try:
            config, inputs = resolve(self._cache, config)
            seeded = [replace(config, seed=config.seed + seed) for seed in range(self._options.seeds)]
            keys = tuple(self._hash(run, inputs) for run in seeded)
        except UsageError as error:
            return Entry(shown, config, (), stands_in, str(error), type(error).__name__)
        row_name = f"table {shown.table}, {shown.name}" if shown.table else shown.name
        for key, run in zip(keys, seeded, strict=True):
            self._runs.setdefault(key, ScheduledRun(key, run, f"{row_name}, seed {run.seed}"))
        note = NO_PROMPTS if config.kl_weight and not inputs.text else ""
        return Entry(shown, config, keys, stands_in, note=note)

    def ordered(self) -> tuple[ScheduledRun, ...]:
        """Runs in the order of the tables, grouped by the data that they share."""
        groups: dict[tuple[object, ...], list[ScheduledRun]] = {}
        for run in self._runs.values():
            groups.setdefault(data_key(run.config), []).append(run)
        return tuple(run for group in groups.values() for run in group)

    def _hash(self, config: TrainConfig, inputs: Inputs) -> str:
        """Digest of everything that determines a run: settings, streams, prompts, clips; not the device.

        A later setting counts only where it changes what is trained: adding a setting keeps the runs of older studies.
        """
        older = {"device": config.device, **BEFORE_SETTING}
        settings = {key: value for key, value in config.as_dict().items() if key not in older or value != older[key]}
        names = [LABELS, *(stream.name for stream in inputs.streams), *config.extra_targets]
        names += (PIXELS, LOGMEL) if config.finetune else ()
        prompts: list[object] | None = None
        if inputs.text:
            source = self._cache.record(inputs.text, config.prompts).source
            prompts = [self._cache.fingerprint(inputs.text), config.prompts, source]
        document: dict[str, object] = {
            "settings": settings,
            "streams": {stream.name: stream.fingerprint for stream in inputs.streams},
            "prompts": prompts,
            "clips": {
                split: [self._clips(split, config.fold_splits, config.fold_groups, name) for name in names]
                for split in (config.train_split, config.val_split)
            },
        }
        if self._options.allow_missing:
            document["allow_missing"] = True
        return blake2b(canonical(document), digest_size=HASH_BYTES).hexdigest()

    def _clips(self, split: str, fold_splits: tuple[str, ...], fold_groups: str, stream: str) -> str:
        """Digest of the clips of a split in a stream, and of their sources."""
        key = (split, fold_splits, fold_groups, stream)
        if key not in self._digests:
            items = split_items(self._cache, split, fold_splits, fold_groups)
            records = [self._cache.record(stream, item) for item in items if self._cache.has(stream, item)]
            facts = json.dumps([[r.item, r.source, r.arrays] for r in records], sort_keys=True)
            self._digests[key] = blake2b(facts.encode(), digest_size=HASH_BYTES).hexdigest()
        return self._digests[key]


def add_command(cache: Cache, missing: Iterable[tuple[str, str]]) -> str:
    """The `vaflow extract` command that adds these (kind, stream) to the cache with the cache's settings.

    For streams without an encoder, the `vaflow cache import` command.
    """
    place, commands = shlex.quote(cache.place), []
    encoders: dict[str, list[str]] = {"visual": [], "audio": []}
    for kind, name in dict.fromkeys(missing):
        if name == LOGMEL or is_encoder(name, kind):
            encoders[kind].append(name)
        else:
            commands.append(f"vaflow cache import {place} --stream {shlex.quote(name)} --kind {kind} --from DIR")
    if any(encoders.values()):
        options = [
            f"--{kind} {shlex.quote(name)}"
            for kind, names in encoders.items()
            for name in [name for name in names if name != LOGMEL] or [NONE]
        ]
        commands.insert(0, " ".join([f"vaflow extract ROOT --out {place}", *options, *extract_options(cache)]))
    return "; ".join(commands)


def extract_options(cache: Cache) -> list[str]:
    """Options of sampling, faces, decoding and storage that differ from the defaults in the cache's streams."""
    infos = list(cache.streams().values())
    sampled = next(filter(None, (sampling(info.identity) for info in infos)), {})
    grid = Grid()
    usual = {"window": grid.window, "stride": grid.stride, "frames": grid.frames, "audio_steps": grid.frames}
    changed = [key for key, value in usual.items() if sampled.get(key, value) != value]
    options = [f"--{key.replace('_', '-')} {sampled[key]:g}" for key in changed]
    infos = [info for info in infos if info.kind in ("visual", "audio", "logmel")]
    dtype = next((info.dtype for info in infos if info.identity.get("encoder") != IMPORTED), STORED)
    frames: Mapping[str, Any] = next(filter(None, (info.identity.get("picture") for info in infos)), {})
    faces = frames.get("faces", {})
    precision = next(filter(None, (info.identity.get("precision") for info in infos)), "")
    different = {
        f"--dtype {dtype}": dtype != STORED,
        f"--faces {faces.get('source')}": faces.get("source", FACES) != FACES,
        "--decoder nvdec": "nvdec" in frames.get("decoder", {}).get("backend", ""),
        "--detector torch": faces.get("runtime", "").startswith("torch "),
        f"--precision {precision}": precision,
    }
    return options + [option for option, differs in different.items() if differs]
