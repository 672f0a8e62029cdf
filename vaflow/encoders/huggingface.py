"""Models of transformers as encoders, `hf:REPO_OR_PATH[@LAYER]`: the entry point, and the image models.

`vaflow.encoders.speech` has the audio models, `vaflow.encoders.checkpoints` the list of both.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vaflow.encoders.base import AudioEncoder, Request, VisualEncoder
from vaflow.encoders.checkpoints import FAMILIES, LoadedModel, load
from vaflow.encoders.image_encoder import ImageEncoder
from vaflow.encoders.layers import LayerChoice
from vaflow.encoders.preprocessing import KERNELS, Preparation, Preprocessing
from vaflow.encoders.speech import SpeechEncoder
from vaflow.errors import UsageError, explain


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
        layers = torch.stack([self._pooled(output.hidden_states[number]) for number in self.numbers], dim=1)
        if self.choice.layers == "mean":
            return layers.mean(dim=1)
        return layers if len(self.numbers) > 1 else layers[:, 0]

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim == 4:
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, self.special :].mean(dim=1)


def make_encoder(request: Request, loaded: LoadedModel) -> ImageEncoder:
    """Return an image encoder around a loaded model.

    Raises:
        UsageError: the model has no such layer or pooling, or its images are not square.
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
        raise UsageError(
            explain(f"{request.name} has no such pooling for these layers", got=f"pool={pooling}", choices=allowed)
        )
    preprocessing = image_preprocessing(request.name, loaded.processor, family.processor)
    size, expected = preprocessing.preparation.size, getattr(config, "image_size", None)
    if isinstance(expected, int) and expected != size and not loaded.model_type.startswith("dino"):
        problem = f"The image processor and the network of {request.name} disagree on the image size"
        raise UsageError(explain(problem, expected=f"{expected} pixels", got=f"{size} pixels"))
    network = ImageNetwork(loaded.module, loaded.model_type, choice, numbers, pooling)
    identity = loaded.identity(pooling=pooling, preprocessing=preprocessing.identity())
    return ImageEncoder(request, network, preprocessing, identity, loaded.stored(numbers))


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
        size, crop = processor.size, getattr(processor, "crop_size", None)
        resample = getattr(processor, "resample", None)
        kernel = Resampling(2 if resample is None else int(resample)).name.lower()
        mean, std = tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
        factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(explain(f"The image processor of {name} has invalid settings", got=error)) from error
    target = size.get("shortest_edge") or size.get("height")
    square = size.get("shortest_edge") is not None or size.get("height") == size.get("width")
    cropped = bool(getattr(processor, "do_center_crop", False)) and crop is not None
    mode, edge = ("shortest" if size.get("shortest_edge") else "squash"), target
    final = crop.get("height") if cropped and crop is not None else target
    if kind == "ConvNextImageProcessor":
        mode, edge = ("shortest", int(target / processor.crop_pct)) if target < 384 else ("squash", target)
        cropped = True
    if not processor.do_resize or not square or not target or (mode == "shortest" and not cropped):
        raise UsageError(explain(f"The image processor of {name} does not give squares of one size", got=dict(size)))
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
