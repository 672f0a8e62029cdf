"""Models of transformers as encoders, `hf:REPO_OR_PATH[@LAYER]`: image models, and speech models.

The speech models are wav2vec 2.0, HuBERT, WavLM, data2vec and Whisper's encoder. The network turns a window's samples
into tokens of 20 ms, and the tokens centred in each audio step are averaged. The centre of a token follows from the
geometry of the convolutions in front of the transformer: token j of wav2vec 2.0 covers samples [320 j, 320 j + 400).

Samples beyond a clip's end are zeros. A model whose processor normalises (mean 0, variance 1) gets windows normalised
one by one, as the processor does with each of its inputs.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import nn

from vaflow.encoders.audio_models import WindowEncoder
from vaflow.encoders.base import (
    WAVEFORM,
    AudioEncoder,
    FrontEnd,
    LayerChoice,
    Request,
    TokenGrid,
    VisualEncoder,
    autocast,
    samples_of,
    standardised,
    whole_window,
)
from vaflow.encoders.huggingface_checkpoints import FAMILIES, LoadedModel, load
from vaflow.encoders.image_models import ImageEncoder
from vaflow.encoders.logmel import RATE
from vaflow.encoders.preprocessing import KERNELS, LARGEST, Preparation, Preprocessing
from vaflow.errors import UsageError, WeightsError, explain, is_out_of_memory


def build(request: Request) -> VisualEncoder | AudioEncoder:
    """Return the encoder of a folder or a model id; `request.weights` is a folder that wins over either.

    Raises:
        UsageError: the model is not of a supported family or of another kind, or has no such layer.
        WeightsError: the model is missing, restricted or damaged, or has no safetensors.
    """
    loaded = load(request)
    if loaded.family.kind == "audio":
        return SpeechEncoder(request, loaded)
    return make_encoder(request, loaded)


class ImageNetwork(nn.Module):
    """A model of transformers with its layers and pooling chosen: [B, 3, S, S] -> [B, dim] or [B, layers, dim].

    Args:
        numbers: of the layers; () for the network's output.
        pooling: "cls", "pooler" or "mean".
    """

    def __init__(self, model: Any, model_type: str, choice: LayerChoice, numbers: tuple[int, ...], pooling: str):
        super().__init__()
        self.model = model
        self.choice, self.numbers, self.pooling = choice, numbers, pooling
        registers = getattr(model.config, "num_register_tokens", 0) or 0
        self.special = FAMILIES[model_type].special + registers
        self.masked = model_type == "vit_mae"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] normalised -> [B, dim] or, for several layers, [B, layers, dim]."""
        options: dict[str, Any] = {"output_hidden_states": True} if self.numbers else {}
        if self.masked:  # noise decides the order of the patches: ascending noise keeps it
            patches = (self.model.config.image_size // self.model.config.patch_size) ** 2
            options["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        output = self.model(pixel_values=pixels, **options)
        if not self.numbers:
            if self.pooling == "pooler":
                pooled: torch.Tensor = output.pooler_output.flatten(1)
                return pooled
            return self._pooled(output.last_hidden_state)
        return self.choice.combine([self._pooled(output.hidden_states[number]) for number in self.numbers], 1)

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim == 4:
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, self.special :].mean(dim=1)


def make_encoder(request: Request, loaded: LoadedModel) -> ImageEncoder:
    """Return an image encoder around a loaded model.

    Raises:
        UsageError: the model has no such layer or pooling, or its images are not square.
        WeightsError: the model does not run on images of the processor's size.
    """
    config, family, choice = loaded.module.config, loaded.family, loaded.choice
    stages = hasattr(config, "hidden_sizes") and hasattr(config, "depths")
    numbers = choice.numbers(request.name, len(config.depths) if stages else config.num_hidden_layers)
    if stages and len(numbers) > 1:
        raise UsageError(explain(f"The stages of {request.name} have different widths", expected="@N or @last"))
    pooling = choice.pooling or (family.layer_pooling if numbers else family.pooling)
    allowed = {"mean"} | ({"cls"} if family.special else set())
    allowed |= {"pooler"} if family.pooling == "pooler" and not numbers else set()
    if pooling not in allowed:
        problem = f"{request.name} has no such pooling for these layers"
        raise UsageError(explain(problem, got=f"pool={pooling}", choices=allowed))
    preprocessing = image_preprocessing(request.name, loaded.processor, family.processor)
    size, expected = preprocessing.preparation.size, getattr(config, "image_size", None)
    if isinstance(expected, int) and expected != size and not loaded.model_type.startswith("dino"):
        problem = f"The image processor and the network of {request.name} disagree on the image size"
        raise UsageError(explain(problem, expected=f"{expected} pixels", got=f"{size} pixels"))
    network = ImageNetwork(loaded.module, loaded.model_type, choice, numbers, pooling)
    identity = loaded.identity(pooling=pooling, preprocessing=preprocessing.identity())
    try:
        return ImageEncoder(request, network, preprocessing, identity, loaded.stored(numbers))
    except (RuntimeError, ValueError) as error:  # settings that contradict each other
        if is_out_of_memory(error):
            raise
        problem = f"The model of {request.name} does not encode images of {size} pixels"
        raise WeightsError(explain(problem, got=str(error).splitlines()[0])) from error


PROCESSORS = {family.processor for family in FAMILIES.values() if family.processor}
FLOAT_PROCESSORS = {"DINOv3ViTImageProcessor"}  # divide by 255 before they resize; the others resize bytes with Pillow


def image_preprocessing(name: str, settings: Mapping[str, Any], default: str) -> Preprocessing:
    """Return a processor's resizing, crop and normalisation, with the defaults of its class.

    Raises:
        UsageError: the processor is not one of `PROCESSORS`, or does what cannot be reproduced.
    """
    import transformers
    from PIL.Image import Resampling

    kind = str(settings.get("image_processor_type") or default).removesuffix("Fast").removesuffix("Pil")
    if kind not in PROCESSORS:
        raise UsageError(explain(f"The image processor of {name} is not supported", got=kind, choices=PROCESSORS))
    keys: tuple[str, ...] = (
        "size",
        "crop_size",
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "do_normalize",
        "rescale_factor",
    )
    keys += ("image_mean", "image_std", "resample", "crop_pct")
    try:
        processor: Any = getattr(transformers, kind)(**{key: settings[key] for key in keys if key in settings})
        size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
        crop_pct = getattr(processor, "crop_pct", None)
        resample = getattr(processor, "resample", None)
        kernel = Resampling(2 if resample is None else int(resample)).name.lower()
        mean, std = tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
        factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
        edges = [edge for edge in (*size.values(), *crop.values()) if edge is not None]
        if not all(type(edge) is int and 0 < edge <= LARGEST for edge in edges):
            raise ValueError(f"sizes {size} and {crop}, not pixels from 1 to {LARGEST}")
        if crop_pct is not None and not 0.1 <= crop_pct <= 1:
            raise ValueError(f"crop_pct {crop_pct}, not a share from 0.1 to 1")
        if len(mean) != 3 or len(std) != 3 or not all(map(isfinite, (*mean, *std))) or not all(std):
            raise ValueError(f"mean {mean} and std {std}, not three numbers each, std not 0")
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UsageError(explain(f"The image processor of {name} has invalid settings", got=error)) from error
    target: Any = size.get("shortest_edge") or size.get("height")
    square = size.get("shortest_edge") is not None or size.get("height") == size.get("width")
    square = square and crop.get("height") == crop.get("width")
    cropped = bool(getattr(processor, "do_center_crop", False)) and bool(crop)
    mode, edge = ("shortest" if size.get("shortest_edge") else "squash"), target
    final: Any = crop.get("height") if cropped else target
    if kind == "ConvNextImageProcessor" and target and crop_pct:
        mode, edge = ("shortest", int(target / crop_pct)) if target < 384 else ("squash", target)
        cropped = True
    if not processor.do_resize or not square or not target or not final or (mode == "shortest" and not cropped):
        raise UsageError(explain(f"The image processor of {name} does not give squares of one size", got=size))
    if abs(factor - 1 / 255) > 1e-9 or kernel not in KERNELS:
        problem = f"The image processor of {name} is not supported"
        raise UsageError(explain(problem, expected="values divided by 255", got=f"factor {factor:g}, {kernel}"))
    if not processor.do_normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    dtype = "float32" if kind in FLOAT_PROCESSORS else "uint8"
    if dtype == "float32" and kernel not in ("bilinear", "bicubic"):
        problem = f"The image processor of {name} is not supported"
        raise UsageError(explain(problem, got=f"{kernel} resampling", choices=("bilinear", "bicubic")))
    edge = int(edge) if edge != final else 0
    return Preprocessing(Preparation(int(final), kernel, mode, edge, "floor", dtype), mean, std)


WHISPER_SECONDS, WHISPER_TOKEN = 30, Fraction(1, 50)
WHISPER_FFT, WHISPER_HOP = 400, 160


class SpeechEncoder(WindowEncoder):
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`.

    Raises:
        UsageError: the model has no such layer, or its processor another sampling rate.
        WeightsError: its convolutions have no stride.
    """

    front_end: ClassVar[FrontEnd] = WAVEFORM

    def __init__(self, request: Request, loaded: LoadedModel) -> None:
        config, processor, choice = loaded.module.config, loaded.processor, loaded.choice
        rate = processor.get("sampling_rate", RATE)
        if rate != RATE:
            raise UsageError(explain(f"{request.name} requires another sampling rate", expected=f"{RATE} Hz", got=rate))
        if min(getattr(config, "conv_stride", ()), default=1) < 1:
            got = f"conv_stride {list(config.conv_stride)}"
            raise WeightsError(explain(f"The model of {request.name} does not load", expected="strides >= 1", got=got))
        super().__init__(request, choice)
        self.module: torch.nn.Module = loaded.module.eval().to(self.device, torch.float32)
        self._config: Any = config
        self._is_whisper = loaded.model_type == "whisper"
        self.dim = int(config.d_model if self._is_whisper else config.hidden_size)
        self._numbers = choice.numbers(
            request.name, config.encoder_layers if self._is_whisper else config.num_hidden_layers
        )
        self.layers = loaded.stored(self._numbers)
        self._normalise = not self._is_whisper and processor.get("do_normalize", True) is True
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
        if self._is_whisper:
            return TokenGrid(Fraction(0), WHISPER_TOKEN, WHISPER_SECONDS * 50, Fraction(WHISPER_SECONDS))
        field, jump, count = 1, 1, whole_window(window).frames * WAVEFORM.bins
        for kernel, stride in zip(self._config.conv_kernel, self._config.conv_stride, strict=True):
            field += (kernel - 1) * jump
            jump *= stride
            count = max(0, (count - kernel) // stride + 1)
        return TokenGrid(Fraction(field, 2 * RATE), Fraction(jump, RATE), count, Fraction(str(window)))

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
        if self.choice.layers == "mean":
            tokens = tokens.mean(dim=2, keepdim=True)
        pooling = self.pooling(window, steps)
        with torch.autocast(self.device.type, enabled=False):
            pooled = torch.einsum("st,btld->bsld", pooling, tokens)
        return pooled if self.layers else pooled[:, :, 0]


def whisper_features(samples: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Return the log-Mel [B, bins, 3000] of samples [B, n], as WhisperFeatureExtractor computes it.

    Args:
        samples: at most 30 s at 16 kHz.
        filters: [1 + n_fft / 2, bins].
    """
    padded = torch.nn.functional.pad(samples, (0, WHISPER_SECONDS * RATE - samples.shape[1]))
    window = torch.hann_window(WHISPER_FFT, device=samples.device)
    spectrum = torch.stft(padded, WHISPER_FFT, WHISPER_HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    mel = torch.clamp(filters.T @ power, min=1e-10).log10()
    mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (mel + 4.0) / 4.0
