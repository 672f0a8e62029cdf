"""Which stretch of sound each token of an Audio Spectrogram Transformer stands for. Exact, and without torch.

Tokens are patches of the [mel, frame] plane, frequency-major. All numbers come from the model's config.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vaflow.encoders.logmel import FRAME, HOP, RATE, frame_count
from vaflow.errors import UsageError, explain


@dataclass(frozen=True)
class Geometry:
    """Patches of `patch` x `patch` every `frequency_stride` bins and `time_stride` frames of [mel_bins, max_length]."""

    patch: int
    frequency_stride: int
    time_stride: int
    mel_bins: int
    max_length: int

    @property
    def frequency_tokens(self) -> int:
        """Patches along frequency."""
        return (self.mel_bins - self.patch) // self.frequency_stride + 1

    @property
    def time_tokens(self) -> int:
        """Patches along time."""
        return (self.max_length - self.patch) // self.time_stride + 1

    def _centres(self) -> list[Fraction]:
        """Centre of every time token in seconds: halfway between its first frame's start and its last frame's end."""
        half = Fraction((self.patch - 1) * HOP + FRAME, 2)
        return [(token * self.time_stride * HOP + half) / RATE for token in range(self.time_tokens)]

    def token_times(self) -> NDArray[np.float64]:
        """[time_tokens] seconds after the window's start."""
        return np.array([float(centre) for centre in self._centres()])

    def members(self, window: float, steps: int) -> list[list[int]]:
        """For each step k, the time tokens centred in [k, k + 1) * window / steps.

        Raises:
            UsageError: a step would have no token: more steps than tokens, or a window beyond the model's input.
        """
        step = Fraction(str(window)) / steps
        found: list[list[int]] = [[] for _ in range(steps)]
        for token, centre in enumerate(self._centres()):
            if centre < step * steps:
                found[int(centre / step)].append(token)
        empty = [k for k, tokens in enumerate(found) if not tokens]
        if empty:
            seconds = float(Fraction(self.max_length * HOP, RATE))
            raise UsageError(
                explain(
                    f"Audio step {empty[0]} of {steps} in a window of {window:g} s would have no token of the encoder",
                    expected=f"windows of at most about {seconds:g} s, the encoder's input, and steps of at least "
                    f"{self.time_stride * HOP / RATE:g} s, the distance of its tokens",
                    got=f"{float(step):g} s per step",
                    remedy="Choose fewer --audio-steps or a shorter --window",
                )
            )
        return found

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """[steps] seconds after the window's start: the mean centre of each step's tokens."""
        centres = self._centres()
        groups = self.members(window, steps)
        return np.array([float(sum(centres[t] for t in tokens) / len(tokens)) for tokens in groups])

    def pooling(self, window: float, steps: int) -> NDArray[np.float32]:
        """[steps, time_tokens] float32: the matrix that averages each step's tokens."""
        matrix = np.zeros((steps, self.time_tokens), np.float32)
        for step, tokens in enumerate(self.members(window, steps)):
            matrix[step, tokens] = 1 / len(tokens)
        return matrix


def window_frames(window: float) -> int:
    """Whole log-Mel frames in a window of that many seconds (998 for 10 s)."""
    return frame_count(int(Fraction(str(window)) * RATE))
