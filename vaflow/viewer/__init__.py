"""Predictions on disk: the clips of a run or a folder, the table of each, and the runs below a directory.

The modules of this package make pages about them: the viewer of clips, the report of runs, ratings by hand, and the
overlay video. They read stable files: prediction CSV, `metrics.json`, `history.csv`, `config.toml`, the cache.
"""

import json
import logging
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as remembered
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, open_cache
from vaflow.cache.remote import url_of
from vaflow.cache.schema import Record
from vaflow.encoders import random_encoders
from vaflow.errors import CacheError, CorruptError, UsageError, VaflowError, examples, explain
from vaflow.files import read_text
from vaflow.timeline import Bools, Floats
from vaflow.train.folds import source_splits
from vaflow.train.metrics import DIMENSIONS, SCORES, smoothing_text

log = logging.getLogger(__name__)

REQUIRED = ("frame", "time", *DIMENSIONS)
SOURCES = "sources.json"
FLAGS = ("face", "audio", "far_from_training", "interpolated")  # columns of 0 and 1
ReadRecord = Callable[[str, str], Record]  # of a stream and an item
OpenedCache = tuple[Cache, ReadRecord]
_EMPTY_CELL = re.compile(rb",(?=[,\r\n]|$)")
_LIMIT = 4 * 2**30  # bytes of one CSV file
_DEPTH = 4  # directories below the one that `vaflow runs` searches


@dataclass(frozen=True)
class Predictions:
    """The table of one clip; N rows.

    Attributes:
        time: [N] seconds on the clip clock.
        va: [N, 2] predicted valence and arousal.
        label: [N, 2], NaN where a row is not labelled; None without label columns.
        std: [N, 2] standard deviations; None without such columns.
        face, audio: [N], whether the row has a face or audio; None without such columns.
        far: [N], whether the row is far from the training features; interpolated: whether it lies between two samples
            of the model; None without such columns.
    """

    time: Floats
    va: Floats
    label: Floats | None = None
    std: Floats | None = None
    face: Bools | None = None
    audio: Bools | None = None
    far: Bools | None = None
    interpolated: Bools | None = None


@dataclass(frozen=True)
class PredictedClip:
    """One prediction file.

    Attributes:
        split: of a run's predictions; "" otherwise.
        source: what `sources.json` says about the clip; empty without it.
    """

    item: str
    csv: Path
    split: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)

    def records(self) -> Iterator[Mapping[str, Any]]:
        """The source identities of the clip's streams."""
        for record in _mapping(self.source.get("records")).values():
            yield _mapping(_mapping(record).get("source"))

    def is_outdated(self, record_of: ReadRecord) -> bool:
        """Whether a cache lacks a record that the prediction was made from, or has another version of it.

        Args:
            record_of: `Cache.record` of the cache.
        """
        for stream, recorded in _mapping(self.source.get("records")).items():
            facts = _mapping(recorded)
            if "attempt" not in facts:
                continue
            try:
                record = record_of(stream, self.item)
            except CacheError:
                return True
            copied = (record.created, record.source) == (facts.get("created"), facts.get("source"))
            if record.attempt != facts["attempt"] and not copied:
                return True
        return False


@dataclass(frozen=True)
class PredictionSet:
    """The clips of a run or of a folder of predictions.

    Attributes:
        path: as the user named it.
        clips: sorted by split and id.
        cache: the cache that the features were read from; None if unknown.
        streams: the encoder streams that were read.
        centers, sigma: of the run's region prompts; the defaults if unknown.
    """

    path: Path
    clips: tuple[PredictedClip, ...]
    cache: str | None = None
    streams: tuple[str, ...] = ()
    centers: float = 0.66
    sigma: float = 0.45

    def open_cache(self, named: Path | None = None) -> Cache | None:
        """The cache that the user named, or else the one that the predictions name, if it still exists.

        Raises:
            VaflowError: the cache that the user named cannot be opened.
        """
        if named is None and self.cache is None:
            return None
        try:
            return open_cache(named or self.cache or "")
        except VaflowError as error:
            if named is not None:
                raise
            log.debug("Masks are read from the predictions only: %s", error)
            return None

    @property
    def demonstration(self) -> list[str]:
        """The encoders with seeded random weights."""
        return random_encoders(self.streams)


def find_predictions(path: Path, clips: Sequence[str] = ()) -> PredictionSet:
    """Return the predictions of a run, of a folder, or of one CSV file.

    Args:
        path: a run directory, a directory that `vaflow predict` wrote, or a prediction CSV.
        clips: ids to keep; all when empty.

    Raises:
        UsageError: the run has no predictions, or no clip has one of the ids.
        CorruptError: `sources.json` or `config.toml` is damaged.
    """
    run = _document(path / "config.toml")
    folders = sorted(p for p in (path / "predictions").glob("*") if p.is_dir())
    if path.is_file():
        predicted_clips = [PredictedClip(path.stem, path)]
        documents = [_document(path.parent / SOURCES)]
    elif folders:
        documents = [_document(folder / SOURCES) for folder in folders]
        predicted_clips = [
            c for folder, d in zip(folders, documents, strict=True) for c in _in_folder(folder, folder.name, d)
        ]
    else:
        documents = [_document(path / SOURCES)]
        predicted_clips = list(_in_folder(path, "", documents[0]))
    if not predicted_clips:
        expected = "a run directory, a directory written by `vaflow predict`, or a prediction CSV"
        got = None if path.exists() else "no such file or directory"
        remedy = "Run `vaflow predict RUN MEDIA... --out DIR`, then `vaflow view DIR --out PAGE`"
        raise UsageError(explain(f"{path} has no predictions", expected=expected, got=got, remedy=remedy))
    unknown = set(clips) - {clip.item for clip in predicted_clips}
    if unknown:
        choices = [clip.item for clip in predicted_clips][:50]
        raise UsageError(explain(f"{path} has no such clip", got=min(unknown), choices=choices))
    prompts = _mapping(run.get("train")) or documents[0]
    streams = [name for d in documents for name in _mapping(d.get("streams")) if name != "labels"]
    streams += [str(table.get("name")) for table in run.get("stream", ())]
    recorded = next((str(d["cache"]) for d in [*documents, run] if d.get("cache")), "")
    return PredictionSet(
        path,
        tuple(clip for clip in predicted_clips if not clips or clip.item in clips),
        cache_place(path, run, recorded) if recorded else None,
        tuple(dict.fromkeys(streams)),
        _positive(prompts.get("centers"), 0.66),
        _positive(prompts.get("sigma"), 0.45),
    )


def _in_folder(folder: Path, split: str, sources: Mapping[str, Any]) -> Iterator[PredictedClip]:
    items = _mapping(sources.get("items"))
    unlisted: list[str] = []
    for csv in sorted(folder.rglob("*.csv")):
        item = csv.relative_to(folder).as_posix().removesuffix(".csv")
        if is_prediction_table(csv):
            unlisted += [item] * (item not in items)
            yield PredictedClip(item, csv, split, _mapping(items.get(item)))
    if items and unlisted:
        problem = "another run, or an earlier version of this one, predicted them"
        log.warning("%s does not list %s: %s", folder / SOURCES, examples(unlisted), problem)
    if others := _of_other_runs(sources):
        log.warning("%s: another run, or other weights, predicted %s", folder / SOURCES, examples(others))


def _of_other_runs(sources: Mapping[str, Any]) -> list[str]:
    """Clips of a `sources.json` that another run made than the latest ones, or the same run with other weights."""
    makers = sources.get("earlier")
    names = ("run", "settings", "weights")
    makers = [_mapping(maker) for maker in makers] if isinstance(makers, list) else []
    other = [k for k, maker in enumerate(makers) if any(maker.get(name) != sources.get(name) for name in names)]
    items = _mapping(sources.get("items")).items()
    return [item for item, facts in items if _mapping(facts).get("earlier") in other]


def is_prediction_table(path: Path) -> bool:
    """Whether a CSV file begins with the columns of predictions; label files do not."""
    return _header(path)[: len(REQUIRED)] == list(REQUIRED)


def read_predictions(path: Path) -> Predictions:
    """Return the table of a prediction CSV.

    Raises:
        CorruptError: the file is not a prediction CSV.
    """
    header = _header(path)
    label, std = [
        [f"{prefix}{name}{suffix}" for name in DIMENSIONS] for prefix, suffix in (("label_", ""), ("", "_std"))
    ]
    columns_present = [c for c in (*REQUIRED[1:], *label, *std, *FLAGS) if c in header]
    try:
        if not set(REQUIRED) <= set(header):
            raise ValueError(f"its columns are {', '.join(header)[:80]!r}")
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"it is larger than {_LIMIT} bytes")
        lines = _EMPTY_CELL.sub(b",nan", path.read_bytes()).decode().splitlines()
        if len(lines) < 2:
            raise ValueError("it has no rows")
        columns = [header.index(name) for name in columns_present]
        table = np.loadtxt(lines, delimiter=",", skiprows=1, usecols=columns, ndmin=2, comments=None)
        time = table[:, 0]
        if not np.isfinite(table[:, :3]).all() or (np.diff(time) < 0).any():
            raise ValueError("it has a value that is not finite, or times that do not ascend")
    except (ValueError, OSError) as error:
        expected = f"a CSV file with columns {', '.join(REQUIRED)}"
        raise CorruptError(explain(f"Cannot read the predictions {path}", expected=expected, got=error)) from error
    column = dict(zip(columns_present, table.T, strict=True))
    both = [
        np.stack([column[n] for n in names], axis=1) if set(names) <= set(column) else None for names in (label, std)
    ]
    flags = [column[name] > 0 if name in column else None for name in FLAGS]
    return Predictions(time, table[:, 1:3], *both, *flags)


@dataclass(frozen=True)
class RunLine:
    """One line of `vaflow runs`: a run and its headline, or why it has none.

    Attributes:
        outdated: clips whose records in the cache are no longer those that were scored, and clips that left or joined
            the split; empty if this is not known, because the cache is not on this machine.
    """

    path: str
    status: str
    streams: str = ""
    temporal: str = ""
    fusion: str = ""
    seed: int | None = None
    split: str = ""
    epochs: int | None = None
    ccc: Mapping[str, float | None] = field(default_factory=dict)
    ci95: Mapping[str, Any] = field(default_factory=dict)
    smoothing: str = ""
    outdated: Sequence[str] = ()


def list_runs(root: Path) -> Iterator[RunLine]:
    """Yield every run below a directory, sorted by path.

    Raises:
        UsageError: the directory does not exist.
    """
    if not root.is_dir():
        raise UsageError(explain(f"{root} is not a directory", expected="a directory with runs"))
    caches: dict[str, OpenedCache | None] = {}
    patterns = ["/".join(["*"] * depth + ["config.toml"]) for depth in range(_DEPTH + 1)]
    for path in sorted(file for pattern in patterns for file in root.glob(pattern)):
        line = _line(root, path.parent, caches)
        if line is not None:
            yield line


def _line(root: Path, run: Path, caches: dict[str, OpenedCache | None]) -> RunLine | None:
    name = run.relative_to(root).as_posix()
    try:
        config = tomllib.loads(read_text(run / "config.toml"))
        if not isinstance(config.get("train"), dict):
            return None
        train = config["train"]
        common: dict[str, Any] = {
            "streams": ", ".join(str(stream.get("name")) for stream in config.get("stream", ())),
            "temporal": str(train.get("temporal", "")),
            "fusion": str(train.get("fusion", "")),
            "seed": train.get("seed"),
        }
        if not (run / "metrics.json").is_file():
            return RunLine(name, "not finished", **common)
        metrics = json.loads(read_text(run / "metrics.json"))
        if smoothing := metrics.get("smoothing"):
            tuned = f", tuned on {smoothing['chosen_on']}" if smoothing["chosen_on"] else ""
            common["smoothing"] = f"{smoothing_text(smoothing)}{tuned}"
        scores = {d: metrics["ccc"].get(d) for d in SCORES}
        return RunLine(
            name, "done", **common, split=str(metrics["split"]), epochs=metrics.get("epochs"), ccc=scores,
            ci95=metrics.get("ci95", {}), outdated=_outdated(run, config, str(metrics["split"]), caches),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return RunLine(name, "damaged")


def _outdated(
    run: Path, config: Mapping[str, Any], split: str, caches: dict[str, OpenedCache | None]
) -> tuple[str, ...]:
    """`RunLine.outdated` of a run.

    Args:
        caches: address -> a cache that was opened, with its records, each read once for all runs; None where the cache
            is on an object store, or cannot be opened.
    """
    folder = run / "predictions" / split
    try:
        sources = _document(folder / SOURCES)
    except CorruptError as error:
        log.warning("It is not known whether the clips of %s have changed: %s", run, error)
        return ()
    place = cache_place(run, config, str(sources.get("cache") or ""))
    if place not in caches:
        cache = PredictionSet(run, (), place).open_cache() if place and url_of(place) is None else None
        caches[place] = None if cache is None else (cache, remembered(cache.record))
    opened = caches[place]
    if opened is None:
        return ()
    cache, record_of = opened
    items = ((item, _mapping(source)) for item, source in _mapping(sources.get("items")).items())
    clips = [PredictedClip(item, folder / f"{item}.csv", split, source) for item, source in items]
    return outdated_clips(clips, split, cache, record_of)


def outdated_clips(clips: Sequence[PredictedClip], split: str, cache: Cache, record_of: ReadRecord) -> tuple[str, ...]:
    """Names of clips whose records are no longer those that were scored, and of clips that left or joined the split.

    Folds follow from the labels of all clips: of a fold, only changed records are known.

    Args:
        clips: all that were scored as `split`.
        record_of: `cache.record`.
    """
    changed = [clip.item for clip in clips if clip.is_outdated(record_of)]
    now = scored = {clip.item for clip in clips}
    if source_splits(split, ()) == (split,):  # no fold
        try:
            now = set(cache.items(split=split))
        except UsageError:  # no clip has this split any more
            now = set()
        except CacheError:
            now = scored
    return tuple(dict.fromkeys([*changed, *sorted(now ^ scored)]))


def cache_place(run: Path, config: Mapping[str, Any], recorded: str) -> str:
    """Where a cache is: the recorded place, or, if the run was moved with it, the same place relative to the run.

    Args:
        config: the run's `config.toml`; empty for predictions outside of runs.
    """
    relative = config.get("cache_relative")
    if recorded != config.get("cache") or not isinstance(relative, str) or not relative or Path(recorded).exists():
        return recorded
    return str((run.resolve() / relative).resolve())


def _header(path: Path) -> list[str]:
    try:
        if path.exists() and not path.is_file():  # a named pipe would block
            return []
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(4096).strip().split(",")
    except OSError as error:
        raise UsageError(explain(f"Cannot read {path}", got=error.strerror)) from error


def _document(path: Path) -> Mapping[str, Any]:
    """A TOML or JSON file; empty without it."""
    loads = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        return _mapping(loads(read_text(path))) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CorruptError(explain(f"Cannot read {path}", got=error)) from error


def _positive(value: Any, otherwise: float) -> float:
    """A number of a file that other programs may have written."""
    return float(value) if isinstance(value, int | float) and 0 < value < inf else otherwise


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
