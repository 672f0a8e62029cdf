"""The waveform as a front end: 16 kHz mono samples, in rows of 10 ms.

A row is as long as the hop of the filter banks, so a waveform is stored, sliced and padded as any other frames, and the
samples of a window are its rows laid end to end.
"""

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
