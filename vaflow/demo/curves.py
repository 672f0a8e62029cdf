"""Smooth random curves: valence and arousal of the synthetic people, and other values that drift with time.

A curve is a sum of sinusoids with random periods and phases. It is defined at every instant: video samples it at frame
times, audio at its control rate, labels at annotation rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MoodAt = Callable[[Floats], Floats]  # [N] seconds -> [N, 2] valence and arousal

WAVES = 7  # sinusoids of a curve
SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Key:
    """Identifies a clip: the same key gives the same random numbers, independently of the other clips."""

    seed: int
    split: str
    index: int

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose of one clip; purposes are independent of each other."""
        return np.random.default_rng([self.seed, SPLIT_NUMBER[self.split], self.index, crc32(purpose.encode())])


@dataclass(frozen=True)
class Curve:
    """`scale * sum_k amplitude_k sin(2 pi t / period_k + phase_k)`, about unit variance before `scale`."""

    period: Floats
    phase: Floats
    amplitude: Floats
    scale: float = 1.0

    def __call__(self, time: Floats) -> Floats:
        """[N] seconds -> [N] values."""
        angle = 2 * np.pi * np.asarray(time, np.float64)[:, None] / self.period + self.phase
        return self.scale * (np.sin(angle) @ self.amplitude)


def smooth_curve(rng: np.random.Generator, slowest: float, fastest: float, scale: float = 1.0) -> Curve:
    """A trace with periods between `fastest` and `slowest` seconds, slow waves being the larger ones."""
    # One period from each of `WAVES` equal slices of the logarithmic range: no clip is only slow or only fast.
    slices = (np.arange(WAVES) + rng.uniform(0, 1, WAVES)) / WAVES
    period = fastest * (slowest / fastest) ** slices
    amplitude = np.sqrt(period)
    amplitude *= np.sqrt(2 / np.sum(amplitude**2))
    return Curve(period, rng.uniform(0, 2 * np.pi, WAVES), amplitude, scale)


@dataclass(frozen=True)
class Mood:
    """Valence and arousal over time, shared by video, audio and labels of one person."""

    valence: Curve
    arousal: Curve

    def __call__(self, time: Floats) -> Floats:
        """[N] seconds -> [N, 2] valence and arousal within (-1, 1)."""
        # tanh keeps the path inside the square and makes the extremes as rare as annotators make them.
        return np.stack([np.tanh(self.valence(time)), np.tanh(self.arousal(time))], axis=-1)


def random_mood(key: Key) -> Mood:
    """The trajectory of one person; valence and arousal are independent, and arousal is slower."""
    return Mood(
        smooth_curve(key.rng("valence"), slowest=45, fastest=8, scale=0.6),
        smooth_curve(key.rng("arousal"), slowest=60, fastest=14, scale=0.6),
    )


def random_intervals(
    rng: np.random.Generator, duration: float, share: float, shortest: float, longest: float
) -> list[tuple[float, float]]:
    """Disjoint intervals (begin, end) in seconds that cover about `share` of a clip, in order."""
    intervals: list[tuple[float, float]] = []
    total = 0.0
    for _ in range(100):
        if total >= share * duration:
            break
        length = min(rng.uniform(shortest, longest), duration / 2)
        begin = rng.uniform(0, duration - length)
        if all(begin > end + 1 or begin + length < start - 1 for start, end in intervals):
            intervals.append((begin, begin + length))
            total += length
    return sorted(intervals)


def within(time: Floats, intervals: list[tuple[float, float]]) -> Bools:
    """[N] seconds -> [N] whether an interval holds it."""
    inside = np.zeros(len(time), bool)
    for begin, end in intervals:
        inside |= (time >= begin) & (time < end)
    return inside
