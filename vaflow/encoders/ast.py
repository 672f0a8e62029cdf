"""Audio Spectrogram Transformer through transformers: log-Mel of a window -> a sequence of vectors in time.

The last hidden state holds special tokens and frequency x time patch tokens, frequency-major. The special tokens are
dropped, frequency is averaged, and the tokens centred in each step are averaged.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import Request
from vaflow.encoders.ast_geometry import Geometry, window_frames
from vaflow.encoders.ast_loading import DEFAULT_MODEL, load_checkpoint, save_checkpoint
from vaflow.encoders.frontend import KALDI, FrontEnd, Stretches
from vaflow.encoders.weights import state_digest

SPECIAL_TOKENS = 2  # class and distillation


class AstEncoder:
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`."""

    kind: ClassVar[str] = "audio"
    front_end: ClassVar[FrontEnd] = KALDI

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        geometry: Geometry,
        mean: float,
        std: float,
        identity: Mapping[str, Any],
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.geometry = geometry
        self.precision = precision
        self.identity = dict(identity)
        self.mel_bins = geometry.mel_bins
        self.device = torch.device(device)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self.dim = int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._mean, self._std = mean, std

    def window_frames(self, window: float) -> int:
        """How many 10-ms log-Mel frames a window of that many seconds has before padding (998 for 10 s)."""
        return window_frames(window)

    def stretches(self, window: float, steps: int) -> Stretches:
        """All frames of the window in one stretch."""
        return Stretches((0,), self.window_frames(window))

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """[steps] seconds after the window's start: the mean centre of the tokens pooled into each step.

        Raises:
            UsageError: a step would get no token.
        """
        return self.geometry.step_times(window, steps)

    def features(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """As `encode`, with gradients.

        Raises:
            ValueError: the log-Mel has another shape, or more frames than the window.
            UsageError: a step would get no token.
        """
        tokens = self._time_tokens(self._padded(logmel, window))
        pooling = torch.from_numpy(self.geometry.pooling(window, steps)).to(self.device)
        return torch.einsum("st,btd->bsd", pooling, tokens)

    @torch.no_grad()
    def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, frames, mel_bins] float32, unnormalised -> [B, steps, dim] float32 on the encoder's device.

        Windows shorter than the model's input are padded with zeros before normalisation, as Hugging Face does; what
        is longer than its input is cut.
        """
        return self.features(logmel, window=window, steps=steps)

    def save(self, folder: Path, stem: str) -> Path:
        """Write the folder `folder/stem`, which `build_encoder(..., weights=...)` takes."""
        return save_checkpoint(self.module, self._mean, self._std, folder / stem)

    def _padded(self, logmel: torch.Tensor, window: float) -> torch.Tensor:
        """[B, frames, mel] -> [B, max_length, mel], normalised, on the device."""
        most = self.window_frames(window)
        if logmel.ndim != 3 or logmel.shape[2] != self.mel_bins or logmel.shape[1] > most:
            raise ValueError(
                f"{self.name}: expected log-Mel [B, at most {most}, {self.mel_bins}] for a window of {window:g} s, "
                f"got {tuple(logmel.shape)}"
            )
        length = self.geometry.max_length
        mel = logmel[:, :length].to(self.device, torch.float32)
        mel = torch.nn.functional.pad(mel, (0, 0, 0, length - mel.shape[1]))
        return (mel - self._mean) / (2 * self._std)

    def _time_tokens(self, mel: torch.Tensor) -> torch.Tensor:
        """[B, max_length, mel] normalised -> [B, time tokens, dim], the mean over frequency."""
        if self.precision == "float32":
            hidden = self.module(mel).last_hidden_state
        else:
            with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
                hidden = self.module(mel).last_hidden_state
        patches = hidden[:, SPECIAL_TOKENS:].to(torch.float32)
        shape = (self.geometry.frequency_tokens, self.geometry.time_tokens)
        return patches.unflatten(1, shape).mean(dim=1)


def build_default(request: Request) -> AstEncoder:
    """The AudioSet model, from the hub or from the folder `request.weights`."""
    return _load(request, DEFAULT_MODEL if request.weights is None else str(request.weights))


def build_named(request: Request) -> AstEncoder:
    """`ast:PATH_OR_HUB_ID`: a folder wins over a model id of the same name, and `request.weights` over either."""
    source = request.name.removeprefix("ast:")
    return _load(request, source if request.weights is None else str(request.weights))


def _load(request: Request, source: str) -> AstEncoder:
    checkpoint = load_checkpoint(request.name, source, local=request.weights is not None)
    return make_encoder(request, checkpoint.module, checkpoint.mean, checkpoint.std)


def make_encoder(request: Request, module: torch.nn.Module, mean: float, std: float) -> AstEncoder:
    """An encoder around a built model."""
    geometry = geometry_of(module)
    identity = _identity(module, geometry, mean, std, request.precision)
    return AstEncoder(request.name, module, geometry, mean, std, identity, request.device, request.precision)


def geometry_of(module: torch.nn.Module) -> Geometry:
    """Where a model's tokens lie: from its config, never from literals."""
    config: Any = module.config
    return Geometry(
        patch=config.patch_size,
        frequency_stride=config.frequency_stride,
        time_stride=config.time_stride,
        mel_bins=config.num_mel_bins,
        max_length=config.max_length,
    )


def _identity(module: torch.nn.Module, geometry: Geometry, mean: float, std: float, precision: str) -> dict[str, Any]:
    import transformers

    config: Any = module.config
    identity: dict[str, Any] = {
        "encoder": "ast",
        "weights": state_digest(module.state_dict()),
        "heads": config.num_attention_heads,
        "activation": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "patch": geometry.patch,
        "strides": [geometry.frequency_stride, geometry.time_stride],
        "input": [geometry.max_length, geometry.mel_bins],
        "mean": mean,
        "std": std,
        "padding": "zeros before normalisation",
        "output": "last hidden state, mean over frequency, mean over the tokens centred in a step",
        "library": f"transformers {transformers.__version__.split('.')[0]}",
    }
    if precision != "float32":
        identity["precision"] = precision
    return identity
