"""Where a prediction comes from: run, settings, weights, cache, streams, records, source files; and what has changed.

What was true when the predictions were written stands beside them (`sources.json`); here it is compared with what is
there now. Nothing is written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vaflow.cache import Cache, open_cache
from vaflow.cache.documents import fingerprint
from vaflow.datasets import open_dataset
from vaflow.datasets.clip import Clip
from vaflow.errors import CacheError, MediaError, UsageError, explain
from vaflow.extract.sources import PARTS, part_of, same_part
from vaflow.train.ensemble import maker_of, members_of
from vaflow.train.inputs import InputStream
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.provenance import (
    ItemSources,
    Maker,
    PredictionSources,
    digest,
    facts_of,
    prediction_folders,
    read_sources,
    run_maker,
)
from vaflow.train.runs import RunFolder, RunRecord

Json = dict[str, Any]

# What a comparison can come to.
SAME = "same"
CHANGED = "changed"
MISSING = "missing"
COPY = "a copy"  # another attempt, made from the same source at the same time: a converted or merged cache
UNKNOWN = "not checked"
NOT_SAID = "not recorded"


@dataclass(frozen=True)
class _Now:
    """What is there now."""

    maker: Maker
    settings: str
    weights: Mapping[str, str]
    cache: Cache | None
    cache_problem: str
    chosen: bool  # the caller said where the cache is
    clips: Mapping[str, Clip] | None  # of the data set, where its root was given

    @property
    def records(self) -> list[RunRecord]:
        """Of the run, or of the ensemble's runs."""
        return list(self.maker.runs.values())

    @property
    def trained_on(self) -> str:
        """The cache of the run, or of the ensemble's first one."""
        return self.records[0].cache

    @property
    def streams(self) -> list[InputStream]:
        """What they read, each once."""
        found: dict[str, InputStream] = {}
        for stream in (stream for record in self.records for stream in record.streams):
            found.setdefault(stream.name, stream)
        return list(found.values())


def trace_run(
    run: Path,
    item: str | None = None,
    *,
    cache: Path | None = None,
    root: Path | None = None,
    predictions: Path | None = None,
) -> Json:
    """Trace the predictions of a run, or of an ensemble of runs.

    Args:
        run: its folder.
        item: one clip; None: all.
        cache: where the cache is now, if it was moved.
        root: of the data set: the clips' files are read again, whole, and compared.
        predictions: another place of predictions than the run's own: a folder, as `vaflow predict --out` writes, or a
            file, as `vaflow submit --out` does.

    Returns:
        Plain JSON: "run", "cache", "streams", and "predictions": one object for every folder and item.

    Raises:
        UsageError: the folder is no run, there is no prediction of `item`, or `root` is no data set.
        CorruptError: a file of the run is damaged.
    """
    now = _look(run, cache, root)
    folders = [predictions] if predictions is not None else list(prediction_folders(run))
    found = [entry for folder in folders for entry in _folder(folder, now, item)]
    if item is not None and not found:
        known = sorted({name for folder in folders for name in _items(folder, read_sources(folder))})
        raise UsageError(explain(f"{run} has no prediction of that clip", got=item, choices=known))
    return {"run": _run(now), "cache": _cache(now), "streams": _streams(now), "predictions": found}


def _look(run: Path, cache: Path | None, root: Path | None) -> _Now:
    maker = maker_of(run)
    place = cache if cache is not None else next(iter(maker.runs.values())).cache
    opened, problem = None, ""
    try:
        opened = open_cache(place)
    except (CacheError, UsageError) as error:
        if cache is not None:
            raise
        problem = str(error)
    clips = None if root is None else {clip.id: clip for clip in open_dataset(root, "auto").clips}
    return _Now(maker, maker.settings, maker.weights(), opened, problem, cache is not None, clips)


def _run(now: _Now) -> Json:
    """A run; of an ensemble, what it weighs, and each of its runs."""
    path = now.maker.path
    if path in now.maker.runs:
        return _one_run(run_maker(path, now.maker.runs[path]))
    members = [_one_run(run_maker(run, record)) for run, record in now.maker.runs.items()]
    weights = {str(run): row for run, row in zip(*members_of(path), strict=True)}
    for member in members:
        member["weight"] = dict(zip(DIMENSIONS, weights[member["path"]].tolist(), strict=True))
    return {
        "path": str(path.resolve()),
        "vaflow": members[0]["vaflow"],
        "finished": all(member["finished"] for member in members),
        "settings_digest": now.settings,
        "weights": dict(now.weights),
        "ccc": _metrics(path).get("ccc"),
        "runs": members,
    }


def _one_run(maker: Maker) -> Json:
    record, folder = maker.runs[maker.path], RunFolder(maker.path)
    return {
        "path": str(maker.path.resolve()),
        "vaflow": record.version,
        "finished": folder.done,
        "settings": record.config.as_dict(),
        "settings_digest": maker.settings,
        "weights": maker.weights(),
        "data": {split: dict(counts) for split, counts in record.data.items()},
        "ccc": _metrics(maker.path).get("ccc"),
    }


def _metrics(path: Path) -> Json:
    folder = RunFolder(path)
    return folder.read_metrics() if folder.metrics_file.is_file() else {}


def _cache(now: _Now) -> Json:
    if now.cache is None:
        return {"path": now.trained_on, "state": MISSING, "problem": now.cache_problem}
    return {"path": now.cache.place, "state": "found", "store": now.cache.store}


def _streams(now: _Now) -> list[Json]:
    """What the run was trained on, prompts included, and whether the cache still has it."""
    known = now.cache.streams() if now.cache is not None else {}
    found = []
    for stream in now.streams:
        info = known.get(stream.name)
        state = _state(now.cache is not None, fingerprint(info) if info else None, stream.fingerprint)
        found.append(
            {
                "name": stream.name,
                "kind": stream.kind,
                "fingerprint": stream.fingerprint,
                "identity": dict(stream.identity),
                "state": state,
            }
        )
    sets = dict.fromkeys((record.config.text, record.config.prompts) for record in now.records if record.config.text)
    for text, prompts in sets:
        if text in known and now.cache is not None and now.cache.has(text, prompts):
            facts = facts_of(now.cache.record(text, prompts))
            found.append({"name": text, "kind": "text", "set": prompts, "state": "found", **facts})
            found[-1] |= {"fingerprint": fingerprint(known[text]), "identity": known[text].identity}
        else:
            state = MISSING if now.cache is not None else UNKNOWN
            found.append({"name": text, "kind": "text", "set": prompts, "state": state})
    return found


def _state(looked: bool, there: str | None, wanted: str) -> str:
    if not looked:
        return UNKNOWN
    return MISSING if there is None else SAME if there == wanted else CHANGED


def _items(folder: Path, said: PredictionSources | None) -> list[str]:
    """Every clip with a prediction in a folder."""
    if said is not None:
        return sorted(said.items)
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*.csv"))
    return sorted(name.removesuffix(".csv") for name in files)


def _csv(place: Path, item: str) -> Path:
    """Where a clip's prediction is: in a file of its own, or in the one file of all."""
    return place if place.is_file() else place / f"{item}.csv"


def _folder(folder: Path, now: _Now, item: str | None) -> Iterator[Json]:
    """One object per prediction in a folder."""
    said = read_sources(folder)
    if said is not None and not now.chosen:
        now = replace(now, cache=_cache_of(said, now))
    for name in _items(folder, said):
        if item not in (None, name):
            continue
        own = said.items.get(name) if said is not None else None
        entry: Json = {"item": name, "folder": str(folder), "csv": str(_csv(folder, name))}
        if said is None or own is None:
            entry |= {"state": NOT_SAID, "records": _records_now(now, name)}
        else:
            entry |= _compared(folder, said, own, name, now)
        entry["sources"] = _sources(entry["records"], _clip(now, name, own), looked=_can_look(now, name, own))
        yield entry


def _cache_of(said: PredictionSources, now: _Now) -> Cache | None:
    """The cache that predictions were made on, which need not be the one that the run was trained on."""
    if said.cache == now.trained_on:
        return now.cache
    try:
        return open_cache(said.cache)
    except (CacheError, UsageError):
        return None


def _compared(folder: Path, said: PredictionSources, own: ItemSources, item: str, now: _Now) -> Json:
    """A prediction whose making was recorded, with what has changed since."""
    entry = {
        "made": said.made,
        "vaflow": said.vaflow,
        "cache": said.cache,
        "csv_state": _file_state(_csv(folder, item), own.csv),
        "weights_state": SAME if said.weights.items() <= now.weights.items() else CHANGED,
        "settings_state": SAME if said.settings == now.settings else CHANGED,
        "streams": {name: facts["fingerprint"] for name, facts in said.streams.items()},
        "records": {
            stream: {**facts, "state": _record_state(now, stream, item, facts)} for stream, facts in own.records.items()
        },
    }
    states = [entry["csv_state"], entry["weights_state"], entry["settings_state"]]
    return entry | {"state": next((state for state in (MISSING, CHANGED) if state in states), SAME)}


def _file_state(path: Path, wanted: str) -> str:
    try:
        return SAME if digest(path) == wanted else CHANGED
    except OSError:
        return MISSING


def _record_state(now: _Now, stream: str, item: str, facts: Mapping[str, Any]) -> str:
    if now.cache is None:
        return UNKNOWN
    there = _record_now(now.cache, stream, item)
    if there is None:
        return MISSING
    if there["attempt"] == facts["attempt"]:
        return SAME
    return COPY if (there["created"], there["source"]) == (facts["created"], facts["source"]) else CHANGED


def _record_now(cache: Cache, stream: str, item: str) -> Json | None:
    """What the cache's record says; None where it has none that can be read."""
    try:
        return facts_of(cache.record(stream, item))
    except CacheError:
        return None


def _records_now(now: _Now, item: str) -> Json:
    """For predictions without `sources.json`: what the cache holds of the clip now, which is no proof."""
    if now.cache is None:
        return {}
    names = [*(stream.name for stream in now.streams), "labels"]
    found = {name: _record_now(now.cache, name, item) for name in names}
    return {name: {**facts, "state": NOT_SAID} for name, facts in found.items() if facts is not None}


def _can_look(now: _Now, item: str, own: ItemSources | None) -> bool:
    return now.clips is not None or (own is not None and own.media is not None)


def _clip(now: _Now, item: str, own: ItemSources | None) -> Clip | None:
    """Where the clip's files are: in the data set that was named, or where the prediction found its video."""
    if now.clips is not None:
        return now.clips.get(item)
    if own is not None and own.media is not None:
        video = Path(own.media)
        return Clip(item, None, item, video, video)
    return None


def _sources(records: Mapping[str, Mapping[str, Any]], clip: Clip | None, *, looked: bool) -> list[Json]:
    """Every different identity of every part that the records name, with the streams made of it, and its state."""
    found: list[Json] = []
    for stream, facts in records.items():
        for part, identity in facts["source"].items():
            if identity is None or part == "prompts":
                continue
            known = next((one for one in found if one["part"] == part and same_part(one["identity"], identity)), None)
            if known is not None:
                known["streams"].append(stream)
            else:
                found.append({"part": part, "identity": identity, "streams": [stream]})
    return [{**one, "state": _part_state(one, clip) if looked else UNKNOWN} for one in found]


def _part_state(one: Mapping[str, Any], clip: Clip | None) -> str:
    if one["part"] not in PARTS:  # features made elsewhere: their files are no part of a data set
        return UNKNOWN
    if clip is None:
        return MISSING
    try:
        now = part_of(clip, one["part"])
    except (OSError, MediaError):
        return MISSING
    if now is None:
        return MISSING
    return SAME if same_part(now, one["identity"]) else CHANGED
