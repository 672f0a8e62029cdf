"""Schedule of a study: the configurations to train, their hashes, and the rows that cannot be trained."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from vaflow.cache import Cache
from vaflow.cache.documents import canonical
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS
from vaflow.encoders import is_encoder
from vaflow.errors import UsageError, explain
from vaflow.timeline import Grid
from vaflow.train.ablate.grid import Row, Settings, Study, Table, expand
from vaflow.train.config import BEFORE_SETTING, NONE, TrainConfig, with_aliases
from vaflow.train.groups import split_items
from vaflow.train.inputs import Inputs, resolve, sampling
from vaflow.train.session import data_key

HASH_BYTES = 8
REFERENCE = "full model"  # name of the reference row, if no table contains it
IMPORTED = "imported"  # encoder of imported streams
STORED, FACES = "float16", "auto"  # defaults of `vaflow extract`
NO_PROMPTS = "without the prompt head: the cache has no prompt embeddings"


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
            keys = tuple(self._schedule(config, inputs, shown, seed) for seed in range(self._options.seeds))
        except UsageError as error:
            return Entry(shown, config, (), stands_in, str(error), type(error).__name__)
        note = NO_PROMPTS if config.kl_weight and not inputs.text else ""
        return Entry(shown, config, keys, stands_in, note=note)

    def ordered(self) -> tuple[ScheduledRun, ...]:
        """Runs in the order of the tables, grouped by the data that they share."""
        groups: dict[tuple[object, ...], list[ScheduledRun]] = {}
        for run in self._runs.values():
            groups.setdefault(data_key(run.config), []).append(run)
        return tuple(run for group in groups.values() for run in group)

    def _schedule(self, config: TrainConfig, inputs: Inputs, row: Row, seed: int) -> str:
        config = replace(config, seed=config.seed + seed)
        key = self._hash(config, inputs)
        row_name = f"table {row.table}, {row.name}" if row.table else row.name
        self._runs.setdefault(key, ScheduledRun(key, config, f"{row_name}, seed {config.seed}"))
        return key

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
    missing = list(dict.fromkeys(missing))
    encoders = {n for _, n in missing if n == LOGMEL or is_encoder(n, "visual") or is_encoder(n, "audio")}
    known = [(kind, name) for kind, name in missing if name in encoders]
    commands = [
        f"vaflow cache import {shlex.quote(cache.place)} --stream {shlex.quote(name)} --kind {kind} --from DIR"
        for kind, name in missing
        if (kind, name) not in known
    ]
    if known:
        streams_of_encoders = {
            kind: [name for k, name in known if k == kind and name != LOGMEL] or [NONE] for kind in ("visual", "audio")
        }
        options = [f"--{kind} {shlex.quote(name)}" for kind, names in streams_of_encoders.items() for name in names]
        command = f"vaflow extract ROOT --out {shlex.quote(cache.place)} {' '.join(options)}"
        commands.insert(0, " ".join([command, *_sampling_options(cache), *_reading_options(cache)]))
    return "; ".join(commands)


def _sampling_options(cache: Cache) -> list[str]:
    """Sampling options of the cache's streams that differ from the defaults."""
    sampled = next(filter(None, (sampling(info.identity) for info in cache.streams().values())), {})
    grid = Grid()
    usual = {"window": grid.window, "stride": grid.stride, "frames": grid.frames, "audio_steps": grid.frames}
    changed = {key: value for key, value in usual.items() if sampled.get(key, value) != value}
    return [f"--{key.replace('_', '-')} {sampled[key]:g}" for key in changed]


def _reading_options(cache: Cache) -> Iterator[str]:
    """Options of faces, decoding and storage of the cache's streams that differ from the defaults."""
    infos = [info for info in cache.streams().values() if info.kind in ("visual", "audio", "logmel")]
    dtype = next((info.dtype for info in infos if info.identity.get("encoder") != IMPORTED), STORED)
    frames: Mapping[str, Any] = next(filter(None, (info.identity.get("picture") for info in infos)), {})
    faces = frames.get("faces", {}).get("source", FACES)
    backend = frames.get("decoder", {}).get("backend", "")
    precision = next(filter(None, (info.identity.get("precision") for info in infos)), "")
    yield from [f"--dtype {dtype}"] if dtype != STORED else []
    yield from [f"--faces {faces}"] if faces != FACES else []
    yield from ["--decoder nvdec"] if "nvdec" in backend else []
    yield from ["--detector torch"] if frames.get("faces", {}).get("runtime", "").startswith("torch ") else []
    yield from [f"--precision {precision}"] if precision else []
