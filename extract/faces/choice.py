"""The choice of one person among the faces of a clip, from the stored `faces` stream alone.

Extraction chooses from the arrays that it stores, so that a later choice without the video is the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import MediaError, explain
from vaflow.extract.audio_activity import HOP
from vaflow.timeline import Bools

LARGEST, MAIN, ALL, LEFT, RIGHT, SPEAKING, ID = "largest", "main", "all", "left", "right", "speaking", "id:"

SIDE_SHARE = 0.9  # of the frames that show both people, in which the left one must be on the left
MIN_FRAMES_TOGETHER = 2
WITHOUT_AUDIO = ("absent", "unreadable")  # status of the audio of clips without speech activity

Faces = Mapping[str, NDArray[Any]]
Speech = Callable[[float], bool]


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
        raise MediaError(
            explain(
                f"The person on the {side} cannot be told apart: the clip never shows two people side by side",
                expected=f"two faces in at least {MIN_FRAMES_TOGETHER} of the sampled frames",
                remedy="Add the dataset's face crops of this trial",
            )
        )
    common = people[i].keys() & people[j].keys()
    first_is_left = sum(people[i][frame] < people[j][frame] for frame in common) / len(common)
    if 1 - SIDE_SHARE < first_is_left < SIDE_SHARE:
        raise MediaError(
            explain(
                f"The person on the {side} cannot be told apart: the two people change sides",
                expected=f"one person on the left in {SIDE_SHARE:.0%} of the frames that show both",
                got=f"{max(first_is_left, 1 - first_is_left):.0%}",
                remedy="Add the dataset's face crops of this trial",
            )
        )
    left, right = (i, j) if first_is_left >= SIDE_SHARE else (j, i)
    return 1 + (left if side == LEFT else right)
