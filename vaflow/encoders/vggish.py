"""VGGish (Hershey et al., arXiv 1609.09430): 0.96 s of audio -> 128 values, before PCA and before any activation.

No maintained library ships it (torchaudio dropped its prototype in 2.9), so the network is written out here. It loads
the two published conversions of the original weights: torchvggish's (`features.N`, `embeddings.N`) and torchaudio's
(`features_network.N`, `embedding_network.N`). Both end in a ReLU. The original's embedding is the value before it,
which keeps the negative values: that is what is cached.

An example is centred on each step. Examples at a clip's ends are padded with the front end's value for digital silence.

The front end is VGGish's own log-Mel: magnitudes of a 512-point transform in 64 bands from 125 to 7,500 Hz,
log(x + 0.01). Source: section 3 of the paper, and the published front end of its weights: periodic Hann window of
25 ms, zero-padded at its end, every 10 ms; triangles that are linear in HTK's Mel scale; no power, no pre-emphasis, no
removal of the mean. Kaldi's filter banks differ in all of these, so the cached log-Mel cannot be used.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import nn

from vaflow.encoders.audio_models import ExampleEncoder
from vaflow.encoders.base import FrontEnd, Request, autocast
from vaflow.encoders.logmel import FRAME, HOP, RATE
from vaflow.encoders.weights import (
    check_checksum,
    checked_url,
    load_strictly,
    read_state_dict,
    state_digest,
    without_initial_weights,
)

BINS, LOWEST, HIGHEST = 64, 125.0, 7500.0
TRANSFORM = 512
OFFSET = 0.01

Floats = NDArray[np.float64]


@cache
def mel_weights() -> Floats:
    """Return [257, 64]: the weight of every transform bin in every band; the constant term has none."""
    bins = np.arange(TRANSFORM // 2 + 1) * RATE / TRANSFORM
    hertz = np.concatenate([bins, [LOWEST, HIGHEST]])
    scale = 1127.0 * np.log1p(hertz / 700.0)  # HTK's Mel scale
    mel = scale[:-2, None]
    edges = np.linspace(scale[-2], scale[-1], BINS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0.0, np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)))
    weights[0] = 0.0
    weights.flags.writeable = False  # shared by all callers
    return weights


def vggish_banks(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples [n] at 16 kHz in [-1, 1] -> [1 + (n - 400) // 160, 64] float32, computed in float64."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi / FRAME * np.arange(FRAME))
    frames = sliding_window_view(samples.astype(np.float64), FRAME)[::HOP]
    magnitude = np.abs(np.fft.rfft(frames * window, TRANSFORM))
    return np.log(magnitude @ mel_weights() + OFFSET).astype(np.float32)


MEL = {  # every setting of the front end
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
VGGISH_MEL = FrontEnd("vggish log-mel", BINS, float(np.log(OFFSET)), vggish_banks)
ADDRESS = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
EXAMPLE = 96  # frames
CHANNELS = ((64,), (128,), (256, 256), (512, 512))
WIDTHS = (4096, 4096, 128)
LAYOUTS = {"features_network.": "features.", "embedding_network.": "embeddings."}
POSTPROCESSING = "pproc."  # PCA, in some files beside the network


class VGGish(nn.Module):
    """Groups of 3x3 convolutions, each followed by 2x2 max pooling; then dense layers.

    Args:
        channels: output channels of every convolution, group by group.
        widths: outputs of the dense layers.
    """

    def __init__(self, channels: Sequence[Sequence[int]] = CHANNELS, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        maps: list[nn.Module] = []
        width = 1
        for group in channels:
            for after in group:
                maps += [nn.Conv2d(width, after, 3, padding=1), nn.ReLU()]
                width = after
            maps.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*maps)
        halvings = 2 ** len(channels)
        flat = channels[-1][-1] * (EXAMPLE // halvings) * (BINS // halvings)
        dense: list[nn.Module] = []
        for before, after in pairwise([flat, *widths]):
            dense += [nn.Linear(before, after), nn.ReLU()]
        self.embeddings = nn.Sequential(*dense[:-1])

    def forward(self, examples: torch.Tensor) -> torch.Tensor:
        """[B, 96, 64] log-Mel (time, band) -> [B, widths[-1]].

        Raises:
            ValueError: examples have another shape.
        """
        if examples.ndim != 3 or tuple(examples.shape[1:]) != (EXAMPLE, BINS):
            raise ValueError(f"VGGish: expected examples [B, {EXAMPLE}, {BINS}], got {[*examples.shape]}")
        maps = self.features(examples.unsqueeze(1))
        # The original's order is time, band, channel; the dense weights expect it.
        result: torch.Tensor = self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))
        return result


class VggishEncoder(ExampleEncoder):
    """An audio encoder around a network; see `vaflow.encoders.base.AudioEncoder`."""

    front_end: ClassVar[FrontEnd] = VGGISH_MEL
    example, middle = EXAMPLE, Fraction((EXAMPLE - 1) * HOP + FRAME, 2 * RATE)

    def __init__(self, request: Request, module: VGGish) -> None:
        self.name, self.precision, self.device = request.name, request.precision, torch.device(request.device)
        self.dim = int(module.embeddings[-1].out_features)  # type: ignore[arg-type]
        settings = {
            "encoder": "vggish",
            "weights": state_digest(module.state_dict()),
            "front_end": MEL,
            "example": EXAMPLE,
            "padding": "log of the offset beyond the clip",
            "output": "128-d before PCA, before activation",
        }
        self.identity = request.identity(settings)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)

    def features(self, logmel: torch.Tensor) -> torch.Tensor:
        """As `encode`, with gradients."""
        examples = logmel.to(self.device, torch.float32)
        with autocast(self.device, self.precision):
            vectors: torch.Tensor = self.module(examples)
        return vectors.to(torch.float32).unsqueeze(1)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, 96, 64] float32, one example each -> [B, 1, dim] float32, whatever the window and its steps.

        Raises:
            ValueError: examples have another shape.
        """
        return self.features(frames)


def build(request: Request) -> VggishEncoder:
    """Return VGGish with the published weights, or those of the file `request.weights`.

    Raises:
        WeightsError: the weights are unreachable, are damaged, or do not fit.
    """
    path = request.weights if request.weights is not None else checked_url(ADDRESS, encoder=request.name)
    check_checksum(path)
    with without_initial_weights():
        module = VGGish()
    state = {}
    for key, value in read_state_dict(path).items():
        prefix = next((prefix for prefix in LAYOUTS if key.startswith(prefix)), "")
        state[LAYOUTS.get(prefix, "") + key.removeprefix(prefix)] = value
    weights = {key: value for key, value in state.items() if not key.startswith(POSTPROCESSING)}
    load_strictly(module, weights, str(path))
    return VggishEncoder(request, module)
