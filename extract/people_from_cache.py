"""Another choice of people for a cache, without its videos: `vaflow cache people`.

Features of people whom the cache holds are copied, as are streams that do not depend on the person. Features of others
are computed from the stored crops by the loop of an extraction.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote
from typing import Any

import numpy as np

from vaflow.cache import Cache, PathLike, create_cache
from vaflow.cache.copy import ItemCopy, TransferSummary, refuse_inside, survey, transfer
from vaflow.cache.costs import append_costs
from vaflow.cache.layout import fingerprint
from vaflow.cache.schema import CROPS, FACES, LABELS, LOGMEL, PIXELS, STORES, Array, Json, Record, StreamInfo
from vaflow.datasets.clip import Clip, person_item
from vaflow.device import choose_device
from vaflow.errors import MediaError, UsageError, count, examples, explain
from vaflow.extract.config import ExtractConfig, default_workers
from vaflow.extract.decoding_pool import StoredPerson
from vaflow.extract.faces.choice import (
    ALL,
    EXCLUDED,
    SPEAKING,
    WITHOUT_AUDIO,
    Choices,
    Speech,
    choose_person,
    count_people,
    speech_at,
)
from vaflow.extract.plan import OutcomeRecorder, PendingClip, Summary
from vaflow.extract.streams import NewStreams
from vaflow.files import FAILURES, Failure, FailureLog, write_failures

log = logging.getLogger(__name__)

STAGE = "people"
LISTED = 10  # items that a message names
OF_PERSON = ("clip", "person", "persons")  # members of a record's meta that name a person
MADE_IN = ("batch", "device", "compiled", "vaflow", "reading")  # those that `Extraction` adds


@dataclass(frozen=True)
class ChosenItem:
    """One item of the new cache.

    Attributes:
        item: its id; clip: the clip.
        origin: item of the old cache with the clip's faces, crops and audio.
        features: item of the old cache with the features of the person; None: they are encoded.
        labels: item of the old cache with the labels of the person; None: the person has none.
        person: number; 0 if the clip shows no face. None: the clip has no choice of people and is copied as it is.
        persons: number of people, if every person becomes an item; else 0.
        first: the item holds the crops of the clip.
    """

    item: str
    clip: str
    origin: str
    features: str | None
    labels: str | None
    person: int | None = None
    persons: int = 0
    first: bool = True

    @property
    def facts(self) -> Json:
        """Members of every record but those of faces and crops."""
        return {"clip": self.clip, "person": self.person, "persons": self.persons} if self.persons else {}

    @property
    def image_facts(self) -> Json:
        """Members of the records of features and pixels."""
        return self.facts or ({} if self.person is None else {"person": self.person})


@dataclass(frozen=True)
class StoredClip:
    """A clip of the old cache: number of each person with features -> their item; `divided`: one item per person."""

    name: str
    items: Mapping[int, str]
    meta: Json
    divided: bool

    @property
    def origin(self) -> str:
        """The item with the crops: that of the first person."""
        return self.items[min(self.items)]


class ChosenItems:
    """Items of the new cache, from the clips of the old one.

    Raises:
        UsageError: the cache has no crops of everyone, the choice names a clip or person that it does not have, or two
            items would have one name.
    """

    def __init__(self, source: Cache, choices: Choices) -> None:
        self._source, self._choices = source, choices
        known = source.streams()
        self.images = {
            name: info
            for name, info in known.items()
            if info.kind in ("visual", "pixels") and "person" in info.identity.get("picture", {}).get("faces", {})
        }
        if not {FACES, CROPS} <= known.keys() or not self.images:
            rule = choices.rule or "main"
            problem = f"{source.place} does not hold the crops of everyone"
            expected = "features of detected faces, extracted without --person largest and --chosen-only"
            remedy = f"Extract the videos again: vaflow extract VIDEOS --out OTHER.cache --person {rule}"
            raise UsageError(explain(problem, expected=expected, remedy=remedy))
        before = {info.identity["picture"]["faces"]["person"] for info in self.images.values()}
        if len(before) > 1:
            problem, got = f"The streams of {source.place} are of different people", " and ".join(sorted(before))
            raise UsageError(explain(problem, expected="one choice", got=got))
        self._everyone = (choices.rule or before.pop()) == ALL
        self.items: list[ChosenItem] = []
        self.failures: list[Failure] = []
        clips = list(self._clips())
        people = {clip.name: len(clip.meta.get("seconds", ())) for clip in clips}
        choices.check(people, self._everyone)
        for clip in clips:
            try:
                self.items += self._chosen(clip)
            except MediaError as error:
                split = {"split": source.meta(clip.origin).get("split")}
                self.failures.append(Failure(clip.name, STAGE, type(error).__name__, str(error), split))
        if twice := [item for item, times in Counter(one.item for one in self.items).items() if times > 1]:
            problem = "Clips have the names of people of other clips"
            remedy = "Rename these clips and extract them again, or remove them: vaflow cache drop"
            raise UsageError(explain(problem, expected="a name for one item", got=examples(twice), remedy=remedy))

    def infos(self) -> dict[str, StreamInfo]:
        """Every stream of the new cache by name."""
        infos = self._source.streams()
        for name, info in self.images.items():
            picture = info.identity["picture"]
            picture = picture | {"faces": self._choices.identity(picture["faces"])}
            infos[name] = replace(info, identity=info.identity | {"picture": picture})
        return infos

    def _clips(self) -> Iterator[StoredClip]:
        items: dict[str, dict[int, str]] = {}
        metas: dict[str, Json] = {}
        for item in self._source.items():
            held = [name for name in self.images if self._source.has(name, item)]
            meta = self._source.record(held[0], item).meta if held else {}
            clip = meta.get("clip", item)
            items.setdefault(clip, {})[meta.get("person") or 0] = item
            metas.setdefault(clip, meta)
        for clip, people in items.items():
            yield StoredClip(clip, people, metas[clip], "clip" in metas[clip])

    def _chosen(self, clip: StoredClip) -> list[ChosenItem]:
        """The items of one clip; none if it is left out. Raises MediaError if the rule does not name a person."""
        rule = self._choices.rows.get(clip.name)
        if rule == EXCLUDED:
            return []
        if "people" not in clip.meta or ("side" in clip.meta and rule is None):  # crops of a dataset, or a trial's side
            item = clip.origin
            return [ChosenItem(item, item, item, item, item, clip.meta.get("person"))]
        faces = self._source.read(FACES, clip.origin, ["time", "frame", "box", "mouth", "person"]).arrays
        if self._everyone:
            return self._everyone_of(clip, max(1, int(clip.meta["notable"])), count_people(faces))
        rule = rule or self._choices.rule
        if rule is None:
            person = int(clip.meta["person"])
        else:
            person = choose_person(faces, rule, self._speech(clip.origin) if rule == SPEAKING else None)
        features = clip.items.get(person) if count_people(faces) else clip.origin
        self._check_labels(clip, divided=False)
        labels = clip.items[1] if clip.divided else clip.origin
        return [ChosenItem(clip.name, clip.name, clip.origin, features, labels, person)]

    def _everyone_of(self, clip: StoredClip, persons: int, people: int) -> list[ChosenItem]:
        chosen: list[ChosenItem] = []
        self._check_labels(clip, divided=True)
        for number in range(1, persons + 1):
            item = person_item(clip.name, number)
            if self._choices.rows.get(item) == EXCLUDED or (self._choices.rule is None and number not in clip.items):
                continue
            features = clip.items.get(number) if people else clip.origin
            labels = clip.items.get(number) if clip.divided else clip.origin if number == 1 else None
            first = not chosen
            chosen.append(ChosenItem(item, clip.name, clip.origin, features, labels, number, persons, first))
        return chosen

    def _check_labels(self, clip: StoredClip, *, divided: bool) -> None:
        """Check that the cache holds the labels of everyone who becomes an item."""
        if clip.divided == divided:
            return
        numbered = self._source.record(LABELS, clip.origin).source.get("person_labels") or {}
        if (numbered and divided) or "1" in numbered or (clip.divided and 1 not in clip.items):
            whose = "of each person" if divided else "of the clip"
            problem = f"{self._source.place} does not hold the labels {whose}"
            got = "labels of each person in files of their own" if numbered else f"no item {clip.name}#1"
            raise MediaError(explain(problem, got=got, remedy="Extract the video of this clip again"))

    def _speech(self, item: str) -> Speech | None:
        """Whether there is speech at a time in seconds; None for a clip without audio."""
        if LOGMEL not in self._source.streams() or not self._source.has(LOGMEL, item):
            return None
        record = self._source.record(LOGMEL, item)
        if record.meta.get("audio") in WITHOUT_AUDIO or "speech" not in record.arrays:
            return None
        return speech_at(self._source.read(LOGMEL, item, ["speech"]).speech)


def choose_people(
    source: Cache,
    out: PathLike,
    choices: Choices,
    options: Mapping[str, Any],
    *,
    store: str | None = None,
    show_progress: bool = False,
) -> tuple[Summary, TransferSummary]:
    """Write a cache with another choice of people; run it again to resume.

    Args:
        source: a cache with the crops of everyone.
        out: the cache to write.
        options: further fields of `ExtractConfig`: weights, device, workers.
        store: of the new cache; None: that of the source.

    Returns:
        The summary of the encoded items, and that of the copied ones; the latter has all failures.

    Raises:
        UsageError: the source has no crops of everyone, or the choice does not fit its clips.
        FingerprintError: `out` was made with other choices, or the encoders differ from those of the source.
        CacheError: writing fails; the same call resumes later.
    """
    refuse_inside(source, out)
    choice = ChosenItems(source, choices)
    infos = choice.infos()
    target = create_cache(out, store=store or (source.store if source.store in STORES else "zarr"))
    for info in infos.values():
        target.declare(info)
    failure_log = FailureLog(target.path / FAILURES)
    for failure in choice.failures:
        failure_log.add(failure)
    summary = Summary(failures=failure_log.failures)
    missing = [_task(source, target, choice.images, item) for item in choice.items if item.features is None]
    tasks = [task for task in missing if task.streams]
    with target.indexed():
        if tasks:
            stored = {task.clip.id: task.stored.item for task in tasks if task.stored}
            seconds = {clip: float(source.meta(item).get("duration", 0.0)) for clip, item in stored.items()}
            with OutcomeRecorder(summary, failure_log, seconds, show_progress=show_progress) as recorder:
                _encode(target, {name: infos[name] for name in choice.images}, tasks, options, recorder)
    failures = list(failure_log.failures)
    write_failures(failure_log.path, ())  # the copy writes the list of all failures
    held = survey(source, STAGE)
    failed = {failure.item for failure in failures}
    chosen = [item for item in choice.items if item.item not in failed]
    copies = [copy for item in chosen for copy in _copies(source, infos, choice.images, item)]
    copies = [copy for copy in copies if copy.origin_key in held.briefs]
    copies += [ItemCopy(key, (source,)) for key in held.briefs if infos[key[0]].kind == "text"]
    splits = {item.item: held.splits.get(item.origin) for item in chosen}
    copied = transfer(target, [source], copies, [*failures, *held.damaged], splits, STAGE, show_progress=show_progress)
    summary.done = len(chosen) - summary.extracted
    # Of an earlier run with another table, or since dropped from the source.
    if extra := sorted(set(target.items()) - {item.item for item in choice.items}):
        names = " ".join(map(quote, extra[:LISTED])) + (" ..." if len(extra) > LISTED else "")
        log.warning("No longer chosen: %s. vaflow cache drop %s %s", count(len(extra), "item"), target.place, names)
    return summary, copied


def _task(source: Cache, target: Cache, images: Collection[str], item: ChosenItem) -> PendingClip:
    """The features to encode of one item: those that the new cache does not have yet."""
    records = {name: source.record(name, item.origin) for name in images if source.has(name, item.origin)}

    def is_encoded(name: str) -> bool:
        if not target.has(name, item.item):
            return False
        record = target.record(name, item.item)
        return record.source == records[name].source and record.meta.get("person") == item.person

    stream, record = next(iter(records.items()))
    facts = {key: value for key, value in record.meta.items() if key not in (*OF_PERSON, *MADE_IN, "faces")}
    labels = source.meta(item.origin)
    stored = StoredPerson(source.place, item.origin, stream, item.person or 0, facts | item.image_facts)
    clip = Clip(item.item, labels.get("split"), str(labels.get("group")), None)
    streams = tuple(name for name in records if not is_encoded(name))
    return PendingClip(clip, streams, changed=False, stored=stored)


def _encode(
    target: Cache,
    streams: dict[str, StreamInfo],
    tasks: Sequence[PendingClip],
    options: Mapping[str, Any],
    recorder: OutcomeRecorder,
) -> None:
    """Encode stored crops with the encoders of the streams. Raises FingerprintError if the encoders differ."""
    visual = {name: info for name, info in streams.items() if info.kind == "visual"}
    one = next(iter(streams.values()))
    precisions = {info.identity.get("precision", "auto") for info in visual.values()}
    config = ExtractConfig(
        visual=tuple(visual),
        audio=(),
        pixels=PIXELS in streams,
        dtype=next((info.dtype for info in visual.values()), "float16"),
        face_source=one.identity["picture"]["faces"]["source"],
        identity="none",
        precision=precisions.pop() if len(precisions) == 1 else "auto",
        **one.identity["sampling"],
        **options,
    )
    from vaflow.extract.encoding import build_encoders, make_encoders
    from vaflow.extract.loop import Extraction

    device = choose_device(config.device)
    encoders, _ = build_encoders(config, device)
    for encoder in encoders:  # the same weights and preprocessing as those of the stream
        info = visual[encoder.name]
        identity = encoder.identity | {name: info.identity[name] for name in ("sampling", "picture")}
        target.declare(replace(info, dim=encoder.dim, identity=identity))
    workers = min(config.workers or default_workers(device.type), len(tasks))
    try:
        declared, batched = NewStreams(streams, (), created=True), make_encoders(config, device, encoders, [])
        Extraction(target, config, declared, batched, workers, recorder).run(tasks)
    finally:
        append_costs(target, recorder.summary.costs)


def _copies(
    source: Cache, infos: Mapping[str, StreamInfo], images: Collection[str], item: ChosenItem
) -> Iterator[ItemCopy]:
    """Everything of one item that is not encoded. The old cache may lack some of it."""
    for name, info in infos.items():
        facts: Json = item.facts
        origin: str | None = item.origin
        empty = None
        if info.kind in ("visual", "pixels"):
            origin, facts = item.features, item.image_facts if name in images else facts
        elif info.kind in (LABELS, "targets"):
            origin = item.labels
            if origin is None and info.kind == LABELS:
                origin, empty, facts = item.origin, _without_labels, facts | {"rows": 0, "targets": []}
        elif name in (FACES, CROPS):
            facts = {}
            empty = None if item.first or name == FACES else _without_crops
        if info.kind == "text" or origin is None:
            continue
        changed = partial(_changed, item.item, facts, fingerprint(info))
        yield ItemCopy((name, item.item), (source,), origin, changed, empty)


def _without_labels(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Labels of a person without any."""
    return {**arrays, "value": np.full_like(arrays["value"], np.nan), "valid": np.zeros_like(arrays["valid"])}


def _without_crops(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Crops of a person after the first, whose item has them."""
    return {"data": arrays["data"][:0], "offset": np.zeros_like(arrays["offset"])}


def _changed(item: str, facts: Json, stream: str, record: Record) -> Record:
    """The record of an item with another name, person and choice of people."""
    meta = {key: value for key, value in record.meta.items() if key not in OF_PERSON} | facts
    return replace(record, item=item, meta=meta, fingerprint=stream)
