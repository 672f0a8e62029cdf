"""Speech activity from energy: spans clearly louder than the background of the audio.

No model: music and other noise that is as loud as speech counts as speech. What it finds in a clip with one speaker
and a quiet background is where they speak; that is enough to tell a moving mouth that speaks from one that chews.
"""

import numpy as np
from numpy.typing import NDArray

METHOD = "energy"  # name of the measure, as records state it
HOP = 0.01  # seconds between two levels
MIN_ABOVE_FLOOR = 9.0  # dB above the background
MIN_LEVEL = -55.0  # dB below full scale; quieter is silence
FLOOR_PERCENTILE = 10
HANGOVER = 0.2  # seconds around loud frames that count as speech: the pauses between syllables

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def speech_frames(levels: Floats) -> Bools:
    """[F] True where there is speech.

    Args:
        levels: [F] dB, one per `HOP`; 0 is full scale.
    """
    if not len(levels):
        return np.zeros(0, bool)
    floor = max(float(np.percentile(levels, FLOOR_PERCENTILE)), MIN_LEVEL - MIN_ABOVE_FLOOR)
    loud = (levels >= MIN_LEVEL) & (levels >= floor + MIN_ABOVE_FLOOR)
    reach = round(HANGOVER / HOP)
    return np.convolve(loud, np.ones(2 * reach + 1), mode="full")[reach : reach + len(loud)] > 0.5


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
        """[F] True where there is speech, one per `HOP` from time 0."""
        return speech_frames(np.concatenate(self._levels) if self._levels else np.zeros(0))
