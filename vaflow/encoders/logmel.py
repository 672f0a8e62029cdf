"""Kaldi log-Mel filter banks of a whole clip, computed once while its audio is decoded.

The parameters are those of Hugging Face's feature extractor for the Audio Spectrogram Transformer. Filter banks are
framewise, so a slice that starts on the 10-ms hop equals the extractor's output for the same samples.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RATE = 16_000  # samples per second
HOP = 160  # samples between two frames: 10 ms
FRAME = 400  # samples per frame: 25 ms
MEL_BINS = 128
# Frames are computed in groups of this size, the last one padded: matrix products round differently for few rows, and
# the output must not depend on how a clip's audio was split into blocks.
GROUP = 100


def frame_times(count: int) -> NDArray[np.float64]:
    """Return [count] seconds: the centre of every frame, 0.01 i + 0.0125."""
    return (np.arange(count, dtype=np.float64) * HOP + FRAME / 2) / RATE


def frame_count(samples: int, frame: int = FRAME) -> int:
    """Return the number of whole frames in that many samples."""
    return 0 if samples < frame else 1 + (samples - frame) // HOP


def logmel_identity() -> dict[str, object]:
    """Return plain JSON of everything that changes the values of the log-Mel stream."""
    return {
        "features": "kaldi fbank",
        "library": "torchaudio.compliance.kaldi",
        "sample_rate": RATE,
        "hop": HOP,
        "frame": FRAME,
        "mel_bins": MEL_BINS,
        "window": "hanning",
        "snip_edges": True,
        "dither": 0.0,
    }


def kaldi_banks(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples of `GROUP` frames, [(GROUP - 1) * HOP + FRAME] -> [GROUP, 128] float32."""
    import torch
    from torchaudio.compliance import kaldi

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads only wait while decoders keep the cores busy
    try:
        banks = kaldi.fbank(
            torch.from_numpy(samples)[None],
            sample_frequency=float(RATE),
            window_type="hanning",
            num_mel_bins=MEL_BINS,
        )
    finally:
        torch.set_num_threads(threads)
    values: NDArray[np.float32] = banks.numpy()
    return values


class FilterBank:
    """Filter banks of streamed audio; the output does not depend on the blocks, to the last bit.

    Frame i covers samples [160 i, 160 i + frame); only whole frames are returned (Kaldi's `snip_edges`).
    """

    def __init__(
        self,
        banks: Callable[[NDArray[np.float32]], NDArray[np.float32]] = kaldi_banks,
        bins: int = MEL_BINS,
        frame: int = FRAME,
    ) -> None:
        self._banks, self._bins, self._frame = banks, bins, frame
        self._rest: NDArray[np.float32] = np.empty(0, np.float32)

    def push(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples [n] at 16 kHz, in [-1, 1] -> [k, bins] float32, the frames completed by them.

        Raises:
            ValueError: samples are not one-dimensional.
        """
        if samples.ndim != 1:
            raise ValueError(f"FilterBank.push: expected mono samples [n], got shape {samples.shape}")
        pending = np.concatenate([self._rest, samples.astype(np.float32, copy=False)])
        count = frame_count(pending.size, self._frame)
        self._rest = pending[count * HOP :].copy()
        groups = [self._group(pending, first, min(GROUP, count - first)) for first in range(0, count, GROUP)]
        return np.concatenate(groups) if groups else np.empty((0, self._bins), np.float32)

    def _group(self, samples: NDArray[np.float32], first: int, count: int) -> NDArray[np.float32]:
        part = samples[first * HOP : first * HOP + (count - 1) * HOP + self._frame]
        padded = np.zeros((GROUP - 1) * HOP + self._frame, np.float32)
        padded[: part.size] = part
        return self._banks(padded)[:count]
