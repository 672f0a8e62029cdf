"""Items of a cache with another choice of people: whose features each one has, and where its streams come from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from vaflow.cache import Cache
from vaflow.cache.schema import CROPS, FACES, LABELS, LOGMEL, Json, StreamInfo
from vaflow.errors import MediaError, UsageError, explain
from vaflow.extract.choices import EXCLUDED, Choices
from vaflow.extract.faces.choice import ALL, SPEAKING, WITHOUT_AUDIO, Speech, choose_person, count_people, speech_at
from vaflow.failures import Failure
from vaflow.item_names import person_item

STAGE = "people"


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


class ChoicePlan:
    """Items of the new cache, from the clips of the old one.

    Args:
        source: the old cache.
        choices: who is estimated.

    Raises:
        UsageError: the cache has no crops of everyone, or the choice names a clip or person that it does not have.
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
            raise UsageError(
                explain(
                    f"{source.place} does not hold the crops of everyone",
                    expected="features of detected faces, extracted without --person largest and --chosen-only",
                    remedy=f"Extract the videos again: vaflow extract VIDEOS --out OTHER.cache --person {rule}",
                )
            )
        before = {info.identity["picture"]["faces"]["person"] for info in self.images.values()}
        if len(before) > 1:
            got = " and ".join(sorted(before))
            raise UsageError(
                explain(f"The streams of {source.place} are of different people", expected="one choice", got=got)
            )
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
            items.setdefault(clip, {})[int(meta.get("person", 0))] = item
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
            raise MediaError(
                explain(
                    f"{self._source.place} does not hold the labels {whose}",
                    got="labels of each person in files of their own" if numbered else f"no item {clip.name}#1",
                    remedy="Extract the video of this clip again",
                )
            )

    def _speech(self, item: str) -> Speech | None:
        """Whether there is speech at a time in seconds; None for a clip without audio."""
        if LOGMEL not in self._source.streams() or not self._source.has(LOGMEL, item):
            return None
        record = self._source.record(LOGMEL, item)
        if record.meta.get("audio") in WITHOUT_AUDIO or "speech" not in record.arrays:
            return None
        return speech_at(self._source.read(LOGMEL, item, ["speech"]).speech)
