"""Audio Spectrogram Transformer through transformers: log-Mel of a window -> a sequence of vectors in time.

The last hidden state holds special tokens and frequency x time patch tokens, frequency-major. The special tokens are
dropped, the frequency axis is averaged, and the tokens centred in each step are averaged.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar

import torch

from vaflow.encoders.audio_models import WindowEncoder
from vaflow.encoders.base import KALDI, FrontEnd, LayerChoice, Request, Segments, TokenGrid, autocast, split_layers
from vaflow.encoders.huggingface_checkpoints import (
    CONFIG,
    PICKLE,
    PROCESSOR,
    SAFETENSORS,
    load_model,
    make_config,
    open_folder,
    quiet_transformers,
    read_json,
)
from vaflow.encoders.logmel import FRAME, HOP, MEL_BINS, RATE, frame_count
from vaflow.encoders.weights import state_digest
from vaflow.errors import UsageError, WeightsError, explain

AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974  # of AudioSet's log-Mel values, for checkpoints without their own
EXAMPLE = "MIT/ast-finetuned-audioset-10-10-0.4593"
MODEL_TYPE = "audio-spectrogram-transformer"
SPECIAL_TOKENS = 2  # class and distillation


@dataclass(frozen=True)
class Geometry:
    """Patches of `patch` x `patch` every `frequency_stride` bins and `time_stride` frames of [mel_bins, max_length]."""

    patch: int
    frequency_stride: int
    time_stride: int
    mel_bins: int
    max_length: int

    @classmethod
    def of(cls, module: torch.nn.Module) -> "Geometry":
        """Return the geometry of a model's patches, from its configuration."""
        config: Any = module.config
        strides = config.frequency_stride, config.time_stride
        return cls(config.patch_size, *strides, config.num_mel_bins, config.max_length)

    @property
    def frequency_tokens(self) -> int:
        """Number of patches along frequency."""
        return (self.mel_bins - self.patch) // self.frequency_stride + 1

    @property
    def tokens(self) -> TokenGrid:
        """The patches along time: a centre is halfway between its first frame's start and its last frame's end."""
        return TokenGrid(
            first=Fraction((self.patch - 1) * HOP + FRAME, 2 * RATE),
            interval=Fraction(self.time_stride * HOP, RATE),
            count=(self.max_length - self.patch) // self.time_stride + 1,
            limit=Fraction(self.max_length * HOP, RATE),
        )


def window_frames(window: float) -> int:
    """Return the number of whole log-Mel frames in a window of that many seconds (998 for 10 s)."""
    return frame_count(int(Fraction(str(window)) * RATE))


class AstEncoder(WindowEncoder):
    """An audio encoder around a model; see `vaflow.encoders.base.AudioEncoder`.

    Args:
        request: name, device and precision.
        module: transformers' ASTModel.
        mean, std: the input is normalised as (x - mean) / (2 std).

    Raises:
        UsageError: the model has no such layer, or its tokens are to be pooled in another way.
    """

    front_end: ClassVar[FrontEnd] = KALDI

    def __init__(
        self,
        request: Request,
        module: torch.nn.Module,
        mean: float,
        std: float,
        choice: LayerChoice = LayerChoice(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(request, choice)
        config: Any = module.config
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self.geometry = Geometry.of(module)
        self.dim = int(config.hidden_size)
        self._mean, self._std = mean, std
        self._numbers = choice.numbers(request.name, config.num_hidden_layers)
        self.layers = self._numbers if choice.stacked else ()
        self.identity = request.identity(self._settings(), self.layers)

    def _settings(self) -> dict[str, Any]:
        """Return plain JSON of everything that changes the output, but for stored layers and precision."""
        import transformers

        config: Any = self.module.config
        output = {"output": "last hidden state, mean over frequency, mean over the tokens centred in a step"}
        if self.choice.layers != "last":
            output = {"output": "outputs of blocks, mean over frequency and the tokens of a step"}
            output["blocks"] = self.choice.layers
        return {
            "encoder": "ast",
            "weights": state_digest(self.module.state_dict()),
            "heads": config.num_attention_heads,
            "activation": config.hidden_act,
            "layer_norm_eps": config.layer_norm_eps,
            "patch": self.geometry.patch,
            "strides": [self.geometry.frequency_stride, self.geometry.time_stride],
            "input": [self.geometry.max_length, self.geometry.mel_bins],
            "mean": self._mean,
            "std": self._std,
            "padding": "zeros before normalisation",
            "library": f"transformers {transformers.__version__.split('.')[0]}",
            **output,
        }

    def segments(self, window: float, steps: int) -> Segments:
        """Return one segment with all frames of the window."""
        return Segments((0,), window_frames(window))

    def tokens(self, window: float) -> TokenGrid:
        return self.geometry.tokens

    def features(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """As `encode`, with gradients.

        Raises:
            ValueError: the log-Mel has another shape, or more frames than the window.
            UsageError: a step would have no token.
        """
        mel = self._normalised(logmel, window)
        with autocast(self.device, self.precision):
            output = self.module(mel, **({"output_hidden_states": True} if self._numbers else {}))
        states = [output.hidden_states[n] for n in self._numbers] if self._numbers else [output.last_hidden_state]
        pooling = self.pooling(window, steps)
        return self.choice.combine([self._pooled(state, pooling) for state in states], 2)

    def _pooled(self, hidden: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        """Hidden state [B, T, D] -> [B, steps, D] float32."""
        patches = hidden[:, SPECIAL_TOKENS:].to(torch.float32)
        tokens = patches.unflatten(1, (self.geometry.frequency_tokens, self.geometry.tokens.count)).mean(dim=1)
        with torch.autocast(self.device.type, enabled=False):  # also where the caller trains in autocast
            return torch.einsum("st,btd->bsd", pooling, tokens)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, frames, mel_bins] float32, unnormalised -> [B, steps, dim] or [B, steps, layers, dim] float32.

        Windows shorter than the model's input are padded with zeros before normalisation, as in Hugging Face's
        extractor; frames beyond the model's input are dropped.
        """
        return self.features(frames, window=window, steps=steps)

    def save(self, folder: Path, stem: str) -> Path:
        """Write the folder `folder/stem`, which `build_encoder(..., weights=...)` accepts, in one rename.

        Raises:
            WeightsError: the folder cannot be written.
        """
        path = folder / stem
        new = path.with_name(f".{path.name}.{token_hex(4)}")
        processor: dict[str, float] = {"sampling_rate": RATE, "num_mel_bins": MEL_BINS, "do_normalize": True}
        processor |= {"mean": self._mean, "std": self._std}
        try:
            with quiet_transformers():
                self.module.save_pretrained(str(new))  # type: ignore[operator]
            (new / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
            if path.exists():
                shutil.rmtree(path)
            new.replace(path)
        except OSError as error:
            raise WeightsError(explain(f"Cannot write {path}", got=error.strerror)) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return path

    def _normalised(self, logmel: torch.Tensor, window: float) -> torch.Tensor:
        """[B, frames, mel] -> [B, max_length, mel], normalised, on the device."""
        most, bins = window_frames(window), self.geometry.mel_bins
        if logmel.ndim != 3 or logmel.shape[2] != bins or logmel.shape[1] > most:
            raise ValueError(
                f"{self.name}: expected log-Mel [B, at most {most}, {bins}] for a window of {window:g} s, "
                f"got {tuple(logmel.shape)}"
            )
        length = self.geometry.max_length
        mel = logmel[:, :length].to(self.device, torch.float32)
        mel = torch.nn.functional.pad(mel, (0, 0, 0, length - mel.shape[1]))
        return (mel - self._mean) / (2 * self._std)


def build(request: Request) -> AstEncoder:
    """Return the model of a local folder if it exists, else of the hub; `request.weights` wins over either.

    Raises:
        WeightsError: the folder or the hub has no such model, or its weights do not fit.
        UsageError: the model is of another kind, or requires another log-Mel.
    """
    named, choice = split_layers(request.name, request.source)
    source = named if request.weights is None else str(request.weights)
    local = request.weights is not None
    folder = open_folder(request.name, source, local=local, weight_files=(SAFETENSORS, PICKLE))
    return AstEncoder(request, *load_checkpoint(folder), choice)


def load_checkpoint(folder: Path) -> tuple[torch.nn.Module, float, float]:
    """Return the model in a folder, and the mean and deviation that its input is normalised with.

    Raises:
        WeightsError: the folder has no such model, or its weights do not fit.
        UsageError: the model is of another kind, or requires another log-Mel.
    """
    from transformers import ASTConfig, ASTModel

    values, processor = read_json(folder / CONFIG), read_json(folder / PROCESSOR, optional=True)
    _check_settings(folder, values, processor)
    config = make_config(ASTConfig, values, folder)
    weights = next((path for name in (SAFETENSORS, PICKLE) if (path := folder / name).is_file()), folder / SAFETENSORS)
    # A checkpoint for classification has a head, which the encoder does not use.
    module = load_model(ASTModel, config, folder, weights, ignored=lambda key: key.startswith("classifier."))
    if processor.get("do_normalize") is False:
        return module, 0.0, 0.5  # (x - 0) / (2 * 0.5): no change
    return module, float(processor.get("mean", AUDIOSET_MEAN)), float(processor.get("std", AUDIOSET_STD))


def _check_settings(folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    problems = []
    if config.get("model_type") != MODEL_TYPE:
        problems.append(f"model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
    if config.get("num_mel_bins", MEL_BINS) != MEL_BINS:
        problems.append(f"num_mel_bins is {config['num_mel_bins']}, the log-Mel stream has {MEL_BINS}")
    if processor.get("sampling_rate", RATE) != RATE:
        problems.append(f"sampling_rate is {processor['sampling_rate']}, the log-Mel stream has {RATE}")
    for key in ("mean", "std"):
        if not isinstance(processor.get(key, 1.0), int | float):
            problems.append(f"{key} is {processor[key]!r}, not a number")
    if problems:
        problem = f"The model in {folder} cannot be used as an audio encoder: {'; '.join(problems)}"
        raise UsageError(explain(problem, remedy=f"Use an Audio Spectrogram Transformer such as {EXAMPLE}"))
