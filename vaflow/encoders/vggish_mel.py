"""VGGish's own log-Mel: magnitudes of a 512-point transform in 64 bands from 125 to 7,500 Hz, log(x + 0.01).

Source: Hershey et al., arXiv 1609.09430, section 3, and the published front end that goes with its weights: periodic
Hann window of 25 ms, zero-padded at its end, every 10 ms; triangles that are linear in HTK's Mel scale; no power, no
pre-emphasis, no removal of the mean. Kaldi's filter banks differ in all of these, so the cached log-Mel will not do.
"""

from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vaflow.encoders.frontend import FrontEnd
from vaflow.encoders.logmel import FRAME, HOP, RATE

BINS, LOWEST, HIGHEST = 64, 125.0, 7500.0
TRANSFORM = 512
OFFSET = 0.01

Floats = NDArray[np.float64]


def hertz_to_mel(frequency: Floats) -> Floats:
    """HTK's scale: 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(frequency / 700.0)


@cache
def mel_weights() -> Floats:
    """[257, 64]: how much every transform bin counts in every band; the constant term counts nowhere."""
    mel = hertz_to_mel(np.arange(TRANSFORM // 2 + 1) * RATE / TRANSFORM)[:, None]
    low, high = hertz_to_mel(np.array([LOWEST, HIGHEST]))
    edges = np.linspace(low, high, BINS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0.0, np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)))
    weights[0] = 0.0
    weights.flags.writeable = False  # one array for all callers
    return weights


def vggish_banks(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples [n] at 16 kHz in [-1, 1] -> [1 + (n - 400) // 160, 64] float32, computed in float64."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi / FRAME * np.arange(FRAME))
    frames = sliding_window_view(sound.astype(np.float64), FRAME)[::HOP]
    magnitude = np.abs(np.fft.rfft(frames * window, TRANSFORM))
    return np.log(magnitude @ mel_weights() + OFFSET).astype(np.float32)


VGGISH_MEL = FrontEnd("vggish log-mel", BINS, float(np.log(OFFSET)), vggish_banks)


def identity() -> dict[str, object]:
    """Plain JSON of every setting."""
    return {
        "sample_rate": RATE,
        "hop": HOP,
        "frame": FRAME,
        "transform": TRANSFORM,
        "window": "periodic hann",
        "spectrum": "magnitude",
        "mel_bins": BINS,
        "mel_hertz": [LOWEST, HIGHEST],
        "log_offset": OFFSET,
    }
