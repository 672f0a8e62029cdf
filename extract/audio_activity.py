"""Masks of audio: the filter-bank frames and window steps that have audio, and speech activity.

Speech activity is energy clearly above the background. No model: music as loud as speech counts as speech. In a clip
with one speaker and a quiet background, that is enough to tell a speaking mouth from a chewing one.
"""

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders import preprocessing as logmel
from vaflow.timeline import Bools, Floats, Grid, Ints

HOP = logmel.HOP / logmel.RATE  # seconds between two filter-bank frames
FRAME = logmel.FRAME / logmel.RATE  # seconds that one covers
_SLACK = HOP / 2  # resampling rounds the ends of the audio by a fraction of a sample
METHOD = "energy"  # name of the measure, as records state it
MIN_ABOVE_FLOOR = 9.0  # dB above the background
MIN_LEVEL = -55.0  # dB below full scale; quieter is silence
FLOOR_PERCENTILE = 10
HANGOVER = 0.2  # seconds around loud frames that count as speech: the pauses between syllables


def covered_frames(frames: int, covered: tuple[tuple[float, float], ...]) -> Bools:
    """[F] True where all samples of a filter-bank frame came from the file."""
    first = np.arange(frames) * HOP
    valid = np.zeros(frames, bool)
    for start, stop in covered:
        valid |= (first >= start - _SLACK) & (first + FRAME <= stop + _SLACK)
    return valid


def step_valid(valid: Bools, starts: Floats, window: float, steps: int, duration: float) -> Bools:
    """[W, S] True where at least half of the frames under a step are valid; frames after the clip do not count."""
    sums = np.concatenate([[0], np.cumsum(valid)])
    edges = _edges(starts, window, steps)
    counts = np.diff(sums[np.clip(edges, 0, len(valid))], axis=1)
    inside = np.diff(np.minimum(edges, _frames_within(duration)), axis=1)
    result: NDArray[np.bool_] = (inside > 0) & (counts * 2 >= inside)
    return result


def ends_in_a_short_step(grid: Grid, steps: int, duration: float) -> bool:
    """Whether less than half of some step lies within the clip; reading version 2 marked such steps as missing."""
    edges = _edges(grid.seconds(grid.starts(duration)), grid.window, steps)
    inside = np.diff(np.minimum(edges, _frames_within(duration)), axis=1)
    return bool(((inside > 0) & (inside * 2 < np.diff(edges, axis=1))).any())


def _edges(starts: Floats, window: float, steps: int) -> Ints:
    """[W, S + 1] numbers of the frames at which the steps begin and end."""
    return np.rint((starts[:, None] + np.arange(steps + 1) * window / steps) / HOP).astype(np.int64)


def _frames_within(duration: float) -> int:
    """Number of frames that end within a clip."""
    return max(0, int((duration - FRAME + _SLACK) / HOP) + 1)


def speech_frames(levels: Floats) -> Bools:
    """[F] True during speech.

    Args:
        levels: [F] dB, one per `HOP`; 0 is full scale.
    """
    if not len(levels):
        return np.zeros(0, bool)
    floor = max(float(np.percentile(levels, FLOOR_PERCENTILE)), MIN_LEVEL - MIN_ABOVE_FLOOR)
    loud = (levels >= MIN_LEVEL) & (levels >= floor + MIN_ABOVE_FLOOR)
    reach = round(HANGOVER / HOP)
    return np.convolve(loud, np.ones(2 * reach + 1), mode="full")[reach : reach + len(loud)] > 0.5


def stored_speech(measured: Bools, valid: Bools) -> Bools:
    """[F] speech of each log-Mel frame: that of the 10 ms at which it begins, where the frame is `valid` [F]."""
    speech = np.zeros(len(valid), bool)
    measured = measured[: len(valid)]
    speech[: len(measured)] = measured
    return speech & valid


class SpeechMeter:
    """Speech of a clip from its samples, block by block."""

    def __init__(self, rate: int = 16_000) -> None:
        self._size = round(HOP * rate)
        self._rest = np.zeros(0, np.float32)
        self._levels: list[NDArray[np.float32]] = []

    def push(self, samples: NDArray[np.float32]) -> None:
        """The next samples [n]."""
        samples = np.concatenate([self._rest, samples])
        count = len(samples) // self._size
        self._rest = samples[count * self._size :]
        power = np.square(samples[: count * self._size].reshape(count, self._size), dtype=np.float64).mean(axis=1)
        self._levels.append((10 * np.log10(np.maximum(power, 1e-12))).astype(np.float32))

    def finish(self) -> Bools:
        """[F] True during speech, one per `HOP` from time 0."""
        return speech_frames(np.concatenate(self._levels) if self._levels else np.zeros(0))
