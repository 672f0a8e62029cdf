"""Speech models of transformers as encoders: wav2vec 2.0, HuBERT, WavLM, data2vec and Whisper's encoder.

The network turns a window's samples into tokens of 20 ms. The centre of a token follows from the geometry of
the convolutions in front of the transformer: token j of wav2vec 2.0 covers samples [320 j, 320 j + 400). The tokens
centred in each audio step are averaged.

Samples beyond a clip's end are zeros. A model whose processor normalises (mean 0, variance 1) gets windows normalised
one by one, as the processor does with each of its inputs.
"""

from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.base import (
    WAVEFORM,
    FrontEnd,
    Request,
    Segments,
    TokenGrid,
    samples_of,
    standardised,
    whole_window,
)
from vaflow.encoders.checkpoints import LoadedModel
from vaflow.encoders.image_encoder import autocast
from vaflow.encoders.logmel import RATE
from vaflow.errors import UsageError, explain

WHISPER_SECONDS, WHISPER_TOKEN = 30, Fraction(1, 50)
WHISPER_FFT, WHISPER_HOP = 400, 160


class SpeechEncoder:
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`.

    Raises:
        UsageError: the model has no such layer, or its processor another sampling rate.
    """

    kind: ClassVar[str] = "audio"
    front_end: ClassVar[FrontEnd] = WAVEFORM

    def __init__(self, request: Request, loaded: LoadedModel) -> None:
        config, processor, choice = loaded.module.config, loaded.processor, loaded.choice
        rate = processor.get("sampling_rate", RATE)
        if rate != RATE:
            raise UsageError(explain(f"{request.name} requires another sampling rate", expected=f"{RATE} Hz", got=rate))
        if choice.pooling not in ("", "mean"):
            problem = f"{request.name} is an audio model: its tokens are averaged in each step"
            raise UsageError(explain(problem, expected="pool=mean", got=f"pool={choice.pooling}"))
        self.name, self.precision, self.device = request.name, request.precision, torch.device(request.device)
        self.module: torch.nn.Module = loaded.module.eval().to(self.device, torch.float32)
        self._config: Any = config
        self._choice = choice
        self._is_whisper = loaded.model_type == "whisper"
        self.dim = int(config.d_model if self._is_whisper else config.hidden_size)
        self._numbers = choice.numbers(
            request.name, config.encoder_layers if self._is_whisper else config.num_hidden_layers
        )
        self.layers = loaded.stored(self._numbers)
        self._normalise = not self._is_whisper and processor.get("do_normalize", True) is True
        self._pooling: dict[tuple[float, int], torch.Tensor] = {}  # on the device, one per shape
        self._filters: torch.Tensor | None = None
        if self._is_whisper:
            from transformers import WhisperFeatureExtractor

            filters = WhisperFeatureExtractor(feature_size=config.num_mel_bins).mel_filters
            self._filters = torch.from_numpy(filters).to(self.device, torch.float32)
        waveform = f"waveform, normalised: {self._normalise}"
        read = "whisper log-mel of 30 s, padded with zeros" if self._is_whisper else waveform
        settings = loaded.identity(pooling="mean over the tokens centred in a step", input=read)
        self.identity = request.identity(settings, self.layers)

    def tokens(self, window: float) -> TokenGrid:
        """Return where the tokens of a window are."""
        if self._is_whisper:
            return TokenGrid(Fraction(0), WHISPER_TOKEN, WHISPER_SECONDS * 50, Fraction(WHISPER_SECONDS))
        field, jump, count = 1, 1, whole_window(window).frames * WAVEFORM.bins
        for kernel, stride in zip(self._config.conv_kernel, self._config.conv_stride, strict=True):
            field += (kernel - 1) * jump
            jump *= stride
            count = max(0, (count - kernel) // stride + 1)
        return TokenGrid(Fraction(field, 2 * RATE), Fraction(jump, RATE), count, Fraction(str(window)))

    def segments(self, window: float, steps: int) -> Segments:
        """Return one segment with all samples of the window."""
        return whole_window(window)

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the mean centre of each step's tokens.

        Raises:
            UsageError: a step would have no token.
        """
        return self.tokens(window).step_times(window, steps)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """Waveform rows [B, F, 160] -> [B, steps, dim] or [B, steps, layers, dim] float32 on the encoder's device.

        On the CPU, windows go through the network one by one: in a batch, the last bits of a window can depend on its
        place, because token counts are no multiples of the vector width. It takes no longer.

        Raises:
            ValueError: the rows have another shape.
            UsageError: a step would have no token.
        """
        if self.device.type == "cpu" and len(frames) > 1:
            return torch.cat([self.encode(row, window=window, steps=steps) for row in frames.split(1)])
        samples = samples_of(self.name, frames, window).to(self.device)
        if self._filters is not None:
            inputs = whisper_features(samples, self._filters)
        else:
            inputs = standardised(samples) if self._normalise else samples
        options: dict[str, Any] = {"output_hidden_states": True} if self._numbers else {}
        with autocast(self.device, self.precision):
            output = self.module(inputs, **options)
        states = [output.hidden_states[n] for n in self._numbers] if self._numbers else [output.last_hidden_state]
        tokens = torch.stack(states, dim=2).to(torch.float32)  # [B, T, layers, dim]
        if self._choice.layers == "mean":
            tokens = tokens.mean(dim=2, keepdim=True)
        key = (float(window), steps)
        if key not in self._pooling:
            matrix = torch.from_numpy(self.tokens(window).pooling(window, steps))
            self._pooling[key] = matrix.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, enabled=False):
            pooled = torch.einsum("st,btld->bsld", self._pooling[key], tokens)
        return pooled if self.layers else pooled[:, :, 0]


def whisper_features(samples: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Samples [B, n] of at most 30 s -> [B, bins, 3000], as WhisperFeatureExtractor computes it.

    Args:
        samples: at 16 kHz.
        filters: [1 + n_fft / 2, bins].
    """
    padded = torch.nn.functional.pad(samples, (0, WHISPER_SECONDS * RATE - samples.shape[1]))
    window = torch.hann_window(WHISPER_FFT, device=samples.device)
    spectrum = torch.stft(padded, WHISPER_FFT, WHISPER_HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    mel = torch.clamp(filters.T @ power, min=1e-10).log10()
    mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (mel + 4.0) / 4.0
