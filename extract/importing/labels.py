"""The labels stream of imported features: a clip's clock, split and annotation, from tables or from its features."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Record, StreamInfo
from vaflow.datasets.files import below
from vaflow.datasets.labels import on_clock
from vaflow.datasets.videos import read_csv
from vaflow.errors import DataError, UsageError, explain
from vaflow.extract.importing.feature_files import TABLE, FeatureFile, Features
from vaflow.extract.sources import file_identity, same_file
from vaflow.extract.streams import provenance
from vaflow.timeline import Floats, median_interval

CLOCK = "imported"

_NO_FRAMES = np.empty(0, np.float64)


@dataclass(frozen=True)
class Prepared:
    """Arrays, source and facts of one item of the labels stream."""

    arrays: dict[str, Any]
    source: dict[str, Any]
    meta: dict[str, Any]


class ImportedLabels:
    """Writes the labels of imported items; where a cache was extracted from videos, leaves its labels alone.

    Args:
        cache: writable.
        stream: the features' name: labels made from their times are theirs, and change with them.
        rate: rows per second, or None.
        folder: of label tables, or None.
        splits: item -> split, or None where no list says.

    Raises:
        UsageError: tables are given, and the cache's labels come from videos.
    """

    def __init__(
        self, cache: Cache, stream: str, rate: float | None, folder: Path | None, splits: Mapping[str, str] | None
    ) -> None:
        self._cache, self._stream, self._rate, self._folder, self._splits = cache, stream, rate, folder, splits
        known = cache.streams().get(LABELS)
        self._extracted = known is not None and known.identity.get("clock") != CLOCK
        if self._extracted and folder is not None:
            raise UsageError(
                explain(
                    f"The labels of {cache.place} come from its videos and cannot be mixed with others",
                    got=f"--labels {folder}",
                    remedy="Leave --labels out, or import into a cache of its own",
                )
            )
        if not self._extracted:
            cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS, "clock": CLOCK}))

    def needed(self, file: FeatureFile) -> bool:
        """Whether the item's labels are missing, or are no longer what its files say.

        Raises:
            DataError: the cache was extracted from videos, and this item is none of them.
        """
        if not self._cache.has(LABELS, file.item):
            if self._extracted:
                problem = f"{self._cache.place} was extracted from videos, and {file.item!r} is none of them"
                raise DataError(explain(problem, remedy="Name the files as the cache's items, or extract it first"))
            return True
        return not self._extracted and not self._same(file, self._cache.record(LABELS, file.item))

    def _same(self, file: FeatureFile, record: Record) -> bool:
        source, table = record.source, self._table(file.item)
        if self._splits is not None and source.get("split") != self._splits.get(file.item):
            return False
        if table is not None and not ("labels" in source and same_file(table, source["labels"])):
            return False
        if source.get("stream") != self._stream:
            return True  # another stream's rows are its clock
        if self._folder is not None and table is None and "labels" in source:
            return False  # there was a table, and it was taken away
        parts = {"features": file.path} | ({"time": file.times} if file.times else {})
        mine = {name for name in ("features", "time") if name in source}
        return mine == parts.keys() and all(same_file(parts[name], source[name]) for name in parts)

    def _table(self, item: str) -> Path | None:
        if self._folder is None:
            return None
        path = below(self._folder, f"{item}{TABLE}")
        return path if path.is_file() else None

    def prepare(self, file: FeatureFile, features: Features) -> Prepared:
        """Labels on their own times; on the features' rows, where the table counts frames or there is none.

        Raises:
            DataError: the table cannot be used; every problem is named with its lines.
        """
        table = self._table(file.item)
        annotation = read_csv(table) if table is not None else None
        own_times = annotation is not None and annotation.time is not None
        arrays = on_clock(annotation, _NO_FRAMES if own_times else features.time)
        source: dict[str, Any] = {"stream": self._stream, "features": file_identity(file.path)}
        if file.times is not None:
            source["time"] = file_identity(file.times)
        if table is not None:
            source["labels"] = file_identity(table)
        split = self.split(file.item)
        source |= {"split": split, "group": file.item}
        meta = {
            "split": split,
            "group": file.item,
            "duration": max(self._end(features.time), self._end(arrays["time"])),
            "frames": len(arrays["time"]),
            "rows": 0 if annotation is None else len(annotation.value),
            "targets": [] if annotation is None else list(annotation.targets),
        }
        return Prepared(arrays, source, meta)

    def split(self, item: str) -> str | None:
        """What the list of splits says; without a list, what the cache has already."""
        if self._splits is not None:
            return self._splits.get(item)
        return self._cache.meta(item).get("split") if self._cache.has(LABELS, item) else None

    def _end(self, time: Floats) -> float:
        interval = 1 / self._rate if self._rate else 1 / 30
        return float(time[-1] + median_interval(time, default=interval))

    def commit(self, item: str, prepared: Prepared) -> None:
        """Write what `prepare` made."""
        meta = prepared.meta | provenance()
        self._cache.write(LABELS, item, prepared.arrays, source=prepared.source, meta=meta)
