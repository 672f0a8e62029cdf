"""The waveform as a front end (16 kHz mono, in rows of 10 ms), and the tokens of audio networks per window step.

A row is as long as the hop of the filter banks, so a waveform is stored, sliced and padded as any other frames, and the
samples of a window are its rows laid end to end. The centre of each token of a network follows from its geometry. A
step is the mean of the tokens centred in it, and its time is the mean of their centres.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.base import FrontEnd, Segments
from vaflow.encoders.logmel import HOP, RATE
from vaflow.errors import UsageError, explain


def rows(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples [n * 160] -> [n, 160] float32."""
    return samples.reshape(-1, HOP)


WAVEFORM = FrontEnd("waveform", HOP, 0.0, rows, HOP)


def whole_window(window: float) -> Segments:
    """Return one segment with all rows of a window of that many seconds.

    Raises:
        UsageError: the window is not a multiple of 10 ms.
    """
    frames = Fraction(str(window)) * RATE / HOP
    if frames.denominator != 1:
        raise UsageError(explain("--window must be a multiple of 0.01 s for this audio encoder", got=f"{window:g} s"))
    return Segments((0,), int(frames))


def samples_of(name: str, frames: torch.Tensor, window: float) -> torch.Tensor:
    """Rows [B, F, 160] of one window -> samples [B, F * 160] float32.

    Raises:
        ValueError: the rows have another shape.
    """
    expected = (whole_window(window).frames, HOP)
    if frames.ndim != 3 or tuple(frames.shape[1:]) != expected:
        raise ValueError(f"{name}: expected a waveform [B, {expected[0]}, {HOP}], got {tuple(frames.shape)}")
    return frames.to(torch.float32).flatten(1)


def standardised(samples: torch.Tensor) -> torch.Tensor:
    """[B, n] -> [B, n] with mean 0 and variance 1 per row, as Wav2Vec2FeatureExtractor computes it."""
    mean = samples.mean(dim=1, keepdim=True)
    variance = samples.var(dim=1, keepdim=True, correction=0)
    return (samples - mean) / torch.sqrt(variance + 1e-7)


@dataclass(frozen=True)
class TokenGrid:
    """Tokens at regular intervals.

    Attributes:
        first: seconds from the window's start to the centre of the first token.
        interval: seconds between two tokens.
        count: number of tokens.
        limit: seconds of input that the network accepts.
    """

    first: Fraction
    interval: Fraction
    count: int
    limit: Fraction

    def centre(self, token: int) -> Fraction:
        """Return the centre of a token, in seconds after the window's start."""
        return self.first + token * self.interval

    def times(self) -> NDArray[np.float64]:
        """Return [count] seconds after the window's start."""
        return np.array([float(self.centre(token)) for token in range(self.count)])

    def members(self, window: float, steps: int) -> list[list[int]]:
        """Return, for each step k, the tokens centred in [k, k + 1) * window / steps.

        Raises:
            UsageError: a step would have no token: more steps than tokens, or a window beyond the network's input.
        """
        step = Fraction(str(window)) / steps
        groups: list[list[int]] = [[] for _ in range(steps)]
        for token in range(self.count):
            if self.centre(token) < step * steps:
                groups[int(self.centre(token) / step)].append(token)
        empty = [k for k, tokens in enumerate(groups) if not tokens]
        if empty:
            raise UsageError(
                explain(
                    f"Audio step {empty[0]} of {steps} in a window of {window:g} s would have no token of the encoder",
                    expected=f"windows of at most about {float(self.limit):g} s, the encoder's input, and steps of at "
                    f"least {float(self.interval):g} s, the interval of its tokens",
                    got=f"{float(step):g} s per step",
                    remedy="Choose fewer --audio-steps or a shorter --window",
                )
            )
        return groups

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the mean centre of each step's tokens."""
        groups = self.members(window, steps)
        return np.array([float(sum(self.centre(t) for t in tokens) / len(tokens)) for tokens in groups])

    def pooling(self, window: float, steps: int) -> NDArray[np.float32]:
        """Return [steps, count] float32: the matrix that averages each step's tokens."""
        matrix = np.zeros((steps, self.count), np.float32)
        for step, tokens in enumerate(self.members(window, steps)):
            matrix[step, tokens] = 1 / len(tokens)
        return matrix
