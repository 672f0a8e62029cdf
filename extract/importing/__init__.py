"""Import features of other programs as a stream of a cache: `vaflow cache import`. Commits one item at a time.

A visual stream keeps one row per time. An audio stream keeps one window, [1, T, D], that begins at 0 and whose steps
are the rows: for every step of a training window, stage two reads the row nearest in time, at any rate. Labels come
from tables; without a table, an item's clock is that of its features and nothing is annotated.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.remote import shown_place
from vaflow.cache.schema import FLOAT, LABELS, LOGMEL, PIXELS, Kind, StreamInfo
from vaflow.datasets.files import SPLITS_FILE, Assignment, assign, head, usable
from vaflow.errors import DataError, UsageError, command, examples, explain
from vaflow.extract.importing.feature_files import (
    Columns,
    FeatureFile,
    Features,
    Moments,
    Scale,
    Signature,
    files_below,
    find_features,
    fit,
    item_groups,
    read_features,
    signature,
)
from vaflow.extract.importing.labels import SUFFIXES, ImportedLabels, LabelOptions, label_path
from vaflow.extract.streams import provenance
from vaflow.files import FAILURES, Failure, FailureLog

KINDS: tuple[Kind, ...] = ("visual", "audio")
ENCODER = "imported"
SHOWN = 10  # failures that are logged; the file lists all of them

IMPORT_FAILURES = "failures-import.jsonl"  # in a cache that was extracted, whose own list stays

_RESERVED = (LABELS, LOGMEL, PIXELS)
_MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportConfig:
    """The settings of an import.

    Attributes:
        stream: name of the features in the cache.
        kind: "visual" or "audio".
        rate: rows per second, for items without times in their files.
        dtype: "float16" or "float32", of stored features.
        columns: roles of the columns of feature and label tables.
        label_rate: rows per second of labels that count frames; None: they count the rows of the features.
        normalize_by: column of `splits.csv` ("speaker", say) within whose groups features become z-scores; "item":
            within each item; None: stored as they are.

    Raises:
        UsageError: a value is not one of these, or the name belongs to a stream of another kind.
    """

    stream: str
    kind: str
    rate: float | None = None
    dtype: str = "float16"
    columns: Columns = field(default_factory=Columns)
    label_rate: float | None = None
    normalize_by: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(explain("Features of this kind cannot be imported", got=self.kind, choices=KINDS))
        if self.dtype not in FLOAT:
            raise UsageError(explain("Unknown value for dtype", got=self.dtype, choices=FLOAT))
        for name, rate in (("--rate", self.rate), ("--label-rate", self.label_rate)):
            if rate is not None and not (np.isfinite(rate) and rate > 0):
                raise UsageError(explain(f"{name} must be positive", expected="rows per second", got=rate))
        if self.stream in _RESERVED or self.stream.endswith(".text"):
            problem = f"The name {self.stream!r} is reserved for a stream of another kind"
            raise UsageError(explain(problem, remedy="Choose another name for the features"))


@dataclass
class ImportSummary:
    """The result of an import.

    Attributes:
        items: feature files that were found.
        imported: items whose features were committed, `changed` of them in place of older ones.
        done: items that were up to date; labelled: items whose labels or clock were committed.
        rows: rows of the imported items; `masked` of them hold NaN or infinity and are marked invalid.
        annotated: items of the import that have labels in the cache, with `label_rows` rows.
        label_problems: code of `vaflow.datasets.labels.clock_problem` -> items whose labels were committed.
        absent: items of the stream that have no feature file in the folder.
        failures: items that failed, with their reasons; `failures_file` lists them.
    """

    items: int = 0
    imported: int = 0
    changed: int = 0
    done: int = 0
    labelled: int = 0
    rows: int = 0
    masked: int = 0
    annotated: int = 0
    label_rows: int = 0
    label_problems: dict[str, list[str]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    failures_file: Path | str = Path()


def import_features(
    out: Path,
    folder: Path,
    config: ImportConfig,
    *,
    labels: Path | None = None,
    store: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> ImportSummary:
    """Import every item below `folder` into the cache at `out`, created if missing; run again to resume.

    Items whose files have not changed are skipped; changed ones are replaced. Items that fail do not stop the others.
    The stream's identity is the encoder "imported" with these settings: other settings need another name.

    Args:
        folder: features, as `feature_files` describes.
        labels: folder of label files, as `labels` describes, and perhaps `splits.csv`, which may also be in `folder`.
        store: of a new cache; None: "zarr", or the store of the cache.
        progress: called with 1 after every item.

    Raises:
        UsageError: a folder does not exist or holds nothing to import, no label file fits an item, `splits.csv` has
            mistakes, numbers are beyond the range of `dtype`, or the cache's labels come from videos and others are
            given.
        FingerprintError: the stream exists with other settings.
        CacheError: the cache cannot be written to.
    """
    folder, labels = folder.absolute(), labels.absolute() if labels is not None else None
    files = _find(folder, labels)
    assigned = _assignment(files, labels, folder, config)
    existing = (out / _MANIFEST).exists()
    strangers = _strangers(files, labels, folder, open_cache(out).items() if existing else [])
    scales = _survey(out, files, config, assigned, folder, labels)
    cache = open_cache(out, writable=True) if store is None and existing else create_cache(out, store=store or "zarr")
    options = LabelOptions(labels, config.columns, config.label_rate, assigned)
    target = ImportedLabels(cache, config.stream, config.rate, options)
    expected, info = _stream_of(cache, config, files)
    if info is not None and info.name in cache.streams():
        cache.declare(info)
        info = None
    failures = FailureLog(cache.path / (IMPORT_FAILURES if target.extracted else FAILURES))
    summary = ImportSummary(len(files), failures=failures.failures, failures_file=cache.layout.named(failures.path))
    work = _Import(cache, config, expected, info, target, scales, summary)
    try:
        for file in files:
            if (failure := work.add(file)) is not None:
                failures.add(failure, quiet=len(failures.failures) >= SHOWN)
            if progress is not None:
                progress(1)
        for item in strangers:
            message = explain(f"{item} has labels but no features", expected=f"{item}.npy or {item}.csv")
            failure = Failure(item, "labels", "DataError", message, {"split": None})
            failures.add(failure, quiet=len(failures.failures) >= SHOWN)
    finally:
        cache.refresh_index()
    if (rest := len(failures.failures) - SHOWN) > 0:
        log.warning("... and %d more failures, listed in %s", rest, failures.path)
    if config.stream in cache.streams():
        summary.absent = sorted(set(cache.items(stream=config.stream)) - {file.item for file in files})
    for file in files:
        meta = cache.meta(file.item) if cache.has(LABELS, file.item) else {}
        summary.annotated += bool(meta.get("targets"))
        summary.label_rows += int(meta.get("rows", 0)) if meta.get("targets") else 0
    return summary


@dataclass
class _Import:
    """Compares, reads and commits the items of one import.

    `new_stream` is declared with the first item: an import in which all items fail leaves no stream with its settings.
    """

    cache: Cache
    config: ImportConfig
    expected: Signature | None
    new_stream: StreamInfo | None
    labels: ImportedLabels
    scales: dict[str, Scale]
    summary: ImportSummary

    def add(self, file: FeatureFile) -> Failure | None:
        """Import one item; returns the failure if it fails."""
        stage = "features"
        try:
            need_features, need_labels = self._needs_features(file), self.labels.needed(file)
            if not need_features and not need_labels:
                self.summary.done += 1
                return None
            features = self._read(file)
            stage = "labels"
            prepared = self.labels.prepare(file, features) if need_labels else None
            stage = "commit"
            if need_features:
                self._commit(file, features)
            if prepared is not None:
                self.labels.commit(file.item, prepared)
                self.summary.labelled += 1
                if prepared.problem:
                    self.summary.label_problems.setdefault(prepared.problem, []).append(file.item)
        except (DataError, OSError, MemoryError) as error:
            split = self.labels.split(file.item)
            return Failure(file.item, stage, type(error).__name__, str(error) or repr(error), {"split": split})
        return None

    def _needs_features(self, file: FeatureFile) -> bool:
        stream = self.config.stream
        if not self.cache.has(stream, file.item):
            return True
        source = dict(self.cache.record(stream, file.item).source)
        if source.pop("normalization", None) != self._normalization(file):
            return True
        return not file.has_identity(source)

    def _normalization(self, file: FeatureFile) -> str | None:
        return self.scales[file.item].digest if file.item in self.scales else None

    def _read(self, file: FeatureFile) -> Features:
        shape = signature(file, self.config.columns)
        if shape != self.expected:
            problem = f"{file.path} does not fit the other items of stream {self.config.stream!r}"
            raise DataError(explain(problem, expected=self.expected, got=shape))
        features = read_features(file, self.config.rate, self.config.columns)
        return self.scales[file.item].apply(features) if file.item in self.scales else features

    def _commit(self, file: FeatureFile, features: Features) -> None:
        source = file.identity()
        if file.item in self.scales:
            source["normalization"] = self._normalization(file)
        if self.new_stream is not None:
            self.cache.declare(self.new_stream)
            self.new_stream = None
        masked = int((~features.valid).sum())
        changed = self.cache.has(self.config.stream, file.item)
        arrays = {"embedding": features.embedding.astype(self.config.dtype)}
        arrays |= {"time": features.time, "valid": features.valid}
        if self.config.kind == "audio":  # all rows are the steps of one window
            arrays = {name: array[None] for name, array in arrays.items()} | {"start": np.zeros(1)}
        meta = {"rows": len(features.valid), "masked": masked, **provenance()}
        self.cache.write(self.config.stream, file.item, arrays, source=source, meta=meta)
        self.summary.imported += 1
        self.summary.changed += changed
        self.summary.rows += len(features.valid)
        self.summary.masked += masked


def _find(folder: Path, labels: Path | None) -> list[FeatureFile]:
    """Every item's files; a UsageError if a folder does not exist or holds no features."""
    for name, path in (("features", folder), ("labels", labels)):
        if path is not None and not path.is_dir():
            raise UsageError(explain(f"The folder of {name} does not exist", expected="an existing folder", got=path))
    same = labels is not None and labels.resolve() == folder.resolve()
    files = find_features(folder, tables=not same, leave_out=[labels] if labels is not None else [])
    skipped = [ascii(name) for path in folder.rglob("*") if not usable(name := str(path.relative_to(folder)))]
    if skipped:
        log.warning("Files are skipped: names with a backslash or not in UTF-8: %s", examples(sorted(skipped)))
    if not files:
        expected = "<item>.npy with <item>.time.npy, or <item>.csv with a column 'time'"
        remedy = "Name the folder that holds them"
        raise UsageError(explain(f"{folder} holds no features", expected=expected, remedy=remedy))
    return files


def _assignment(
    files: Sequence[FeatureFile], labels: Path | None, folder: Path, config: ImportConfig
) -> Assignment | None:
    """Splits and groups of the items, from the first list of splits; None without one."""
    lists = [path for path in (labels, folder) if path is not None and (path / SPLITS_FILE).is_file()]
    if not lists:
        return None
    used = [config.normalize_by] if config.normalize_by else []
    assigned = assign(lists[0], [(file.item, file.item) for file in files], used=used)
    for note in assigned.notes:
        log.warning("%s. %s", note.message, note.remedy)
    return assigned


def _strangers(files: Sequence[FeatureFile], labels: Path | None, folder: Path, cached: Collection[str]) -> list[str]:
    """Return items with a label file but without features, here or in the cache.

    Raises:
        UsageError: no label file fits any item.
    """
    if labels is None:
        return []
    known = {file.item for file in files} | set(cached)
    tables = {}
    for path in sorted(files_below(labels, [folder])):
        name = path.relative_to(labels).as_posix()
        is_text = path.suffix == ".txt" and head(path).lower().startswith(("valence", "arousal"))
        if name != SPLITS_FILE and (path.suffix == ".csv" or is_text):
            tables[name.removesuffix(path.suffix)] = path
    if any(label_path(labels, item) is not None for item in known):
        return [item for item in tables if item not in known]
    if not tables and (labels / SPLITS_FILE).is_file():
        return []
    expected = f"files such as {files[0].item}{SUFFIXES[0]} or {files[0].item}{SUFFIXES[1]}"
    got = examples([path.name for path in tables.values()]) or "no label files"
    remedy = "Name label files as the feature files, or leave --labels out to import without labels"
    raise UsageError(explain(f"No label file in {labels} fits an item", expected=expected, got=got, remedy=remedy))


def _survey(
    out: Path,
    files: Sequence[FeatureFile],
    config: ImportConfig,
    assigned: Assignment | None,
    folder: Path,
    labels: Path | None,
) -> dict[str, Scale]:
    """Return item -> scale if features are normalised; reads all features before any write.

    Raises:
        UsageError: an item has no group, or numbers are beyond the range of the stored type.
    """
    items = [file.item for file in files]
    groups = item_groups(items, assigned, config.normalize_by) if config.normalize_by else {}
    if not groups and config.dtype == "float32":
        return {}
    cache = open_cache(out) if not groups and (out / _MANIFEST).exists() else None
    stored = cache if cache is not None and config.stream in cache.streams() else None
    moments = {}
    for file in files:
        try:
            if stored is not None and stored.has(config.stream, file.item):
                source = stored.record(config.stream, file.item).source
                if file.has_identity({name: part for name, part in source.items() if name != "normalization"}):
                    continue  # stored before, so within the range
            moments[file.item] = Moments.of(read_features(file, config.rate or 1.0, config.columns))
        except (DataError, OSError, MemoryError):  # reported when the item is imported
            continue
    widths = Counter(len(moment.mean) for moment in moments.values())
    usual = widths.most_common(1)[0][0] if widths else 0
    moments = {item: moment for item, moment in moments.items() if len(moment.mean) == usual}
    scales = fit(moments, groups) if groups else {}
    most = float(np.finfo(config.dtype).max)
    beyond = {}
    for item, moment in moments.items():
        ends = np.stack([moment.low, moment.high])
        if groups:
            ends = (ends - scales[groups[item]].mean) / scales[groups[item]].std
        if np.abs(ends).max(initial=0.0) > most:
            beyond[item] = float(np.abs(ends).max())
    if beyond:
        problem = f"{config.dtype} cannot hold the features of {examples(list(beyond))}"
        expected = f"numbers up to {most:g}; nothing was written"
        remedy = f"Make a new cache: {_with_float32(out, config, folder, labels)}"
        raise UsageError(explain(problem, expected=expected, got=f"{max(beyond.values()):g}", remedy=remedy))
    return {item: scales[groups[item]] for item in moments} if groups else {}


def _with_float32(out: Path, config: ImportConfig, folder: Path, labels: Path | None) -> str:
    """The command of this import, for a new cache that stores float32."""
    words: list[object] = ["--stream", config.stream, "--kind", config.kind, "--from", folder]
    named = {
        "--labels": labels,
        "--rate": config.rate,
        "--label-rate": config.label_rate,
        "--normalize-by": config.normalize_by,
    }
    for option, value in named.items():
        words += [] if value is None else [option, value]
    for name, role in config.columns.roles.items():
        words += ["--columns", f"{role}={name}"]
    return command("cache", "import", f"{shown_place(out)}-float32", *words, "--dtype", "float32")


def _stream_of(
    cache: Cache, config: ImportConfig, files: Sequence[FeatureFile]
) -> tuple[Signature | None, StreamInfo | None]:
    """Return the shape of the items and the stream; a new stream has the most frequent shape, none if all fail."""
    known = cache.streams().get(config.stream)
    if known is not None and known.kind == config.kind and known.identity.get("encoder") == ENCODER:
        expected: Signature | None = Signature(known.dim, known.identity.get("columns"))
    else:
        shapes: Counter[Signature] = Counter()
        for file in files:
            try:
                shapes[signature(file, config.columns)] += 1
            except (DataError, OSError):  # reported when the item is imported
                continue
        expected = shapes.most_common(1)[0][0] if shapes else None
    if expected is None:
        return None, None
    rate = None if config.rate is None else float(config.rate)
    identity: dict[str, Any] = {"encoder": ENCODER, "sampling": {"rate": rate}}
    if expected.columns is not None:
        identity["columns"] = expected.columns
    if config.normalize_by is not None:
        identity["normalized_by"] = config.normalize_by
    return expected, StreamInfo(config.stream, config.kind, expected.dim, config.dtype, identity)  # type: ignore[arg-type]
