"""Files of predictions: a CSV per clip, and what they were made from, `sources.json`.

A run's folder and its cache can change later; this file records what they were, and `vaflow provenance` compares.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import numpy as np

from vaflow import __version__
from vaflow.cache import Cache, address
from vaflow.cache.layout import canonical, fingerprint, now
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS, Record
from vaflow.datasets.clip import person_item
from vaflow.datasets.files import below
from vaflow.datasets.videos import has_predictions
from vaflow.encoders.prompts import REGIONS
from vaflow.errors import CorruptError, DataError, UsageError, examples, explain
from vaflow.files import Failure, is_behind_link, read_text, write_file
from vaflow.timeline import Floats
from vaflow.train.inputs import LOGMEL_INTERVAL, face_quality, speech_activity
from vaflow.train.losses import CENTERS, SIGMA
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.run_folder import ENSEMBLE_FILE
from vaflow.train.run_record import RunRecord
from vaflow.train.traces import Trace
from vaflow.train.uncertainty import CALIBRATION, TRAINING_FEATURES

log = logging.getLogger(__name__)

SOURCES_FILE = "sources.json"
_LONGEST_HEADER = 4096  # bytes of a table's first line


def write_predictions(folder: Path, traces: Iterable[Trace]) -> None:
    """Write one CSV per clip, `<item>.csv`; see `prediction_csv`."""
    for trace in traces:
        write_file(below(folder, f"{trace.clip.item}.csv"), prediction_csv(trace))


def prediction_csv(trace: Trace) -> str:
    """Text of a prediction CSV, a row per frame.

    Columns: frame (0-based), time (s), valence, arousal; label_valence, label_arousal where the clip is annotated
    (empty where a row is not); face, audio (0 or 1) where the run reads such a stream; region; valence_std,
    arousal_std and far_from_training (0 or 1) of runs with a variance head; interpolated (0 or 1); face_quality (0 to
    1) and speech (0 or 1) where the cache holds them.
    """
    clip = trace.clip
    columns: dict[str, Iterable[str]] = {
        "frame": map(str, range(len(clip.time))),
        "time": (f"{t:.6f}" for t in clip.time.tolist()),
    }
    columns |= {name: [f"{x:.6f}" for x in trace.va[:, k].tolist()] for k, name in enumerate(DIMENSIONS)}
    if clip.valid.any():
        for k, name in enumerate(DIMENSIONS):
            pairs = zip(clip.value[:, k].tolist(), clip.valid[:, k].tolist(), strict=True)
            columns[f"label_{name}"] = [f"{x:.6f}" if valid else "" for x, valid in pairs]
    flags = {"face": trace.face, "audio": trace.audio}
    columns |= {name: map(str, mask.astype(int).tolist()) for name, mask in flags.items() if mask is not None}
    columns["region"] = ("_".join(REGIONS[k]) for k in trace.region.tolist())
    if trace.std is not None:
        columns |= {f"{name}_std": [f"{x:.6f}" for x in trace.std[:, k].tolist()] for k, name in enumerate(DIMENSIONS)}
    flags = {"far_from_training": trace.far, "interpolated": trace.interpolated}
    columns |= {name: map(str, mask.astype(int).tolist()) for name, mask in flags.items() if mask is not None}
    if trace.face_quality is not None:
        columns["face_quality"] = [f"{x:.3f}" for x in trace.face_quality.tolist()]
    if trace.speech is not None:
        columns["speech"] = map(str, trace.speech.astype(int).tolist())
    rows = (",".join(row) for row in zip(*columns.values(), strict=True))
    return "\n".join([",".join(columns), *rows]) + "\n"


@dataclass(frozen=True)
class ItemSources:
    """Origin of one prediction.

    Attributes:
        csv: digest of the prediction's CSV.
        records: stream -> {"attempt", "created", "vaflow", "source"} of the clip's records.
        media: path of the clip's video, if the command had one.
        made: when; None in files of older versions.
        earlier: position in `PredictionSources.earlier` of what made it; None: what made the latest predictions.
    """

    csv: str
    records: Mapping[str, Mapping[str, Any]]
    media: str | None = None
    made: str | None = None
    earlier: int | None = None


@dataclass(frozen=True)
class PredictionSources:
    """Origin of the predictions in one folder.

    Attributes:
        made: when; vaflow: by which version.
        run: the folder of a run or an ensemble; settings: digest of its settings; weights: file -> digest.
        cache, store: where features were read.
        streams: name -> {"kind", "fingerprint", "identity"}.
        items: clip -> what its prediction was made from.
        centers, sigma: of the run's region prompts; of an ensemble, those of its first run.
        earlier: the same, without items, of clips that another run or the same run with other weights, streams or
            cache predicted into this folder earlier.
    """

    made: str
    vaflow: str
    run: str
    settings: str
    weights: Mapping[str, str]
    cache: str
    store: str
    streams: Mapping[str, Mapping[str, Any]]
    items: Mapping[str, ItemSources] = field(default_factory=dict)
    centers: float = CENTERS
    sigma: float = SIGMA
    earlier: Sequence["PredictionSources"] = ()

    def of(self, item: str) -> "PredictionSources":
        """What made the prediction of a clip."""
        position = self.items[item].earlier
        return self if position is None else self.earlier[position]


def digest(path: Path) -> str:
    """BLAKE2b (16 bytes) of a file, in hexadecimal, as sources in a cache have it. Raises OSError."""
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class Maker:
    """The origin of predictions: a run, or an ensemble of runs.

    Attributes:
        path: its folder.
        runs: folder -> what its `config.toml` says; of a run, itself alone.
        names: folder -> its name in `ensemble.json`, an earlier place if it was moved.
    """

    path: Path
    runs: Mapping[Path, RunRecord]
    names: Mapping[Path, str] = field(default_factory=dict)

    @property
    def settings(self) -> str:
        """BLAKE2b (16 bytes) of a run's settings; of an ensemble, of its runs' in their order."""
        configs = [record.settings or record.config.as_dict() for record in self.runs.values()]
        return blake2b(canonical(configs if self._many else configs[0]), digest_size=16).hexdigest()

    def weights(self) -> dict[str, str]:
        """File -> digest, for all that predictions depend on but the settings.

        Files are named below the run's folder; those of an ensemble's runs with it, beside `ensemble.json`.
        """
        if not self._many:
            return weights_digests(self.path)
        digests = {n: digest(self.path / n) for n in (ENSEMBLE_FILE, CALIBRATION) if (self.path / n).is_file()}
        for run in self.runs:
            place = self.names.get(run, run)
            digests |= {f"{place}/{name}": value for name, value in weights_digests(run).items()}
        return digests

    def streams(self) -> list[str]:
        """Return the streams of a prediction; a fine-tuned run reads the inputs of its own encoders."""
        names = [stream.name for record in self.runs.values() for stream in record.streams]
        tuned = any(record.tuned for record in self.runs.values())
        return list(dict.fromkeys([*names, *([PIXELS, LOGMEL] if tuned else []), LABELS]))

    @property
    def _many(self) -> bool:
        return list(self.runs) != [self.path]


def weights_digests(run: Path) -> dict[str, str]:
    """File -> digest, of the files of a run that its predictions depend on, but its settings."""
    patterns = ("model*.safetensors", "encoders/**/*", "smoothing.json", CALIBRATION, TRAINING_FEATURES)
    files = sorted(path for pattern in patterns for path in run.glob(pattern))
    return {path.relative_to(run).as_posix(): digest(path) for path in files if path.is_file()}


def write_sources(
    folder: Path, maker: Maker, cache: Cache, items: Iterable[str], media: Mapping[str, Path] | None = None
) -> None:
    """Write `sources.json` for the predictions in `folder`.

    Entries of other clips stay as long as their files exist, with the run that made them. Without items, nothing is
    written.

    Args:
        folder: holds `<item>.csv` of every item.
        media: where the clips' videos are, where that is known.

    Raises:
        VaflowError: the disk refuses.
    """
    files = {item: folder / f"{item}.csv" for item in items}
    if not files:
        return
    try:
        earlier = read_sources(folder)
    except CorruptError:
        earlier = None
    _write(folder / SOURCES_FILE, maker, cache, files, media or {}, earlier)


def write_evaluation(folder: Path, maker: Maker, cache: Cache, traces: Sequence[Trace]) -> None:
    """Write the predictions of a whole split and their sources, which replace those of an earlier evaluation.

    Clips of another cache, or dropped since, do not stay in the folder.

    Raises:
        DataError, OSError: a file cannot be written or deleted.
    """
    items = [trace.clip.item for trace in traces]
    _remove_others(folder, items)
    write_predictions(folder, traces)
    write_sources(folder, maker, cache, items)


def _remove_others(folder: Path, items: Iterable[str]) -> None:
    """Delete predictions that `sources.json` of a folder lists, of clips that are not among `items`."""
    try:
        earlier = read_sources(folder)
        stale = [] if earlier is None else sorted(earlier.items.keys() - set(items))
        files = [below(folder, f"{item}.csv") for item in stale]
    except (CorruptError, DataError):  # a damaged list: nothing is deleted on its word
        return
    for file in files:
        if not is_behind_link(folder, file):
            file.unlink(missing_ok=True)


def write_sources_of_file(file: Path, maker: Maker, cache: Cache, items: Iterable[str]) -> Path:
    """Write `<file>.sources.json` for predictions of many clips in one file; returns its path.

    Raises:
        VaflowError: the disk refuses.
    """
    path = _beside(file)
    _write(path, maker, cache, dict.fromkeys(items, file), {}, None)
    return path


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.{SOURCES_FILE}")


def _write(
    path: Path,
    maker: Maker,
    cache: Cache,
    files: Mapping[str, Path],
    media: Mapping[str, Path],
    earlier: PredictionSources | None,
) -> None:
    known = cache.streams()
    names = [name for name in maker.streams() if name in known]
    digests = {file: digest(file) for file in set(files.values())}
    items, made = {}, now()
    for item, file in files.items():
        records = {name: facts_of(cache.record(name, item)) for name in names if cache.has(name, item)}
        video = str(media[item].absolute()) if item in media else None
        items[item] = ItemSources(digests[file], records, video, made)
    config = next(iter(maker.runs.values())).config
    sources = PredictionSources(
        made=made,
        vaflow=__version__,
        run=str(maker.path.resolve()),
        settings=maker.settings,
        weights=maker.weights(),
        cache=address(cache.place),
        store=cache.store,
        streams={
            name: {"kind": known[name].kind, "fingerprint": fingerprint(known[name]), "identity": known[name].identity}
            for name in names
        },
        items=items,
        centers=config.centers,
        sigma=config.sigma,
    )
    if earlier is not None:
        sources = _with_earlier(path.parent, sources, earlier)
    write_file(path, (json.dumps(sources, default=vars, indent=1) + "\n"))


def _with_earlier(folder: Path, sources: PredictionSources, earlier: PredictionSources) -> PredictionSources:
    """Add the clips that earlier commands predicted, with what made them, if their files exist."""
    same = ("run", "settings", "weights", "streams", "cache", "store")
    items: dict[str, ItemSources] = {}
    makers: list[PredictionSources] = []
    for item, facts in earlier.items.items():
        if item in sources.items or not (folder / f"{item}.csv").is_file():
            continue
        maker, position = replace(earlier.of(item), items={}, earlier=()), None
        if any(getattr(maker, name) != getattr(sources, name) for name in same):
            makers += [maker] if maker not in makers else []
            position = makers.index(maker)
        items[item] = replace(facts, made=facts.made or maker.made, earlier=position)
    return replace(sources, items={**items, **sources.items}, earlier=tuple(makers))


def facts_of(record: Record) -> dict[str, Any]:
    """Origin of an item from its record: source, time and version."""
    return {
        "attempt": record.attempt,
        "created": record.created,
        "vaflow": record.meta.get("vaflow"),
        "source": record.source,
    }


def read_sources(place: Path) -> PredictionSources | None:
    """Read the sources of a folder (`write_sources`) or of a file (`write_sources_of_file`); None if there are none.

    Raises:
        CorruptError: it is damaged.
    """
    path = _beside(place) if place.is_file() else place / SOURCES_FILE
    try:
        document = json.loads(read_text(path))
        items = {item: ItemSources(**facts) for item, facts in document.pop("items").items()}
        earlier = tuple(PredictionSources(**facts) for facts in document.pop("earlier", ()))
        for item, facts in items.items():
            if facts.earlier is not None and facts.earlier not in range(len(earlier)):
                raise ValueError(f"{item} refers to an entry of `earlier` that does not exist")
        return PredictionSources(**document, items=items, earlier=earlier)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(explain(f"{path} cannot be read", got=error)) from error


def earlier_predictions(folder: Path, item: str) -> list[str]:
    """Names of the prediction CSVs of a clip in a folder, or of all its people; empty where there are none."""
    try:
        whole = below(folder, f"{item}.csv")
    except DataError:  # such a clip never has files
        return []
    people = sorted(folder.glob(f"{escape(person_item(item, 0).removesuffix('0'))}*.csv"))
    return [path.relative_to(folder).as_posix() for path in (whole, *people) if path.is_file()]


def with_earlier_predictions(folder: Path, failure: Failure) -> Failure:
    """The failure of a clip, whose message names the files that an earlier prediction left in the folder."""
    names = earlier_predictions(folder, failure.item)
    if not names:
        return failure
    return replace(failure, message=f"{failure.message.rstrip('.')}. Of an earlier prediction: {examples(names)}")


def warn_of_earlier_predictions(folder: Path, failures: Iterable[Failure]) -> None:
    """Log the files in a folder that are not of this prediction, because their clips failed."""
    if names := [name for failure in failures for name in earlier_predictions(folder, failure.item)]:
        log.warning("%s keeps earlier predictions of clips that failed now: %s", folder, examples(names))


def prediction_folders(run: Path) -> Iterator[Path]:
    """Folders of predictions of a run: one per split."""
    yield from sorted(path for path in (run / "predictions").glob("*") if path.is_dir())


def refuse_foreign_tables(out: Path, items: Iterable[str]) -> None:
    """Check that predictions replace predictions only, not label tables beside the videos.

    Raises:
        UsageError: `out` holds other tables of these names.
    """
    try:
        earlier = read_sources(out)
    except CorruptError:
        earlier = None
    known = set() if earlier is None else set(earlier.items)
    foreign = []
    for item in items:
        try:
            path = below(out, f"{item}.csv")
        except DataError:  # the clip fails when it is written
            continue
        if item not in known and path.is_file():
            with path.open("rb") as file:
                header = file.readline(_LONGEST_HEADER).decode("ascii", "replace").strip().split(",")
            if not has_predictions(header):
                foreign.append(path.name)
    if foreign:
        problem = f"{out} holds tables that predictions would replace"
        expected = "a directory without label tables of these names"
        raise UsageError(explain(problem, expected=expected, got=examples(foreign), remedy="Choose another --out"))


def frame_columns(cache: Cache, visual: Iterable[str], item: str, time: Floats) -> dict[str, Any]:
    """`face_quality` and `speech` at the frames of a clip, as far as the cache holds them.

    Args:
        visual: visual streams; the first one that holds the clip is taken.
        time: [R] seconds of the frames.
    """
    columns: dict[str, Any] = {}
    for stream in visual:
        if stream in cache.streams() and cache.has(stream, item):
            data = cache.read(stream, item, [n for n in ("time", "frame") if n in cache.record(stream, item).arrays])
            quality = face_quality(cache, stream, item, data)
            if quality is not None and len(quality):
                edges = (data.time[1:] + data.time[:-1]) / 2
                columns["face_quality"] = quality[np.searchsorted(edges, time)]
            break
    speech = speech_activity(cache, item)
    if speech is not None and len(speech):
        columns["speech"] = speech[
            np.clip(np.floor(time / LOGMEL_INTERVAL + 1e-6).astype(np.int64), 0, len(speech) - 1)
        ]
    return columns
