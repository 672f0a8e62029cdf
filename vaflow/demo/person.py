"""Random appearance of a drawn person (colours, proportions, hair, room), and their expression over time.

The image shows valence well (mouth, cheeks, inner brows) and arousal in part (eyes, brows): eyes and brows also drift
independently of arousal, the mouth opens with speech, and each face has its own neutral expression.
"""

from dataclasses import dataclass

import numpy as np

from vaflow.demo.curves import Floats, Key, MoodAt, smooth_curve
from vaflow.demo.drawing import Colour, from_rgb, mix, shade
from vaflow.demo.voice import CONTROL_RATE

SKINS = [from_rgb(c) for c in ("#f6d9c4", "#eec3a0", "#dca97e", "#c58c5e", "#a06a42", "#7b4d30", "#5c3824")]
HAIRS = [from_rgb(c) for c in ("#2b211d", "#4a3325", "#7a4e2d", "#b58345", "#d9b871", "#8c3b22", "#8f8f93")]
SHIRTS = [from_rgb(c) for c in ("#31587a", "#7a3131", "#3f6b4a", "#c9a23f", "#5b4a7d", "#d8d8d2", "#33363d", "#b8623a")]
WALLS = [from_rgb(c) for c in ("#d7cfc0", "#9fb3bd", "#c7b7b5", "#8d9a86", "#b9b4cc", "#6f7a86", "#e0d3a8")]
IRISES = [from_rgb(c) for c in ("#5b3a1e", "#3d2a18", "#47658a", "#4f7350", "#6d6f72")]
HAIR_STYLES = ("short", "long", "bun", "curly", "bald")
BEARDS = ("none", "none", "none", "none", "none", "none", "moustache", "stubble")


@dataclass(frozen=True)
class Person:
    """A neutral face. Lengths are in half face widths; `rest_*` are offsets of the expression."""

    skin: Colour
    hair: Colour
    brow: Colour
    shirt: Colour
    wall: Colour
    iris: Colour
    lip: Colour
    hair_style: str
    beard: str
    glasses: bool
    face_height: float
    jaw: float
    eye_gap: float
    eye_size: float
    brow_width: float
    mouth_width: float
    lip_size: float
    nose: float
    rest_mouth: float
    rest_eyes: float
    rest_brows: float
    light: float
    size: float


def random_person(key: Key) -> Person:
    """The person of one clip, with all attributes drawn at random."""
    rng = key.rng("person")
    skin = _between(rng, SKINS)
    hair = HAIRS[rng.integers(len(HAIRS))] if rng.random() > 0.3 else HAIRS[0]
    return Person(
        skin=skin,
        hair=hair,
        brow=shade(mix(hair, (20, 25, 30), 0.45), 0.9),
        shirt=SHIRTS[rng.integers(len(SHIRTS))],
        wall=_between(rng, WALLS),
        iris=IRISES[rng.integers(len(IRISES))],
        lip=mix(shade(skin, 0.8), (70, 60, 190), rng.uniform(0.35, 0.6)),
        hair_style=HAIR_STYLES[rng.integers(len(HAIR_STYLES))],
        beard=BEARDS[rng.integers(len(BEARDS))],
        glasses=bool(rng.random() < 0.15),
        face_height=rng.uniform(1.2, 1.38),
        jaw=rng.uniform(0.62, 0.85),
        eye_gap=rng.uniform(0.4, 0.48),
        eye_size=rng.uniform(0.24, 0.29),
        brow_width=rng.uniform(0.06, 0.1),
        mouth_width=rng.uniform(0.4, 0.5),
        lip_size=rng.uniform(0.06, 0.1),
        nose=rng.uniform(0.1, 0.17),
        rest_mouth=rng.normal(0, 0.15),
        rest_eyes=rng.normal(0, 0.13),
        rest_brows=rng.normal(0, 0.12),
        light=rng.uniform(0.85, 1.08),
        size=rng.uniform(0.9, 1.08),
    )


def _between(rng: np.random.Generator, palette: list[Colour]) -> Colour:
    """A colour between two neighbours of a palette."""
    place = rng.uniform(0, len(palette) - 1)
    below = int(place)
    return mix(palette[below], palette[below + 1], place - below)


@dataclass(frozen=True)
class Expression:
    """[N] parameters per frame, each about -1 to 1 unless stated otherwise.

    Attributes:
        smile: corners of the mouth up (1) or down (-1).
        mouth: how far the mouth is open, 0 to 1.
        eyes: how far the eyes are open, 0 (shut) to 1 (wide).
        brows: both brows up or down.
        slant: inner ends of the brows up (grief, 1) or down (anger, -1).
        gaze: where the eyes look, left or right.
        x, y, turn: where the head is, in half face widths, and its tilt in radians.
        slip: [N, 3] error of the crop: x, y in half face widths, and scale.
    """

    smile: Floats
    mouth: Floats
    eyes: Floats
    brows: Floats
    slant: Floats
    gaze: Floats
    x: Floats
    y: Floats
    turn: Floats
    slip: Floats

    def __len__(self) -> int:
        return len(self.smile)


def express(key: Key, person: Person, mood: MoodAt, mouth: Floats, time: Floats) -> Expression:
    """The face of `person` at `time` [N] seconds, for a trajectory `mood` and a mouth opening `mouth` [C]."""
    valence, arousal = mood(time).T

    def drift(name: str, scale: float, slowest: float = 14.0, fastest: float = 1.5) -> Floats:
        return smooth_curve(key.rng(f"face {name}"), slowest, fastest, scale)(time)

    speech = np.interp(time, np.arange(len(mouth)) / CONTROL_RATE, mouth)
    blink = _blinks(key.rng("blinks"), time)
    eyes = 0.58 + 0.28 * arousal + person.rest_eyes + drift("eyes", 0.2, 30, 3)
    return Expression(
        smile=np.clip(0.9 * valence + person.rest_mouth + drift("smile", 0.28, 25, 2), -1.1, 1.1),
        mouth=np.clip(0.05 + 0.45 * speech + 0.1 * arousal + drift("jaw", 0.04), 0, 1),
        eyes=np.clip(eyes, 0.12, 1) * (1 - blink),
        brows=np.clip(0.4 * arousal + person.rest_brows + drift("brows", 0.4, 30, 3), -1, 1),
        slant=np.clip(-0.35 * valence - 0.25 * arousal + drift("slant", 0.25), -1, 1),
        gaze=np.clip(drift("gaze", 0.5, fastest=0.8), -1, 1),
        x=drift("x", 0.07, fastest=3),
        y=drift("y", 0.05, fastest=3) - 0.02 * speech,
        turn=drift("turn", 0.04, fastest=3),
        slip=np.stack([drift("slip x", 0.02), drift("slip y", 0.02), drift("slip scale", 0.015)], axis=-1),
    )


def _blinks(rng: np.random.Generator, time: Floats) -> Floats:
    """[N] how far blinks close the eyes, 0 to 1: one every two to six seconds, a third of a second long."""
    closed = np.zeros(len(time))
    at = rng.uniform(0, 4)
    while len(time) and at < time[-1]:
        closed = np.maximum(closed, np.clip(1.6 * (1 - np.abs(time - at) / 0.16), 0, 1))
        at += rng.uniform(2, 6)
    return closed
