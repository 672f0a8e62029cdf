"""Provenance of predictions: run, settings, weights, cache, streams, records and source files, and what has changed.

`sources.json` beside the predictions stores their origin; this module compares it with the present state.
Nothing is written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vaflow.cache import Cache, open_cache
from vaflow.cache.layout import fingerprint
from vaflow.datasets import open_dataset
from vaflow.datasets.clip import Clip, clip_and_person
from vaflow.errors import CacheError, MediaError, UsageError, command, explain
from vaflow.extract.source_files import PARTS, part_of, same_part
from vaflow.train.ensemble import maker_of, members_of
from vaflow.train.inputs import InputStream
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.prediction_files import (
    ItemSources,
    Maker,
    PredictionSources,
    digest,
    facts_of,
    prediction_folders,
    read_sources,
)
from vaflow.train.run_folder import RunFolder, cache_of
from vaflow.train.run_record import RunRecord

Json = dict[str, Any]

# Results of a comparison with the present state.
SAME = "same"
CHANGED = "changed"
MISSING = "missing"
COPY = "a copy"  # another attempt from the same source and time: a converted or merged cache
NOT_CHECKED = "not checked"
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Present:
    """The present state that predictions are compared with.

    Attributes:
        maker: the run or ensemble; settings: digest of its settings; weights: file -> digest.
        cache: None where it cannot be opened; cache_problem is the reason.
        cache_given: the caller named the cache.
        clips: of the data set, where its root was given.
        run_missing: the run that made predictions does not exist; `maker` is another one.
    """

    maker: Maker
    settings: str
    weights: Mapping[str, str]
    cache: Cache | None
    cache_problem: str
    cache_given: bool
    clips: Mapping[str, Clip] | None
    run_missing: bool = False

    @property
    def records(self) -> list[RunRecord]:
        """Of the run, or of the ensemble's runs."""
        return list(self.maker.runs.values())

    @property
    def trained_on(self) -> str:
        """The cache of the run, or of the ensemble's first run."""
        return self.records[0].cache

    @property
    def streams(self) -> list[InputStream]:
        """Input streams of the runs, each once."""
        return list({stream.name: stream for record in reversed(self.records) for stream in record.streams}.values())

    def record(self, stream: str, item: str) -> Json | None:
        """Facts of the cache's record; None where it has none that can be read."""
        if self.cache is None:
            return None
        try:
            return facts_of(self.cache.record(stream, item))
        except CacheError:
            return None

    def clip(self, item: str, recorded: ItemSources | None) -> Clip | None:
        """The clip's files: in the data set that was given, or where the prediction read its video."""
        divided = clip_and_person(item)[0]  # the clip of an item of one person
        if self.clips is not None:
            return self.clips.get(item) or self.clips.get(divided)
        if recorded is not None and recorded.media is not None:
            video = Path(recorded.media)
            clip = item if item in (video.stem, video.name) else divided
            return Clip(clip, None, clip, video, video)
        return None


def find_provenance(
    run: Path,
    item: str | None = None,
    *,
    cache: Path | None = None,
    root: Path | None = None,
    predictions: Path | None = None,
) -> Json:
    """Compare what the predictions of a run or an ensemble were made from with the present state.

    Args:
        run: folder of a run or an ensemble; or predictions, as `predictions`, whose run is the one that made them.
        item: one clip; None: all.
        cache: current place of the cache, if it was moved.
        root: of the data set: the clips' files are read again and compared.
        predictions: predictions to check instead of the run's: a folder of `vaflow predict --out`, or a file of
            `vaflow submit --out`.

    Returns:
        Plain JSON: "run", "cache", "streams", and "predictions": one object for every folder and item, with its "run"
        where that was recorded. In a folder of several runs' predictions, each is compared with the run that made it.

    Raises:
        UsageError: the folder is not a run, no run that made the predictions exists, `item` has no prediction, or
            `root` is not a data set.
        CorruptError: a file of the run is damaged.
    """
    made = read_sources(run) if predictions is None else None
    if made is not None:
        makers = [Path(one.run) for one in (made, *made.earlier)]
        run, predictions = next((maker for maker in makers if maker.exists()), makers[0]), run
        if not run.exists():
            remedy = f"If it was moved: {command('provenance', 'RUN', '--predictions', predictions)}"
            raise UsageError(explain(f"The run that made {predictions} does not exist", got=run, remedy=remedy))
    present = read_present(run, cache, root)
    folders = [predictions] if predictions is not None else list(prediction_folders(run))
    own = made is not None
    entries = [entry for folder in folders for entry in folder_provenance(folder, present, item, own=own)]
    if item is not None and not entries:
        known = sorted({name for folder in folders for name in predicted_items(folder, read_sources(folder))})
        raise UsageError(explain(f"{run} has no prediction of that clip", got=item, choices=known))
    cache_facts: Json = {"path": present.trained_on, "state": MISSING, "problem": present.cache_problem}
    if present.cache is not None:
        cache_facts = {"path": present.cache.place, "state": "found", "store": present.cache.store}
    return {
        "run": maker_provenance(present),
        "cache": cache_facts,
        "streams": stream_provenance(present),
        "predictions": entries,
    }


def read_present(run: Path, cache: Path | None, root: Path | None) -> Present:
    """The present state of a run, its cache and its data set."""
    maker = maker_of(run)
    opened, problem = None, ""
    try:
        opened = open_cache(cache if cache is not None else cache_of(next(iter(maker.runs))))
    except (CacheError, UsageError) as error:
        if cache is not None:
            raise
        problem = str(error)
    clips = None if root is None else {clip.id: clip for clip in open_dataset(root, "auto").clips}
    return Present(maker, maker.settings, maker.weights(), opened, problem, cache is not None, clips)


def maker_provenance(present: Present) -> Json:
    """The run; of an ensemble, each of its runs with its weight."""
    path = present.maker.path
    if path in present.maker.runs:
        return run_provenance(Maker(path, {path: present.maker.runs[path]}))
    members = [run_provenance(Maker(run, {run: record})) for run, record in present.maker.runs.items()]
    weights = {str(run): row for run, row in zip(*members_of(path), strict=True)}
    for member in members:
        member["weight"] = dict(zip(DIMENSIONS, weights[member["path"]].tolist(), strict=True))
    folder = RunFolder(path)
    return {
        "path": str(path.resolve()),
        "vaflow": members[0]["vaflow"],
        "finished": all(member["finished"] for member in members),
        "settings_digest": present.settings,
        "weights": dict(present.weights),
        "ccc": folder.read_metrics().get("ccc") if folder.metrics_file.is_file() else None,
        "runs": members,
    }


def run_provenance(maker: Maker) -> Json:
    """One run: version, settings, weights, data and score."""
    record, folder = maker.runs[maker.path], RunFolder(maker.path)
    return {
        "path": str(maker.path.resolve()),
        "vaflow": record.version,
        "finished": folder.done,
        "settings": record.config.as_dict(),
        "settings_digest": maker.settings,
        "weights": maker.weights(),
        "data": {split: dict(counts) for split, counts in record.data.items()},
        "ccc": folder.read_metrics().get("ccc") if folder.metrics_file.is_file() else None,
    }


def stream_provenance(present: Present) -> list[Json]:
    """Streams that the run was trained on, prompts included, and whether the cache still has them."""
    cache = present.cache
    known = cache.streams() if cache is not None else {}
    entries: list[Json] = []
    for stream in present.streams:
        state = NOT_CHECKED if cache is None else MISSING
        if stream.name in known:
            state = SAME if fingerprint(known[stream.name]) == stream.fingerprint else CHANGED
        facts = {"name": stream.name, "kind": stream.kind, "fingerprint": stream.fingerprint}
        entries.append({**facts, "identity": dict(stream.identity), "state": state})
    configs = [record.config for record in present.records if record.config.text]
    for text, prompts in dict.fromkeys((config.text, config.prompts) for config in configs):
        entry: Json = {"name": text, "kind": "text", "set": prompts}
        if cache is not None and text in known and cache.has(text, prompts):
            entry |= {"state": "found", **facts_of(cache.record(text, prompts))}
            entry |= {"fingerprint": fingerprint(known[text]), "identity": known[text].identity}
        else:
            entry["state"] = NOT_CHECKED if cache is None else MISSING
        entries.append(entry)
    return entries


def predicted_items(folder: Path, recorded: PredictionSources | None) -> list[str]:
    """Every clip with a prediction in a folder."""
    if recorded is not None:
        return sorted(recorded.items)
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*.csv"))
    return sorted(name.removesuffix(".csv") for name in files)


def present_of(made: PredictionSources, present: Present, *, own: bool) -> Present:
    """The present state that some predictions of a folder are compared with.

    Args:
        present: of the run that the caller named, or that made the latest predictions.
        own: compare with the run that made these predictions.
    """
    if own and made.run != str(present.maker.path.resolve()):
        try:
            other = read_present(Path(made.run), None, None)
        except UsageError:
            other = replace(present, run_missing=True)
        if present.cache_given:
            other = replace(other, cache=present.cache, cache_given=True)
        present = replace(other, clips=present.clips)
    if not present.cache_given and made.cache != present.trained_on:
        # Predictions may have been made on another cache than the run was trained on.
        try:
            return replace(present, cache=open_cache(made.cache))
        except (CacheError, UsageError):
            return replace(present, cache=None)
    return present


def folder_provenance(folder: Path, of_run: Present, item: str | None, *, own: bool = False) -> Iterator[Json]:
    """One object per prediction in a folder, or in the one file of all clips; see `present_of` for `own`."""
    recorded = read_sources(folder)
    makers = () if recorded is None else (recorded, *recorded.earlier)
    presents = {id(made): present_of(made, of_run, own=own) for made in makers}
    for name in predicted_items(folder, recorded):
        if item not in (None, name):
            continue
        sources = recorded.items.get(name) if recorded is not None else None
        made = recorded.of(name) if recorded is not None and sources is not None else None
        present = of_run if made is None else presents[id(made)]
        csv = folder if folder.is_file() else folder / f"{name}.csv"
        entry: Json = {"item": name, "folder": str(folder), "csv": str(csv)}
        if made is None or sources is None:  # the present records need not be those that were read
            streams = [*(stream.name for stream in present.streams), "labels"]
            facts = {stream: present.record(stream, name) for stream in streams}
            records = {stream: {**f, "state": NOT_RECORDED} for stream, f in facts.items() if f is not None}
            entry |= {"state": NOT_RECORDED, "records": records}
        else:
            entry |= compare_prediction(csv, made, sources, name, present)
        checked = present.clips is not None or (sources is not None and sources.media is not None)
        entry["sources"] = source_files(entry["records"], present.clip(name, sources), checked=checked)
        yield entry


def compare_prediction(
    csv: Path, recorded: PredictionSources, sources: ItemSources, item: str, present: Present
) -> Json:
    """A prediction whose sources were recorded, with what has changed since."""
    try:
        csv_state = SAME if digest(csv) == sources.csv else CHANGED
    except OSError:
        csv_state = MISSING
    weights, settings = recorded.weights == present.weights, recorded.settings == present.settings
    entry = {
        "made": sources.made or recorded.made,
        "run": recorded.run,
        "vaflow": recorded.vaflow,
        "cache": recorded.cache,
        "csv_state": csv_state,
        "weights_state": MISSING if present.run_missing else SAME if weights else CHANGED,
        "settings_state": MISSING if present.run_missing else SAME if settings else CHANGED,
        "streams": {name: facts["fingerprint"] for name, facts in recorded.streams.items()},
        "records": {
            stream: {**facts, "state": record_state(present, stream, item, facts)}
            for stream, facts in sources.records.items()
        },
    }
    states = [entry["csv_state"], entry["weights_state"], entry["settings_state"]]
    return entry | {"state": next((state for state in (MISSING, CHANGED) if state in states), SAME)}


def record_state(present: Present, stream: str, item: str, facts: Mapping[str, Any]) -> str:
    """How a recorded cache record compares with the present one."""
    current = present.record(stream, item)
    if current is None:
        return NOT_CHECKED if present.cache is None else MISSING
    if current["attempt"] == facts["attempt"]:
        return SAME
    return COPY if (current["created"], current["source"]) == (facts["created"], facts["source"]) else CHANGED


def source_files(records: Mapping[str, Mapping[str, Any]], clip: Clip | None, *, checked: bool) -> list[Json]:
    """Every distinct identity of every part that the records name, with the streams made from it, and its state."""
    entries: list[Json] = []
    for stream, facts in records.items():
        for part, identity in facts["source"].items():
            if identity is None or part == "prompts":
                continue
            known = next((e for e in entries if e["part"] == part and same_part(e["identity"], identity)), None)
            if known is not None:
                known["streams"].append(stream)
            else:
                entries.append({"part": part, "identity": identity, "streams": [stream]})
    for entry in entries:
        # Imported features are no part of a data set, so their files cannot be compared.
        entry["state"] = part_state(clip, entry) if checked and entry["part"] in PARTS else NOT_CHECKED
    return entries


def part_state(clip: Clip | None, entry: Mapping[str, Any]) -> str:
    """How a recorded part of a clip (video, labels, crops) compares with the present file."""
    try:
        current = None if clip is None else part_of(clip, entry["part"])
    except (OSError, MediaError):
        return MISSING
    if current is None:
        return MISSING
    return SAME if same_part(current, entry["identity"]) else CHANGED
