"""Draws a person: head and shoulders in a room, with random appearance and the expression of one moment.

The image shows valence well (mouth, cheeks, inner brows) and arousal in part (eyes, brows): eyes and brows also drift
independently of arousal, the mouth opens with speech, and each face has its own neutral expression.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from vaflow.demo.voice import CONTROL_RATE, Floats, Key, MoodAt, smooth_curve

Image = NDArray[np.uint8]
Points = NDArray[np.float64]
Colour = tuple[int, int, int]

SHIFT = 4  # OpenCV takes corners in sixteenths of a pixel
CIRCLE = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 28, endpoint=False)), np.sin(a)], axis=-1)


class Pen:
    """Draws on `image` (BGR) in units of `scale` pixels around `origin` (x, y in pixels), turned by `angle` radians."""

    def __init__(self, image: Image, origin: tuple[float, float], scale: float, angle: float = 0.0) -> None:
        self.image = image
        self.scale = scale
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.matrix = scale * turn * (1 << SHIFT)
        self.offset = np.asarray(origin, np.float64) * (1 << SHIFT)

    def fill(self, points: Points, colour: Colour) -> None:
        """A filled polygon of [N, 2] points."""
        cv2.fillPoly(self.image, [self._pixels(points)], colour, cv2.LINE_AA, SHIFT)

    def line(self, points: Points, colour: Colour, width: float, closed: bool = False) -> None:
        """A line through [N, 2] points, `width` units wide (at least one pixel)."""
        pixels = max(1, round(width * self.scale))
        cv2.polylines(self.image, [self._pixels(points)], closed, colour, pixels, cv2.LINE_AA, SHIFT)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """A filled ellipse."""
        self.fill(CIRCLE * (rx, ry) + (x, y), colour)

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        return np.rint(points @ self.matrix + self.offset).astype(np.int32)


@lru_cache(1024)  # most colours are those of every frame
def shade(colour: Colour, factor: float) -> Colour:
    """Darker (below 1) or lighter (above 1)."""
    blue, green, red = (int(min(255, max(0, c * factor))) for c in colour)
    return blue, green, red


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other colour."""
    blue, green, red = (int(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return blue, green, red


def from_rgb(text: str) -> Colour:
    """'#rrggbb' -> OpenCV's (blue, green, red)."""
    return int(text[5:7], 16), int(text[3:5], 16), int(text[1:3], 16)


def curve(x: Points, height: float, lift: float, y: float) -> Points:
    """A parabola over `x` in [-1, 1]: at `y - height` in the middle, `y - lift` at both ends (up is negative)."""
    points = np.empty((len(x), 2))
    bend = x * x
    points[:, 0] = x
    points[:, 1] = y - height * (1 - bend) - lift * bend
    return points


SKINS = [from_rgb(c) for c in ("#f6d9c4", "#eec3a0", "#dca97e", "#c58c5e", "#a06a42", "#7b4d30", "#5c3824")]
HAIRS = [from_rgb(c) for c in ("#2b211d", "#4a3325", "#7a4e2d", "#b58345", "#d9b871", "#8c3b22", "#8f8f93")]
SHIRTS = [from_rgb(c) for c in ("#31587a", "#7a3131", "#3f6b4a", "#c9a23f", "#5b4a7d", "#d8d8d2", "#33363d", "#b8623a")]
WALLS = [from_rgb(c) for c in ("#d7cfc0", "#9fb3bd", "#c7b7b5", "#8d9a86", "#b9b4cc", "#6f7a86", "#e0d3a8")]
IRISES = [from_rgb(c) for c in ("#5b3a1e", "#3d2a18", "#47658a", "#4f7350", "#6d6f72")]
HAIR_STYLES = ("short", "long", "bun", "curly", "bald")
BEARDS = ("none", "none", "none", "none", "none", "none", "moustache", "stubble")
WHITE: Colour = (238, 240, 242)
DARK: Colour = (24, 22, 26)
MOUTH: Colour = (34, 24, 82)
TONGUE: Colour = (98, 90, 190)
TEETH: Colour = (232, 238, 240)

EYE_Y, BROW_Y, NOSE_Y, MOUTH_Y = -0.12, -0.5, 0.27, 0.66
HEAD_SCALE = 0.235  # half face width, in image heights
ACROSS = np.linspace(-1, 1, 9)
IRIS, PUPIL, GLINT = CIRCLE * 0.125, CIRCLE * 0.065, CIRCLE * 0.03 + (0.04, -0.045)
FRINGE = {"short": 0.3, "long": 0.36, "bun": 0.2, "curly": 0.26}  # from the top of the head to the hairline


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


def draw_room(person: Person, key: Key, width: int, height: int) -> Image:
    """[height, width, 3] BGR: the wall behind, with a few soft shapes on it. Drawn once per clip."""
    rng = key.rng("room picture")
    down = np.linspace(1.1, 0.8, height)[:, None, None]
    across = np.linspace(rng.uniform(0.85, 1), rng.uniform(0.95, 1.1), width)[None, :, None]
    room = np.clip(np.array(person.wall) * down * across * person.light, 0, 255).astype(np.uint8)
    pen = Pen(room, (0, 0), height)
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(0, width / height), rng.uniform(0, 0.8)
        w, h = rng.uniform(0.1, 0.3, 2)
        blue, green, red = (int(c) for c in rng.integers(30, 230, 3))
        tint = mix(person.wall, (blue, green, red), 0.35)
        corners = np.array([[x - w, y - h], [x + w, y - h], [x + w, y + h], [x - w, y + h]])
        pen.fill(corners, shade(tint, person.light))
        pen.line(corners, shade(tint, 0.8), 0.01, closed=True)
    return room


class FaceArtist:
    """Draws the frames of one person in a room [H, W, 3] BGR; `expression` has a row per frame."""

    def __init__(self, person: Person, expression: Expression, room: Image) -> None:
        self.person = person
        self.expression = expression
        self.room = room
        self.scale = HEAD_SCALE * room.shape[0] * person.size
        self.skin = shade(person.skin, person.light)
        self.outline = _outline(person)
        self.hair = _hair(person, self.outline)
        w = person.eye_size
        self.socket = CIRCLE * (w * 1.25, 0.3) + (0, -0.02)
        self.above_eye = (curve(ACROSS, 0.36, -0.02, 0) * (w * 1.1, 1))[::-1]
        self.below_eye = (curve(ACROSS, -0.28, -0.02, 0) * (w * 1.1, 1))[::-1]

    def place(self, i: int) -> tuple[float, float, float]:
        """Where the head of frame i is: centre x, y in pixels, and tilt in radians."""
        height, width = self.room.shape[:2]
        e = self.expression
        return width / 2 + e.x[i] * self.scale, height * 0.5 + e.y[i] * self.scale, float(e.turn[i])

    def draw(self, i: int) -> Image:
        """Frame i, [H, W, 3] BGR."""
        image = self.room.copy()
        x, y, turn = self.place(i)
        body = Pen(image, (x * 0.4 + self.room.shape[1] * 0.3, self.room.shape[0] * 0.5), self.scale)
        pen = Pen(image, (x, y), self.scale, turn)
        self._hair_behind(pen)
        self._body(body)
        self._head(pen)
        self._cheeks(pen, i)
        for side in (-1, 1):
            self._eye(pen, i, side)
            self._brow(pen, i, side)
        self._nose(pen)
        self._beard(pen)
        self._mouth(pen, i)
        self._hair_in_front(pen)
        self._glasses(pen)
        return image

    def _hair_behind(self, pen: Pen) -> None:
        p = self.person
        hair = shade(p.hair, p.light * 0.85)
        if p.hair_style == "long":
            pen.fill(CIRCLE * (1.22, 1.5) + (0, 0.1), hair)
            pen.fill(np.array([[-1.2, 0], [1.2, 0], [1.1, 1.7], [-1.1, 1.7]]), hair)
        elif p.hair_style == "curly":
            for angle in np.linspace(np.pi * 0.95, np.pi * 2.05, 9):
                pen.ellipse(1.05 * np.cos(angle), 1.15 * np.sin(angle) - 0.1, 0.4, 0.4, hair)
        elif p.hair_style == "bun":
            pen.ellipse(0, -p.face_height - 0.25, 0.42, 0.36, hair)

    def _body(self, pen: Pen) -> None:
        p = self.person
        shirt = shade(p.shirt, p.light)
        pen.fill(np.array([[-0.42, 0.9], [0.42, 0.9], [0.5, 1.9], [-0.5, 1.9]]), shade(self.skin, 0.8))
        half = np.array([[-2.1, 2.6], [-1.9, 2.0], [-1.2, 1.68], [-0.48, 1.5]])
        shoulders = np.concatenate([half, [[0, 1.78]], half[::-1] * (-1, 1)])
        pen.fill(shoulders, shirt)
        pen.line(shoulders[3:6], shade(shirt, 0.7), 0.06)

    def _head(self, pen: Pen) -> None:
        for side in (-1, 1):
            pen.ellipse(side * 1.0, -0.02, 0.15, 0.24, shade(self.skin, 0.86))
        pen.fill(self.outline, self.skin)
        pen.line(self.outline, shade(self.skin, 0.82), 0.03, closed=True)

    def _cheeks(self, pen: Pen, i: int) -> None:
        smile = float(self.expression.smile[i])
        blush = mix(self.skin, (110, 110, 225), 0.06 + 0.22 * max(smile, 0))
        for side in (-1, 1):
            pen.ellipse(side * 0.6, 0.3 - 0.06 * smile, 0.2, 0.15, blush)
        if abs(smile) > 0.15:  # the fold from nose to mouth: outwards in a smile, downwards in a frown
            depth = shade(self.skin, 1 - 0.22 * min(abs(smile), 1))
            for side in (-1, 1):
                fold = np.array([[0.24, 0.3], [0.42 + 0.08 * smile, 0.45], [0.52 + 0.06 * smile, 0.66 - 0.06 * smile]])
                pen.line(fold * (side, 1), depth, 0.035)

    def _eye(self, pen: Pen, i: int, side: int) -> None:
        e, p = self.expression, self.person
        opening, cheek = float(e.eyes[i]), max(float(e.smile[i]), 0)
        width = np.array([p.eye_size, 1])
        centre = np.array([side * p.eye_gap, EYE_Y])
        upper = curve(ACROSS, 0.28 * opening, -0.01, 0) * width + centre
        lower = curve(ACROSS, -0.15 * opening + 0.06 * cheek * opening, -0.01, 0) * width + centre
        pen.fill(self.socket + centre, shade(self.skin, 0.93))
        pen.fill(np.concatenate([upper, lower[::-1]]), WHITE)
        if opening > 0.06:
            look = centre + np.array([float(e.gaze[i]) * 0.06, -0.06 * opening])
            pen.fill(IRIS + look, p.iris)
            pen.fill(PUPIL + look, DARK)
            pen.fill(GLINT + look, WHITE)
        pen.fill(np.concatenate([upper, self.above_eye + centre]), shade(self.skin, 0.86))
        pen.fill(np.concatenate([lower, self.below_eye + centre]), shade(self.skin, 0.93))
        pen.line(upper, DARK, 0.045)

    def _brow(self, pen: Pen, i: int, side: int) -> None:
        e, p = self.expression, self.person
        lift, slant = 0.2 * float(e.brows[i]), 0.17 * float(e.slant[i])
        x = np.array([0.19, 0.38, 0.56, 0.72]) + p.eye_gap - 0.44
        y = BROW_Y - lift + np.array([0.03 - slant, -0.05 - slant * 0.4, -0.06 + slant * 0.2, 0.06 + slant * 0.4])
        pen.line(np.stack([side * x, y], axis=-1), p.brow, p.brow_width)

    def _nose(self, pen: Pen) -> None:
        n = self.person.nose
        ridge = np.array([[-0.05, -0.1], [-0.07, 0.1], [-n, NOSE_Y - 0.02], [0, NOSE_Y + 0.05], [n, NOSE_Y - 0.02]])
        pen.fill(np.array([[0.0, -0.1], [n, NOSE_Y], [0, NOSE_Y + 0.05], [-n, NOSE_Y]]), shade(self.skin, 0.94))
        pen.line(ridge[2:], shade(self.skin, 0.68), 0.04)

    def _beard(self, pen: Pen) -> None:
        p = self.person
        if p.beard == "none":
            return
        colour = mix(shade(p.hair, p.light), self.skin, 0.25 if p.beard == "moustache" else 0.75)
        if p.beard == "stubble":
            jaw = self.outline[self.outline[:, 1] > 0.45]
            inner = np.array([[-0.62, 0.5], [-0.5, 0.42], [0, 0.4], [0.5, 0.42], [0.62, 0.5]])
            pen.fill(np.concatenate([jaw[np.argsort(-jaw[:, 0])], inner]), colour)
        else:
            pen.fill(np.array([[-0.36, 0.56], [-0.1, 0.4], [0.1, 0.4], [0.36, 0.56], [0, 0.5]]), colour)

    def _mouth(self, pen: Pen, i: int) -> None:
        e, p = self.expression, self.person
        smile = float(e.smile[i])
        opening = max(float(e.mouth[i]), 0.75 * smile - 0.2)  # a broad smile shows the teeth
        w = p.mouth_width * (1 + 0.3 * smile - 0.1 * float(e.mouth[i]))
        lift = 0.22 * smile  # the corners go up, the middle down
        upper = curve(ACROSS, 0.05 * opening - 0.6 * lift, lift, MOUTH_Y) * (w, 1)
        lower = curve(ACROSS, -0.3 * opening - 0.6 * lift - 0.01, lift, MOUTH_Y) * (w, 1)
        lips = p.lip_size * (1 - 0.25 * smile)
        full = 1 - np.abs(ACROSS) ** 3
        top, bottom = upper.copy(), lower.copy()
        top[:, 1] -= lips * full
        bottom[:, 1] += 1.25 * lips * full
        lip = shade(p.lip, p.light)
        pen.fill(np.concatenate([top, bottom[::-1]]), lip)
        if opening > 0.08:
            pen.fill(np.concatenate([upper, lower[::-1]]), MOUTH)
            self._inside(pen, upper, lower, opening, smile)
        pen.line(upper, shade(lip, 0.45), 0.045)

    def _inside(self, pen: Pen, upper: Points, lower: Points, opening: float, smile: float) -> None:
        """Teeth under the upper lip, more of them in a smile; the tongue above the lower lip."""
        middle = slice(1, -1)
        shown = 0.3 + 0.5 * max(smile, 0)
        if opening > 0.3 and smile < 0.5:
            tongue = lower[2:-2] - (lower[2:-2] - upper[2:-2]) * 0.35
            pen.fill(np.concatenate([tongue, lower[2:-2][::-1]]), TONGUE)
        edge = upper[middle] + (lower[middle] - upper[middle]) * shown
        pen.fill(np.concatenate([upper[middle], edge[::-1]]), TEETH)

    def _hair_in_front(self, pen: Pen) -> None:
        if self.hair is not None:
            pen.fill(self.hair, shade(self.person.hair, self.person.light))

    def _glasses(self, pen: Pen) -> None:
        p = self.person
        if not p.glasses:
            return
        for side in (-1, 1):
            pen.line(CIRCLE * (0.3, 0.27) + (side * p.eye_gap, EYE_Y), DARK, 0.025, closed=True)
            pen.line(np.array([[side * (p.eye_gap + 0.3), EYE_Y], [side * 1.0, EYE_Y - 0.05]]), DARK, 0.025)
        pen.line(np.array([[-p.eye_gap + 0.3, EYE_Y], [p.eye_gap - 0.3, EYE_Y]]), DARK, 0.025)


def _outline(person: Person) -> Points:
    """The head, [N, 2]: round above, narrowing to the chin by the person's jaw."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x, y = np.cos(angle), np.sin(angle)
    narrow = np.where(y > 0, 1 - (1 - person.jaw) * np.clip(y, 0, 1) ** 1.5, 1)
    x = np.sign(x) * np.abs(x) ** 0.9 * narrow
    return np.stack([x, y * person.face_height], axis=-1)


def _hair(person: Person, outline: Points) -> Points | None:
    """Hair on top of the head, [N, 2], down to a hairline; None without."""
    if person.hair_style == "bald":
        return None
    top = outline[outline[:, 1] < -0.45]
    top = top[np.argsort(top[:, 0])] * (1.05, 1.07)
    x = np.linspace(0.9, -0.9, 9)
    hairline = -person.face_height + FRINGE[person.hair_style] + 0.42 * np.abs(x + 0.15) ** 2.5
    return np.concatenate([top, np.stack([x, np.minimum(hairline, -0.42)], axis=-1)])
