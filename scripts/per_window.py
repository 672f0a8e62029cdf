"""Per-window feature extraction: the baseline of the benchmark of extraction.

For every window: seek, decode its stretch of video, encode the frames nearest to its sample times, compute the filter
banks of its stretch of sound, encode them. Windows overlap, so a frame is decoded and encoded once for each window that
it lies in; nothing runs at the same time as anything else. The encoders are the ones stage one uses.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.compliance import kaldi

from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.timeline import Grid

RATE = 16000
Floats = NDArray[np.float64]


def encode_clip(
    path: Path, grid: Grid, visual: VisualEncoder, audio: AudioEncoder, *, steps: int, device: torch.device
) -> int:
    """Encode every window of a clip, throw the results away; how many images went through the visual encoder."""
    samples, duration = _samples(path), _duration(path)
    images = 0
    for ticks in grid.window_ticks(duration):
        at = grid.seconds(ticks)
        faces = [visual.prepare(image) for image in _frames(path, at[at < duration])]
        visual.encode(torch.from_numpy(np.stack(faces)).to(device)).cpu()
        first = round(at[0] * RATE)
        banks = _filter_banks(samples[first : first + round(grid.window * RATE)])
        audio.encode(banks[None].to(device), window=grid.window, steps=steps).cpu()
        images += len(faces)
    return images


def _duration(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.duration or 0) / av.time_base


def _frames(path: Path, at: Floats) -> Iterator[NDArray[np.uint8]]:
    """The frame nearest to each time, decoded from the key frame before the first."""
    with av.open(str(path)) as container:
        container.seek(round(at[0] * av.time_base))
        decoded: list[tuple[float, av.VideoFrame]] = []
        for frame in container.decode(video=0):
            decoded.append((frame.time or 0.0, frame))
            if decoded[-1][0] > at[-1]:
                break
        times = np.array([time for time, _ in decoded])
        for time in at:
            yield np.asarray(decoded[int(np.abs(times - time).argmin())][1].to_ndarray(format="rgb24"), np.uint8)


def _samples(path: Path) -> NDArray[np.float32]:
    with av.open(str(path)) as container:
        resample = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        blocks: list[Any] = []
        for frame in container.decode(container.streams.audio[0]):
            blocks += [block.to_ndarray()[0] for block in resample.resample(frame)]
    return np.concatenate(blocks)


def _filter_banks(samples: NDArray[np.float32]) -> torch.Tensor:
    """[F, 128], as the Hugging Face feature extractor of AST computes them."""
    return kaldi.fbank(
        torch.from_numpy(samples)[None],
        sample_frequency=RATE,
        window_type="hanning",
        num_mel_bins=128,
        htk_compat=True,
        use_energy=False,
        dither=0.0,
        frame_shift=10,
    )
