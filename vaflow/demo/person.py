"""Random appearance of the drawn people: colours, proportions, hair, neutral expression, room."""

from dataclasses import dataclass

import numpy as np

from vaflow.demo.curves import Key
from vaflow.demo.drawing import Colour, from_rgb, mix, shade

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
