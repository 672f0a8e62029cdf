"""From tables to runs: which configurations must be trained, under which hash, and what keeps a row from being so."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from vaflow.cache import Cache
from vaflow.cache.documents import canonical
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS
from vaflow.encoders import encoder_kind
from vaflow.errors import UsageError, explain
from vaflow.timeline import Grid
from vaflow.train.ablate.grid import Row, Settings, Study, Table, expand
from vaflow.train.config import NONE, TrainConfig, with_aliases
from vaflow.train.folds import split_items
from vaflow.train.inputs import Inputs, resolve, sampling

HASH_BYTES = 8
REFERENCE = "full model"  # name of the row that others are compared with, where no table has it
IMPORTED = "imported"  # encoder of streams whose features were made elsewhere
STORED, FACES = "float16", "auto"  # what `vaflow extract` does where it is not told
NO_PROMPTS = "without the prompt head: the cache has no prompt embeddings"


@dataclass(frozen=True)
class Options:
    """What was asked for beside the tables.

    Attributes:
        seeds: how many; they count up from the settings' own seed.
        overrides: settings for every row; what a row itself sets wins.
        aliases: stream of the tables -> the one that stands in for it.
        allow_missing: leave labelled clips without features out of the metrics.
    """

    seeds: int = 3
    overrides: Settings = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(explain("Without a seed nothing is trained", expected="--seeds 1 or more", got=self.seeds))


@dataclass(frozen=True)
class Job:
    """One run: its hash, its resolved settings, and what people call it."""

    key: str
    config: TrainConfig
    name: str


@dataclass(frozen=True)
class Entry:
    """A row with what was made of it.

    Attributes:
        row: of the table; for the full model as reference, a row of no table.
        config: its settings; resolved, where nothing is missing.
        keys: hash of the run of every seed; empty where there is a problem.
        stands_in: (asked for, used instead) for every stream of it that has an alias.
        problem, error: why it cannot be trained, and of what kind that is; empty: it can.
        note: what a reader of its numbers must know; empty: nothing.
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
class Plan:
    """All rows of the chosen tables, the full model, and every run once, in the order in which they are best done."""

    tables: tuple[tuple[Table, tuple[Entry, ...]], ...]
    reference: Entry
    jobs: tuple[Job, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every row."""
        return tuple(entry for _, entries in self.tables for entry in entries)


def make_plan(cache: Cache, study: Study, names: Sequence[str], options: Options) -> Plan:
    """Resolve every row of the chosen tables against the cache.

    Raises:
        UsageError: an unknown table, or an alias that no row uses or that the cache cannot serve.
    """
    _check_aliases(cache, study, options.aliases)
    sets = {s for name, info in cache.streams().items() if info.kind == "text" for s in cache.items(stream=name)}
    planner = _Planner(cache, study, options)
    tables = [expand(table, sets) for table in study.choose(names)]
    planned = tuple((table, tuple(planner.entry(row) for row in table.rows)) for table in tables)
    reference = planner.entry(None)
    return Plan(planned, reference, planner.ordered())


def _check_aliases(cache: Cache, study: Study, aliases: Mapping[str, str]) -> None:
    used, known = study.streams() - {NONE}, cache.streams()
    for name, other in aliases.items():
        if name not in used:
            raise UsageError(
                explain("No row names this stream, so nothing can stand in for it", got=name, choices=used)
            )
        if other != NONE and other not in known:
            raise UsageError(
                explain(f"{cache.place} has no such stream to stand in for {name}", got=other, choices=known)
            )


class _Planner:
    """Collects jobs while rows are resolved; equal settings on equal streams are one job."""

    def __init__(self, cache: Cache, study: Study, options: Options) -> None:
        self._cache, self._study, self._options = cache, study, options
        self._known = cache.streams()
        self._has_text = any(info.kind == "text" for info in self._known.values())
        self._digests: dict[tuple[object, ...], str] = {}
        self._jobs: dict[str, Job] = {}

    def entry(self, row: Row | None) -> Entry:
        """What the row comes to; None: the full model."""
        shown = row or Row("", REFERENCE)
        asked = self._study.config(row, self._options.overrides)
        stands_in = tuple((name, other) for name, other in self._options.aliases.items() if name in _named(asked))
        try:
            config = with_aliases(asked, self._options.aliases)
        except UsageError as error:
            return Entry(shown, asked, (), stands_in, str(error), type(error).__name__)
        if not self._has_text:
            config = replace(config, text="")
        missing = tuple(pair for pair in _streams(config) if pair[1] not in self._known)
        if missing:
            problem = explain(
                f"The cache has no stream {' and no stream '.join(name for _, name in missing)}",
                remedy=f"Add it, nothing else is encoded again: {add_command(self._cache, missing)}",
            )
            return Entry(shown, config, (), stands_in, problem, "MissingError", missing=missing)
        try:
            config, inputs = resolve(self._cache, config)
            keys = tuple(self._job(config, inputs, shown, seed) for seed in range(self._options.seeds))
        except UsageError as error:
            return Entry(shown, config, (), stands_in, str(error), type(error).__name__)
        note = NO_PROMPTS if config.kl_weight and not inputs.text else ""
        return Entry(shown, config, keys, stands_in, note=note)

    def ordered(self) -> tuple[Job, ...]:
        """Runs that share loaded data stand together; within that, as the tables have them."""
        groups: dict[tuple[object, ...], list[Job]] = {}
        for job in self._jobs.values():
            groups.setdefault(data_key(job.config), []).append(job)
        return tuple(job for group in groups.values() for job in group)

    def _job(self, config: TrainConfig, inputs: Inputs, row: Row, seed: int) -> str:
        config = replace(config, seed=config.seed + seed)
        key = self._hash(config, inputs)
        place = f"table {row.table}, {row.name}" if row.table else row.name
        self._jobs.setdefault(key, Job(key, config, f"{place}, seed {config.seed}"))
        return key

    def _hash(self, config: TrainConfig, inputs: Inputs) -> str:
        """Everything that decides what a run comes to: settings, streams, prompts, clips. Not the device."""
        settings = {key: value for key, value in config.as_dict().items() if key != "device"}
        names = [LABELS, *(stream.name for stream in inputs.streams), *config.extra_targets]
        names += (PIXELS, LOGMEL) if config.finetune else ()
        document: dict[str, object] = {
            "settings": settings,
            "streams": {stream.name: stream.fingerprint for stream in inputs.streams},
            "prompts": self._prompts(inputs.text, config.prompts) if inputs.text else None,
            "clips": {
                split: [self._clips(split, config.fold_splits, name) for name in names]
                for split in (config.train_split, config.val_split)
            },
        }
        if self._options.allow_missing:
            document["allow_missing"] = True
        return blake2b(canonical(document), digest_size=HASH_BYTES).hexdigest()

    def _prompts(self, stream: str, prompts: str) -> list[object]:
        return [self._cache.fingerprint(stream), prompts, self._cache.record(stream, prompts).source]

    def _clips(self, split: str, fold_splits: tuple[str, ...], stream: str) -> str:
        """Digest of which clips of a split a stream has, and what they were made from."""
        key = (split, fold_splits, stream)
        if key not in self._digests:
            items = split_items(self._cache, split, fold_splits)
            records = [self._cache.record(stream, item) for item in items if self._cache.has(stream, item)]
            facts = json.dumps([[r.item, r.source, r.arrays] for r in records], sort_keys=True)
            self._digests[key] = blake2b(facts.encode(), digest_size=HASH_BYTES).hexdigest()
        return self._digests[key]


def data_key(config: TrainConfig) -> tuple[object, ...]:
    """Runs that agree in this read the same windows of the same streams."""
    streams = (config.visual, config.audio)
    windows = (config.window, config.stride, config.frames, config.audio_steps, config.label_reduction)
    clips = (config.train_split, config.val_split, config.fold_splits, config.extra_targets)
    return (*streams, *windows, *clips, config.device)


def _named(config: TrainConfig) -> set[str]:
    return {*config.visual, *config.audio}


def _streams(config: TrainConfig) -> Iterable[tuple[str, str]]:
    for kind in ("visual", "audio"):
        for name in getattr(config, kind):
            if name != NONE:
                yield kind, name


def add_command(cache: Cache, missing: Iterable[tuple[str, str]]) -> str:
    """The `vaflow extract` that adds these (kind, stream) to the cache, made as the cache was, and nothing else.

    For streams that no encoder makes, the `vaflow cache import` that brings them in.
    """
    missing = list(dict.fromkeys(missing))
    known = [(kind, name) for kind, name in missing if _has_encoder(name)]
    commands = [
        f"vaflow cache import {shlex.quote(cache.place)} --stream {shlex.quote(name)} --kind {kind} --from DIR"
        for kind, name in missing
        if (kind, name) not in known
    ]
    if known:
        wanted = {
            kind: [name for k, name in known if k == kind and name != LOGMEL] or [NONE] for kind in ("visual", "audio")
        }
        options = [f"--{kind} {shlex.quote(name)}" for kind, names in wanted.items() for name in names]
        command = f"vaflow extract ROOT --out {shlex.quote(cache.place)} {' '.join(options)}"
        commands.insert(0, " ".join([command, *_sampling_options(cache), *_reading_options(cache)]))
    return "; ".join(commands)


def _has_encoder(name: str) -> bool:
    try:
        encoder_kind(name)
    except UsageError:
        return False
    return True


def _sampling_options(cache: Cache) -> list[str]:
    """Options that the cache's streams were extracted with, where they are not the defaults."""
    said = next((found for info in cache.streams().values() if (found := sampling(info.identity))), {})
    grid = Grid()
    usual = {"window": grid.window, "stride": grid.stride, "frames": grid.frames, "audio_steps": grid.frames}
    return [f"--{key.replace('_', '-')} {said[key]:g}" for key in usual if key in said and said[key] != usual[key]]


def _reading_options(cache: Cache) -> Iterator[str]:
    """Options of how pictures are had and features are stored, where they are not the defaults."""
    infos = [info for info in cache.streams().values() if info.kind in ("visual", "audio", "logmel")]
    dtype = next((info.dtype for info in infos if info.identity.get("encoder") != IMPORTED), STORED)
    picture: Mapping[str, Any] = next((found for info in infos if (found := info.identity.get("picture"))), {})
    faces = picture.get("faces", {}).get("source", FACES)
    backend = picture.get("decoder", {}).get("backend", "")
    precision = next((found for info in infos if (found := info.identity.get("precision"))), "")
    yield from [f"--dtype {dtype}"] if dtype != STORED else []
    yield from [f"--faces {faces}"] if faces != FACES else []
    yield from ["--decoder nvdec"] if "nvdec" in backend else []
    yield from ["--detector torch"] if picture.get("faces", {}).get("runtime", "").startswith("torch ") else []
    yield from [f"--precision {precision}"] if precision else []
