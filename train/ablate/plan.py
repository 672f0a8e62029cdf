"""Plan of a study: the configurations to train, their hashes, and the rows that cannot be trained."""

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
from vaflow.train.config import BEFORE_SETTING, NONE, TrainConfig, with_aliases
from vaflow.train.folds import split_items
from vaflow.train.inputs import Inputs, resolve, sampling

HASH_BYTES = 8
REFERENCE = "full model"  # name of the row that others are compared with, where no table has it
IMPORTED = "imported"  # encoder of imported streams
STORED, FACES = "float16", "auto"  # defaults of `vaflow extract`
NO_PROMPTS = "without the prompt head: the cache has no prompt embeddings"


@dataclass(frozen=True)
class Options:
    """Options of a study beside its tables.

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
class Job:
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
class Plan:
    """Rows of the chosen tables, the full model, and every run once, in the order of training."""

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
            raise UsageError(explain("No row names the stream of --alias", got=name, choices=used))
        if other != NONE and other not in known:
            raise UsageError(explain(f"{cache.place} lacks the stream to use for {name}", got=other, choices=known))


class _Planner:
    """Collects jobs while rows are resolved; rows with equal settings and streams share a job."""

    def __init__(self, cache: Cache, study: Study, options: Options) -> None:
        self._cache, self._study, self._options = cache, study, options
        self._known = cache.streams()
        self._has_text = any(info.kind == "text" for info in self._known.values())
        self._digests: dict[tuple[object, ...], str] = {}
        self._jobs: dict[str, Job] = {}

    def entry(self, row: Row | None) -> Entry:
        """Resolve a row; None: the full model."""
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
                remedy=f"Add it (nothing else is encoded again): {add_command(self._cache, missing)}",
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
        """Jobs in the order of the tables, grouped by the data that they share."""
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
        """Digest of everything that determines a run: settings, streams, prompts, clips; not the device.

        A later setting counts only where it changes what is trained: adding a setting keeps the runs of older studies.
        """
        older = {"device": config.device, **BEFORE_SETTING}
        settings = {key: value for key, value in config.as_dict().items() if key not in older or value != older[key]}
        names = [LABELS, *(stream.name for stream in inputs.streams), *config.extra_targets]
        names += (PIXELS, LOGMEL) if config.finetune else ()
        document: dict[str, object] = {
            "settings": settings,
            "streams": {stream.name: stream.fingerprint for stream in inputs.streams},
            "prompts": self._prompts(inputs.text, config.prompts) if inputs.text else None,
            "clips": {
                split: [self._clips(split, config.fold_splits, config.fold_groups, name) for name in names]
                for split in (config.train_split, config.val_split)
            },
        }
        if self._options.allow_missing:
            document["allow_missing"] = True
        return blake2b(canonical(document), digest_size=HASH_BYTES).hexdigest()

    def _prompts(self, stream: str, prompts: str) -> list[object]:
        return [self._cache.fingerprint(stream), prompts, self._cache.record(stream, prompts).source]

    def _clips(self, split: str, fold_splits: tuple[str, ...], fold_groups: str, stream: str) -> str:
        """Digest of the clips of a split in a stream, and of their sources."""
        key = (split, fold_splits, fold_groups, stream)
        if key not in self._digests:
            items = split_items(self._cache, split, fold_splits, fold_groups)
            records = [self._cache.record(stream, item) for item in items if self._cache.has(stream, item)]
            facts = json.dumps([[r.item, r.source, r.arrays] for r in records], sort_keys=True)
            self._digests[key] = blake2b(facts.encode(), digest_size=HASH_BYTES).hexdigest()
        return self._digests[key]


def data_key(config: TrainConfig) -> tuple[object, ...]:
    """Key that is equal for runs that read the same windows of the same streams."""
    streams = (config.visual, config.audio)
    windows = (config.window, config.stride, config.frames, config.audio_steps, config.label_reduction)
    clips = (config.train_split, config.val_split, config.fold_splits, config.fold_groups, config.extra_targets)
    return (*streams, *windows, *clips, config.device)


def _named(config: TrainConfig) -> set[str]:
    return {*config.visual, *config.audio}


def _streams(config: TrainConfig) -> Iterable[tuple[str, str]]:
    for kind in ("visual", "audio"):
        for name in getattr(config, kind):
            if name != NONE:
                yield kind, name


def add_command(cache: Cache, missing: Iterable[tuple[str, str]]) -> str:
    """The `vaflow extract` command that adds these (kind, stream) to the cache with the cache's settings.

    For streams without an encoder, the `vaflow cache import` command.
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
    """Sampling options of the cache's streams that differ from the defaults."""
    said = next((found for info in cache.streams().values() if (found := sampling(info.identity))), {})
    grid = Grid()
    usual = {"window": grid.window, "stride": grid.stride, "frames": grid.frames, "audio_steps": grid.frames}
    return [f"--{key.replace('_', '-')} {said[key]:g}" for key in usual if key in said and said[key] != usual[key]]


def _reading_options(cache: Cache) -> Iterator[str]:
    """Options of faces, decoding and storage of the cache's streams that differ from the defaults."""
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
