"""Audio encoders: what they share, openSMILE's eGeMAPS, and Resemblyzer's speaker encoder.

`opensmile:eGeMAPSv02[/functionals]` requires `pip install -e '.[opensmile]'`. openSMILE is free for research and
private use only; commercial use needs a licence of audEERING. The feature set: Eyben et al. 2016, IEEE Transactions on
Affective Computing 7(2). The 25 low-level descriptors (every 10 ms) of a window are averaged in each audio step; with
`/functionals`, all steps of a window have its 88 functionals. Nothing is downloaded.

`resemblyzer` is a three-layer LSTM over 1.6 s of mel spectrogram -> 256 numbers of length one. Source: the Python
package Resemblyzer 0.1.4 (Apache 2.0), after Wan et al. 2018 (GE2E, arXiv 1710.10467). The weights are the file
`pretrained.pt` of its wheel. Resemblyzer's own `preprocess_wav` raises the volume of quiet recordings and cuts silences
out. Here the audio is read unchanged, because times must match the video.
"""

from fractions import Fraction
from math import floor
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vaflow.encoders.base import (
    WAVEFORM,
    FrontEnd,
    LayerChoice,
    Request,
    Segments,
    TokenGrid,
    autocast,
    samples_of,
    step_centres,
    whole_window,
)
from vaflow.encoders.logmel import HOP, RATE
from vaflow.encoders.weights import load_strictly, read_state_dict, state_digest, without_initial_weights
from vaflow.errors import UsageError, WeightsError, explain

SETS = {"eGeMAPSv02": False, "eGeMAPSv02/functionals": True}


class WindowEncoder:
    """An audio encoder that reads a whole window as one segment, and averages its tokens in each step.

    Raises:
        UsageError: the name asks for another pooling.
    """

    kind: ClassVar[str] = "audio"

    def __init__(self, request: Request, choice: LayerChoice) -> None:
        if choice.pooling not in ("", "mean"):
            problem = f"{request.name} is an audio model: its tokens are averaged in each step"
            raise UsageError(explain(problem, expected="pool=mean", got=f"pool={choice.pooling}"))
        self.name, self.precision, self.device = request.name, request.precision, torch.device(request.device)
        self.choice = choice
        self._pooling: dict[tuple[float, int], torch.Tensor] = {}  # on the device, one per shape

    def tokens(self, window: float) -> TokenGrid:
        """Return where the tokens of a window are."""
        raise NotImplementedError

    def segments(self, window: float, steps: int) -> Segments:
        """Return one segment with all rows of the window."""
        return whole_window(window)

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the mean centre of each step's tokens.

        Raises:
            UsageError: a step would have no token.
        """
        return self.tokens(window).step_times(window, steps)

    def pooling(self, window: float, steps: int) -> torch.Tensor:
        """Return [steps, tokens] on the device: the matrix that averages each step's tokens. Raises as `step_times`."""
        key = (float(window), steps)
        if key not in self._pooling:
            matrix = torch.from_numpy(self.tokens(window).pooling(window, steps))
            self._pooling[key] = matrix.to(self.device, non_blocking=True)
        return self._pooling[key]


class ExampleEncoder:
    """An audio encoder that reads one example around every step.

    Attributes:
        example: frames of an example, at a hop of 10 ms; middle: seconds from its start to its middle.
    """

    kind: ClassVar[str] = "audio"
    example: int
    middle: Fraction

    def segments(self, window: float, steps: int) -> Segments:
        """Return one example per step, whose middle is within 5 ms of the step's."""
        hop = Fraction(HOP, RATE)
        times = step_centres(window, steps)
        return Segments(tuple(floor((time - self.middle) / hop + Fraction(1, 2)) for time in times), self.example)

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: (k + 1/2) window / steps."""
        return np.array([float(time) for time in step_centres(window, steps)])


class OpenSmileEncoder(WindowEncoder):
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`.

    Args:
        request: its source is a key of `SETS`.
        smile: an `opensmile.Smile` of that feature set.
    """

    front_end: ClassVar[FrontEnd] = WAVEFORM

    def __init__(self, request: Request, smile: Any) -> None:
        import opensmile

        super().__init__(request, LayerChoice())
        self.module: torch.nn.Module = torch.nn.Identity()
        self.functionals = SETS[request.source]
        self.dim = len(smile.feature_names)
        self._smile = smile
        self.identity: dict[str, Any] = {
            "encoder": "opensmile",
            "features": request.source,
            "names": list(smile.feature_names),
            "output": "functionals of the window" if self.functionals else "descriptors averaged in each step",
            "library": f"opensmile {opensmile.__version__}",
        }

    def tokens(self, window: float) -> TokenGrid:
        """Return where the descriptors of a window are: one every 10 ms, centred on 20 ms of audio."""
        return TokenGrid(Fraction(1, 100), Fraction(1, 100), whole_window(window).frames, Fraction(str(window)))

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start; the window's middle for functionals."""
        if self.functionals:
            return np.full(steps, float(Fraction(str(window)) / 2))
        return super().step_times(window, steps)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """Waveform rows [B, F, 160] -> [B, steps, dim] float32; features that openSMILE leaves undefined are 0."""
        rows = []
        members = [] if self.functionals else self.tokens(window).members(window, steps)
        for samples in samples_of(self.name, frames, window).cpu().numpy():
            values = np.nan_to_num(self._smile.process_signal(samples, RATE).to_numpy(np.float32))
            if self.functionals:
                rows.append(np.repeat(values[:1], steps, axis=0))
            else:  # fewer descriptors than intervals of 10 ms: the last one is repeated up to the window's end
                last = len(values) - 1
                rows.append(np.stack([values[np.minimum(tokens, last)].mean(axis=0) for tokens in members]))
        return torch.from_numpy(np.stack(rows)).to(self.device)


def build_opensmile(request: Request) -> OpenSmileEncoder:
    """Return the encoder of a feature set.

    Raises:
        UsageError: openSMILE is not installed, or has no such feature set.
    """
    request.refuse_weights("it has no weights")
    if request.source not in SETS:
        raise UsageError(explain("Unknown openSMILE feature set", got=request.source, choices=SETS))
    try:
        import opensmile
    except ImportError as error:
        remedy = "pip install -e '.[opensmile]' (research and private use only; see openSMILE's licence)"
        raise UsageError(explain(f"{request.name} requires openSMILE", remedy=remedy)) from error
    level = opensmile.FeatureLevel.Functionals if SETS[request.source] else opensmile.FeatureLevel.LowLevelDescriptors
    return OpenSmileEncoder(request, opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, level))


BANDS, FFT, FRAMES, WIDTH = 40, 400, 160, 256
ROWS = FRAMES + 3  # frame i is centred on sample 160 i: FFT / 2 samples before the first frame and after the last
UNUSED = ("similarity_weight", "similarity_bias")  # of the training loss


class SpeakerNetwork(nn.Module):
    """[B, 160, 40] power mel spectrogram -> [B, 256], each of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, WIDTH, 3, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Return [B, 256] for [B, 160, 40]."""
        _, (hidden, _) = self.lstm(mel)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


class ResemblyzerEncoder(ExampleEncoder):
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`. Reads one example of 1.6 s around every step."""

    front_end: ClassVar[FrontEnd] = WAVEFORM
    example, middle = ROWS, Fraction(ROWS * HOP, 2 * RATE)

    def __init__(self, request: Request, module: SpeakerNetwork) -> None:
        from torchaudio.functional import melscale_fbanks

        self.name, self.dim, self.precision = request.name, WIDTH, request.precision
        self.device = torch.device(request.device)
        self.module: nn.Module = module.eval().to(self.device, torch.float32)
        banks = melscale_fbanks(FFT // 2 + 1, 0.0, RATE / 2, BANDS, RATE, norm="slaney", mel_scale="slaney")
        self._banks, self._window = banks.to(self.device), torch.hann_window(FFT, device=self.device)
        identity = {
            "encoder": "resemblyzer",
            "weights": state_digest(module.state_dict()),
            "input": f"waveform, {FRAMES} frames of {BANDS} mel bands around each step",
            "output": "embedding of length one",
        }
        self.identity: dict[str, Any] = request.identity(identity)

    def spectrogram(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples [B, 163 * 160] -> [B, 160, 40]: librosa's mel spectrogram of the 160 frames in the middle."""
        margin = (samples.shape[1] - (FRAMES - 1) * HOP - FFT) // 2
        inner = samples[:, margin : samples.shape[1] - margin]
        spectrum = torch.stft(inner, FFT, HOP, window=self._window, center=False, return_complex=True)
        return (spectrum.abs() ** 2).transpose(1, 2) @ self._banks

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """Waveform rows [B, 163, 160], one example each -> [B, 1, 256] float32 on the encoder's device.

        Raises:
            ValueError: the rows have another shape.
        """
        if frames.ndim != 3 or tuple(frames.shape[1:]) != (ROWS, HOP):
            raise ValueError(f"{self.name}: expected a waveform [B, {ROWS}, {HOP}], got {tuple(frames.shape)}")
        mel = self.spectrogram(frames.to(self.device, torch.float32).flatten(1))
        with autocast(self.device, self.precision):
            vectors: torch.Tensor = self.module(mel)
        return vectors.to(torch.float32).unsqueeze(1)


def build_resemblyzer(request: Request) -> ResemblyzerEncoder:
    """Return the encoder with the weights of the file `request.weights`.

    Raises:
        WeightsError: the file was not given, is damaged, or does not fit.
    """
    if request.weights is None:
        wheel = "pip download --no-deps Resemblyzer==0.1.4 && unzip Resemblyzer-*.whl resemblyzer/pretrained.pt"
        problem = f"{request.name} requires --weights {request.name}=FILE"
        remedy = f"{wheel}; then pass --weights {request.name}=resemblyzer/pretrained.pt"
        raise WeightsError(explain(problem, expected="pretrained.pt of the wheel Resemblyzer 0.1.4", remedy=remedy))
    state = {key: value for key, value in read_state_dict(request.weights).items() if key not in UNUSED}
    with without_initial_weights():
        module = SpeakerNetwork()
    load_strictly(module, state, str(request.weights))
    return ResemblyzerEncoder(request, module)
