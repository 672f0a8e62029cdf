"""Facial expression over time: a few parameters per frame that follow valence and arousal and drift at random.

The image shows valence well (mouth, cheeks, inner brows) and arousal in part (eyes, brows): eyes and brows also drift
independently of arousal, the mouth opens with speech, and each face has its own neutral expression.
"""

from dataclasses import dataclass

import numpy as np

from vaflow.demo.curves import Floats, Key, MoodAt, smooth_curve
from vaflow.demo.person import Person
from vaflow.demo.voice import CONTROL_RATE


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
    """The face of `person` at `time` [N] seconds while feeling `mood` and speaking with `mouth` [C]."""
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
