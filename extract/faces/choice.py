"""The choice of people: one person among the faces of a clip, and a rule or a table for all clips of a cache.

Extraction chooses from the arrays of the `faces` stream that it stores, so that a later choice without the video is the
same.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.cache.layout import canonical
from vaflow.datasets.files import read_table
from vaflow.errors import MediaError, UsageError, examples, explain
from vaflow.extract.audio import HOP
from vaflow.timeline import Bools

LARGEST, MAIN, ALL, LEFT, RIGHT, SPEAKING, ID = "largest", "main", "all", "left", "right", "speaking", "id:"
SIDE_SHARE = 0.9  # of the frames that show both people, in which the left one must be on the left
MIN_FRAMES_TOGETHER = 2
WITHOUT_AUDIO = ("absent", "unreadable")  # status of the audio of clips without speech activity
Faces = Mapping[str, NDArray[Any]]
Speech = Callable[[float], bool]

EXCLUDED = "none"  # leaves a clip out
RULES = re.compile(r"main|all|left|right|speaking|id:[1-9]\d*")
ROW_RULES = re.compile(r"none|main|left|right|speaking|id:[1-9]\d*")


def choose_person(faces: Faces, rule: str, speech: Speech | None = None) -> int:
    """Number of the person to estimate; 0 if the clip shows no face.

    Args:
        faces: arrays of the clip's faces stream.
        rule: main, left, right, id:K or speaking.
        speech: whether there is speech at a time in seconds; required by "speaking".

    Raises:
        MediaError: the rule does not name one person of this clip.
    """
    people = count_people(faces)
    if rule in (LEFT, RIGHT):
        return _on_side(faces, rule)
    if rule.startswith(ID):
        number = int(rule.removeprefix(ID))
        if number > people:
            expected = f"id:1 to id:{people}" if people > 1 else "id:1" if people else "a clip that shows a face"
            raise MediaError(explain(f"--person {rule} is not a person of this clip", expected=expected))
        return number
    if rule == SPEAKING and people:
        if speech is None:
            raise MediaError(explain("--person speaking requires audio, and the clip has none"))
        during = np.array([speech(time) for time in faces["time"].tolist()], bool)
        return max(range(1, people + 1), key=lambda k: speaking_score(faces, k, during))
    return min(1, people)


def count_people(faces: Faces) -> int:
    """Number of people in a faces stream."""
    return int(faces["person"].max(initial=0))


def speaking_score(faces: Faces, person: int, during: Bools) -> float:
    """Mean motion of a person's mouth during speech, less that without speech, in gray levels.

    Args:
        during: [faces] whether there is speech at the time of each face.
    """
    means = []
    for when in (during, ~during):
        motion = faces["mouth"][(faces["person"] == person) & when]
        means.append(float(np.mean(motion, dtype=np.float64)) if len(motion) else 0.0)
    return means[0] - means[1]


def speech_at(activity: Bools) -> Speech:
    """Whether there is speech at a time in seconds, from the `speech` array of a log-Mel stream."""
    return lambda time: bool(activity[int(time / HOP) : int(time / HOP) + 1].any())


def _on_side(faces: Faces, side: str) -> int:
    """The left or right one of the two people who are together for the longest time."""
    middles = faces["box"][:, [0, 2]].astype(np.float64).mean(axis=1)
    people: list[dict[int, float]] = []
    for number in range(1, count_people(faces) + 1):
        mine = faces["person"] == number
        people.append(dict(zip(faces["frame"][mine].tolist(), middles[mine].tolist(), strict=True)))
    pairs = [(len(a.keys() & b.keys()), i, j) for j, b in enumerate(people) for i, a in enumerate(people[:j])]
    together, i, j = max(pairs, key=lambda pair: (pair[0], -pair[1], -pair[2]), default=(0, 0, 0))
    if together < MIN_FRAMES_TOGETHER:
        problem = f"The person on the {side} cannot be told apart: the clip never shows two people side by side"
        expected = f"two faces in at least {MIN_FRAMES_TOGETHER} of the sampled frames"
        raise MediaError(explain(problem, expected=expected, remedy="Add the dataset's face crops of this trial"))
    common = people[i].keys() & people[j].keys()
    first_is_left = sum(people[i][frame] < people[j][frame] for frame in common) / len(common)
    if 1 - SIDE_SHARE < first_is_left < SIDE_SHARE:
        problem = f"The person on the {side} cannot be told apart: the two people change sides"
        expected = f"one person on the left in {SIDE_SHARE:.0%} of the frames that show both"
        got = f"{max(first_is_left, 1 - first_is_left):.0%}"
        remedy = "Add the dataset's face crops of this trial"
        raise MediaError(explain(problem, expected=expected, got=got, remedy=remedy))
    left, right = (i, j) if first_is_left >= SIDE_SHARE else (j, i)
    return 1 + (left if side == LEFT else right)


@dataclass(frozen=True)
class Choices:
    """Who is estimated.

    Attributes:
        rule: of all clips without a row: main, all, left, right, speaking or id:K; None: the person of the cache.
        rows: clip, or with the rule "all" the item of a person -> rule, or "none" to leave it out.

    Raises:
        UsageError: there is neither a rule nor a row, or one of them is not valid.
    """

    rule: str | None = None
    rows: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule is None and not self.rows:
            raise UsageError(explain("Neither --person nor --choices is given", expected="one of them, or both"))
        if self.rule is not None and not RULES.fullmatch(self.rule):
            expected = "main, all, left, right, speaking or id:K"
            raise UsageError(explain("--person is not valid", expected=expected, got=self.rule))
        for name, rule in self.rows.items():
            if not ROW_RULES.fullmatch(rule):
                problem, expected = f"The person of {name!r} in --choices", "none, main, left, right, speaking or id:K"
                raise UsageError(explain(f"{problem} is not valid", expected=expected, got=rule))

    def identity(self, faces: Mapping[str, Any]) -> dict[str, Any]:
        """The `faces` identity of features that were made with another choice, with this choice.

        Rows that choose a person are stated by a digest; rows that leave a clip out do not change any features.
        """
        before = faces.get("choices") if self.rule is None else None
        chosen = {name: rule for name, rule in self.rows.items() if rule not in (EXCLUDED, self.rule)}
        digest = blake2b(canonical({"before": before, "rows": chosen}), digest_size=8).hexdigest() if chosen else before
        rest = {key: value for key, value in faces.items() if key != "choices"}
        return rest | {"person": self.rule or faces["person"]} | ({"choices": digest} if digest else {})

    def check(self, people: Mapping[str, int], everyone: bool) -> None:
        """Compare the choice with the clips of a cache.

        Args:
            people: clip -> number of its people.
            everyone: every person becomes an item.

        Raises:
            UsageError: a row names no clip or person, or no clip has the person of the rule.
        """
        items = {f"{clip}#{k}" for clip, number in people.items() for k in range(1, number + 1)} if everyone else set()
        for name, rule in self.rows.items():
            if name not in people and name not in items:
                raise UsageError(explain("--choices names a clip that is not in the cache", got=name, choices=people))
            if everyone and rule != EXCLUDED:
                expected = "none, where every person is an item"
                raise UsageError(explain(f"{name!r} has a person in --choices", expected=expected, got=rule))
            if rule.startswith(ID) and int(rule.removeprefix(ID)) > people.get(name, 0):
                expected = f"id:1 to id:{people.get(name, 0)}"
                raise UsageError(explain(f"{name!r} has no such person", expected=expected, got=rule))
        number = int(self.rule.removeprefix(ID)) if self.rule is not None and self.rule.startswith(ID) else 0
        if number > max(people.values(), default=0):
            counts = examples([f"{clip} {known}" for clip, known in sorted(people.items())])
            expected = f"a number of a person; people per clip: {counts}"
            raise UsageError(explain(f"No clip has person {number}", expected=expected))


def read_choices(path: Path) -> dict[str, str]:
    """Read a table with the columns `clip` and `person`: clip -> rule. Rows without a person are skipped.

    Raises:
        UsageError: the file cannot be read, is not such a table, or names a clip twice.
    """
    _, rows = read_table(path, "a table of choices", UsageError)
    header = rows[0][1] if rows else []
    if not {"clip", "person"} <= set(header):
        got = ", ".join(header) or "an empty file"
        raise UsageError(explain(f"{path} is not a table of choices", expected="the columns clip,person", got=got))
    chosen: dict[str, str] = {}
    for _, cells in rows[1:]:
        row = dict(zip(header, cells, strict=False))
        clip, rule = row.get("clip", ""), row.get("person", "")
        if clip in chosen:
            raise UsageError(explain(f"{path} names a clip twice", got=clip))
        if rule:
            chosen[clip] = rule
    return chosen
