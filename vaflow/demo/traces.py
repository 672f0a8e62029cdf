"""Smooth random traces: what the demo's people feel, and everything else about them that drifts with time.

A trace is a sum of sinusoids with random periods and phases, so it can be asked for at any instant: the picture asks at
frame times, the sound at its control rate, the labels at annotation rows, and all three see the same trace.
"""

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MoodAt = Callable[[Floats], Floats]  # [N] seconds -> [N, 2] valence and arousal

SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Key:
    """Who a random number belongs to: the same key gives the same numbers, whatever else the data set holds."""

    seed: int
    split: str
    index: int

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose of one clip; purposes do not disturb each other."""
        return np.random.default_rng([self.seed, SPLIT_NUMBER[self.split], self.index, crc32(purpose.encode())])


@dataclass(frozen=True)
class Trace:
    """`scale * sum_k amplitude_k sin(2 pi t / period_k + phase_k)`, about unit variance before `scale`."""

    period: Floats
    phase: Floats
    amplitude: Floats
    scale: float = 1.0

    def __call__(self, time: Floats) -> Floats:
        """[N] seconds -> [N] values."""
        angle = 2 * np.pi * np.asarray(time, np.float64)[:, None] / self.period + self.phase
        return self.scale * (np.sin(angle) @ self.amplitude)


def smooth_trace(rng: np.random.Generator, slowest: float, fastest: float, scale: float = 1.0, waves: int = 7) -> Trace:
    """A trace with periods between `fastest` and `slowest` seconds, slow waves being the larger ones."""
    # One period from each of `waves` equal slices of the logarithmic range: no clip is only slow or only fast.
    slices = (np.arange(waves) + rng.uniform(0, 1, waves)) / waves
    period = fastest * (slowest / fastest) ** slices
    amplitude = np.sqrt(period)
    amplitude *= np.sqrt(2 / np.sum(amplitude**2))
    return Trace(period, rng.uniform(0, 2 * np.pi, waves), amplitude, scale)


@dataclass(frozen=True)
class Mood:
    """The hidden path that picture, sound and labels of one person share."""

    valence: Trace
    arousal: Trace

    def __call__(self, time: Floats) -> Floats:
        """[N] seconds -> [N, 2] valence and arousal within (-1, 1)."""
        # tanh keeps the path inside the square and makes the extremes as rare as annotators make them.
        return np.stack([np.tanh(self.valence(time)), np.tanh(self.arousal(time))], axis=-1)


def random_mood(key: Key) -> Mood:
    """The path of one person; valence and arousal are independent, and arousal is the slower one."""
    return Mood(
        smooth_trace(key.rng("valence"), slowest=45, fastest=8, scale=0.6),
        smooth_trace(key.rng("arousal"), slowest=60, fastest=14, scale=0.6),
    )


def stretches(
    rng: np.random.Generator, duration: float, share: float, shortest: float, longest: float
) -> list[tuple[float, float]]:
    """Disjoint intervals (begin, end) in seconds that cover about `share` of a clip, in order."""
    found: list[tuple[float, float]] = []
    total = 0.0
    for _ in range(100):
        if total >= share * duration:
            break
        length = min(rng.uniform(shortest, longest), duration / 2)
        begin = rng.uniform(0, duration - length)
        if all(begin > end + 1 or begin + length < start - 1 for start, end in found):
            found.append((begin, begin + length))
            total += length
    return sorted(found)


def within(time: Floats, intervals: list[tuple[float, float]]) -> Bools:
    """[N] seconds -> [N] whether an interval holds it."""
    inside = np.zeros(len(time), bool)
    for begin, end in intervals:
        inside |= (time >= begin) & (time < end)
    return inside
