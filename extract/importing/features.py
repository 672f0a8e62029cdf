"""Features made elsewhere -> streams of a cache: `vaflow cache import`. Reads and commits one item at a time.

A visual stream keeps one row per time. An audio stream keeps one window, [1, T, D], that begins at 0 and whose steps
are the rows: stage two then reads, for every step of a training window, the row nearest in time, at whatever rate.
Labels come from tables, or an item's clock is that of its features and nothing is annotated.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, create_cache, open_cache
from vaflow.cache.schema import FLOAT, LABELS, LOGMEL, PIXELS, Kind, StreamInfo
from vaflow.datasets.splits import SPLITS_FILE, assign
from vaflow.errors import DataError, UsageError, explain
from vaflow.extract.importing.feature_files import (
    TABLE,
    FeatureFile,
    Features,
    Signature,
    files_below,
    find_features,
    read_features,
    signature,
)
from vaflow.extract.importing.labels import ImportedLabels
from vaflow.extract.sources import file_identity, same_file
from vaflow.extract.streams import provenance
from vaflow.failures import FAILURES, Failure, FailureLog

KINDS: tuple[Kind, ...] = ("visual", "audio")
ENCODER = "imported"

_RESERVED = (LABELS, LOGMEL, PIXELS)
_MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportConfig:
    """What to import, checked.

    Attributes:
        stream: its name in the cache.
        kind: "visual" or "audio".
        rate: rows per second, for items without times of their own.
        dtype: "float16" or "float32", of what is stored.

    Raises:
        UsageError: a value is not one of these, or the name belongs to a stream of another kind.
    """

    stream: str
    kind: str
    rate: float | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(explain("Features of this kind cannot be imported", got=self.kind, choices=KINDS))
        if self.dtype not in FLOAT:
            raise UsageError(explain("Unknown value for dtype", got=self.dtype, choices=FLOAT))
        if self.rate is not None and not (np.isfinite(self.rate) and self.rate > 0):
            raise UsageError(explain("The rate must be positive", expected="rows per second", got=self.rate))
        if self.stream in _RESERVED or self.stream.endswith(".text"):
            remedy = "Choose another name for the features"
            raise UsageError(explain(f"The name {self.stream!r} belongs to a stream of another kind", remedy=remedy))


@dataclass
class ImportSummary:
    """What an import did.

    Attributes:
        imported: items whose features were committed, `changed` of them in the place of older ones.
        done: items with nothing to do; labelled: items whose labels or clock were committed.
        rows: of the imported items; `masked` of them hold NaN or infinity and are marked invalid.
        failures: items that failed, with their reasons; `failures_file` lists them.
    """

    imported: int = 0
    changed: int = 0
    done: int = 0
    labelled: int = 0
    rows: int = 0
    masked: int = 0
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
    """Import every item below `folder` into the cache at `out`, made if there is none; run again to resume.

    Items whose files have not changed are passed by; changed ones are replaced. Items that fail do not stop the
    others. The stream's identity is the encoder "imported" with these settings: other settings need another name.

    Args:
        out: the cache.
        folder: features, as `feature_files` describes.
        config: the settings.
        labels: folder of `<item>.csv` with `time` or `frame` (rows of the features), and `valence` and/or `arousal`,
            and perhaps `splits.csv`, which may also stand in `folder`.
        store: of a new cache; None: "zarr", or what the cache has.
        progress: called with 1 after every item.

    Raises:
        UsageError: a folder is not there or holds nothing to import, `splits.csv` has mistakes, or the cache's labels
            come from videos and others are given.
        FingerprintError: the stream was made with other settings.
        CacheError: the cache cannot be written to.
    """
    folder, labels = folder.absolute(), labels.absolute() if labels is not None else None
    files = _find(folder, labels)
    splits = _splits(files, labels, folder)
    cache = _cache(out, store)
    target = ImportedLabels(cache, config.stream, config.rate, labels, splits)
    expected = _declare(cache, config, files)
    failures = FailureLog(cache.path / FAILURES)
    summary = ImportSummary(failures=failures.failures, failures_file=cache.layout.named(failures.path))
    run = _Import(cache, config, expected, target, summary)
    try:
        for file in files:
            run.add(file, failures)
            if progress is not None:
                progress(1)
        _unknown_labels(cache, files, labels, folder, failures)
    finally:
        cache.refresh_index()
    return summary


class _Import:
    """One run: compares, reads and commits items."""

    def __init__(
        self,
        cache: Cache,
        config: ImportConfig,
        expected: Signature | None,
        labels: ImportedLabels,
        summary: ImportSummary,
    ) -> None:
        self._cache, self._config, self._expected = cache, config, expected
        self._labels, self._summary = labels, summary

    def add(self, file: FeatureFile, failures: FailureLog) -> None:
        """Import one item, or list why it cannot be."""
        stage = "features"
        try:
            need_features, need_labels = self._needs_features(file), self._labels.needed(file)
            if not need_features and not need_labels:
                self._summary.done += 1
                return
            features = self._read(file)
            stage = "labels"
            prepared = self._labels.prepare(file, features) if need_labels else None
            stage = "commit"
            if need_features:
                self._commit(file, features)
            if prepared is not None:
                self._labels.commit(file.item, prepared)
                self._summary.labelled += 1
        except (DataError, OSError, MemoryError) as error:
            split = self._labels.split(file.item)
            failures.add(Failure(file.item, stage, type(error).__name__, str(error) or repr(error), {"split": split}))

    def _needs_features(self, file: FeatureFile) -> bool:
        stream = self._config.stream
        if not self._cache.has(stream, file.item):
            return True
        source = self._cache.record(stream, file.item).source
        parts = {"features": file.path} | ({"time": file.times} if file.times else {})
        return source.keys() != parts.keys() or not all(same_file(parts[name], source[name]) for name in parts)

    def _read(self, file: FeatureFile) -> Features:
        found = signature(file)
        if found != self._expected:
            problem = f"{file.path} does not fit the other items of stream {self._config.stream!r}"
            raise DataError(explain(problem, expected=self._expected, got=found))
        return read_features(file, self._config.rate)

    def _commit(self, file: FeatureFile, features: Features) -> None:
        source = {"features": file_identity(file.path)}
        if file.times is not None:
            source["time"] = file_identity(file.times)
        masked = int((~features.valid).sum())
        changed = self._cache.has(self._config.stream, file.item)
        arrays = _arrays(file, features, self._config)
        meta = {"rows": len(features.valid), "masked": masked, **provenance()}
        self._cache.write(self._config.stream, file.item, arrays, source=source, meta=meta)
        self._summary.imported += 1
        self._summary.changed += changed
        self._summary.rows += len(features.valid)
        self._summary.masked += masked


def _arrays(file: FeatureFile, features: Features, config: ImportConfig) -> dict[str, Any]:
    """The stream's arrays: rows as they are, or for audio all of them as the steps of one window."""
    largest = float(np.abs(features.embedding).max(initial=0.0))
    if largest > float(np.finfo(config.dtype).max):
        problem = f"{file.path} holds {largest:g}, which {config.dtype} cannot"
        raise DataError(explain(problem, remedy="Import with --dtype float32, or scale the features"))
    embedding = features.embedding.astype(config.dtype)
    if config.kind == "visual":
        return {"embedding": embedding, "time": features.time, "valid": features.valid}
    start = np.zeros(1)
    return {"embedding": embedding[None], "time": features.time[None], "valid": features.valid[None], "start": start}


def _find(folder: Path, labels: Path | None) -> list[FeatureFile]:
    for name, path in (("features", folder), ("labels", labels)):
        if path is not None and not path.is_dir():
            raise UsageError(explain(f"There is no such folder of {name}", expected="an existing folder", got=path))
    same = labels is not None and labels.resolve() == folder.resolve()
    files = find_features(folder, tables=not same, leave_out=[labels] if labels is not None else [])
    if not files:
        raise UsageError(
            explain(
                f"{folder} holds no features",
                expected="<item>.npy with <item>.time.npy, or <item>.csv with a column 'time'",
                remedy="Name the folder that holds them",
            )
        )
    return files


def _splits(files: Sequence[FeatureFile], labels: Path | None, folder: Path) -> dict[str, str] | None:
    """Item -> split, from the first list there is; None without one."""
    lists = [path / SPLITS_FILE for path in (labels, folder) if path is not None and (path / SPLITS_FILE).is_file()]
    if not lists:
        return None
    assigned = assign(lists[0].parent, [(file.item, file.item) for file in files])
    for note in assigned.notes:
        log.warning("%s. %s", note.message, note.remedy)
    return assigned.splits


def _cache(out: Path, store: str | None) -> Cache:
    """The cache that is there, or a new one."""
    if store is None and (out / _MANIFEST).exists():
        return open_cache(out, writable=True)
    return create_cache(out, store=store or "zarr")


def _declare(cache: Cache, config: ImportConfig, files: Sequence[FeatureFile]) -> Signature | None:
    """Add the stream, or check that it was made with these settings; what its items look like.

    A new stream takes the shape that most items have. None where no item can be read: there is nothing to declare.
    """
    known = cache.streams().get(config.stream)
    if known is not None and known.kind == config.kind and known.identity.get("encoder") == ENCODER:
        expected: Signature | None = Signature(known.dim, known.identity.get("columns"))
    else:
        found: Counter[Signature] = Counter()
        for file in files:
            try:
                found[signature(file)] += 1
            except (DataError, OSError):  # said when the item's turn comes
                continue
        expected = found.most_common(1)[0][0] if found else None
    if expected is not None:
        rate = None if config.rate is None else float(config.rate)
        identity: dict[str, Any] = {"encoder": ENCODER, "sampling": {"rate": rate}}
        if expected.columns is not None:
            identity["columns"] = expected.columns
        cache.declare(StreamInfo(config.stream, config.kind, expected.dim, config.dtype, identity))  # type: ignore[arg-type]
    return expected


def _unknown_labels(
    cache: Cache, files: Sequence[FeatureFile], labels: Path | None, folder: Path, failures: FailureLog
) -> None:
    """List label files of items that have no features, here or in the cache."""
    if labels is None:
        return
    known = {file.item for file in files} | set(cache.items())
    for path in sorted(files_below(labels, [folder])):
        name = path.relative_to(labels).as_posix()
        item = name.removesuffix(TABLE)
        if name.endswith(TABLE) and name != SPLITS_FILE and item not in known:
            message = explain(f"There are labels for {item!r} and no features", expected=f"{item}.npy or {item}.csv")
            failures.add(Failure(item, "labels", "DataError", message, {"split": None}))
