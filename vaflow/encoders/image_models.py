"""Image encoders: what they share, and the models of torchvision and timm: pooled features of a face crop, or layers.

`resnet50` has torchvision's IMAGENET1K_V1 weights. The later recipe (V2) classifies better, but it smooths labels,
which makes worse features for other tasks (Kornblith et al. 2021, arXiv 2010.16402). It loads with
`--weights resnet50=FILE`, as does any ResNet-50 in torchvision's layout (timm's plain `resnet50` has the same). Crops
are resized whole to 224 pixels: torchvision's own transform resizes to 256 and crops the centre, which removes chin and
hairline of an aligned face.

`timm:MODEL[/FILE][@LAYER]` builds names in timm's own list only; `hf-hub:` and `local-dir:` names are refused. Without
FILE the published weights are read from safetensors. Size, crop, interpolation and normalisation are those of timm's
data configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor
from pathlib import Path
from typing import Any, ClassVar

import torch

from vaflow.encoders.base import LayerChoice, Request, autocast, split_layers
from vaflow.encoders.preprocessing import KERNELS, Image, Preparation, Prepared, Preprocessing
from vaflow.encoders.weights import (
    COUNTER,
    check_checksum,
    checked_url,
    hub_file,
    load_strictly,
    read_state_dict,
    state_digest,
    without_initial_weights,
)
from vaflow.errors import UsageError, WeightsError, explain, similar_names

SIZE = 224
CLASSIFIER = ("fc.weight", "fc.bias")


class ImageEncoder:
    """A visual encoder around a network; see `vaflow.encoders.base.VisualEncoder`.

    Args:
        request: name, device and precision.
        module: [B, 3, S, S] normalised -> [B, dim], or [B, layers, dim] where `layers` is set.
        preprocessing: from pixels to the network's input.
        identity: plain JSON of everything else that changes the output.
        layers: numbers of the layers, if each image has a vector of each.
    """

    kind: ClassVar[str] = "visual"

    def __init__(
        self,
        request: Request,
        module: torch.nn.Module,
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        layers: tuple[int, ...] = (),
    ) -> None:
        self.name, self.precision, self.layers = request.name, request.precision, layers
        self.preparation = preprocessing.preparation
        self.image_size = self.preparation.size
        self.identity = request.identity(identity, layers)
        self.device = torch.device(request.device)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self.parameter_count: int | None = sum(parameter.numel() for parameter in self.module.parameters())
        self._mean = torch.tensor(preprocessing.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=self.device).view(1, 3, 1, 1)
        blank = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8)
        self.dim = int(self.encode(blank).shape[-1])

    def prepare(self, image: Image) -> Prepared:
        """RGB [H, W, 3] uint8 of any size -> [S, S, 3] uint8, or float32 in 0..1: `preparation.dtype`."""
        return self.preparation(image)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """As `encode`, with gradients: [B, S, S, 3] prepared -> [B, dim] float32.

        Raises:
            ValueError: the images have another shape.
        """
        edge = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (edge, edge, 3):
            raise ValueError(f"{self.name}: expected images [B, {edge}, {edge}, 3], got {tuple(images.shape)}")
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32)
        pixels = pixels if images.is_floating_point() else pixels / 255
        pixels = (pixels - self._mean) / self._std
        with autocast(self.device, self.precision):
            vectors: torch.Tensor = self.module(pixels)
        return vectors.to(torch.float32)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] prepared, on any device -> [B, dim] or [B, layers, dim] float32 on the device."""
        return self.features(images)


class BlockOutputs(torch.nn.Module):
    """Outputs of chosen blocks of a vision transformer: [B, 3, S, S] -> [B, dim] or [B, layers, dim].

    Args:
        blocks: its blocks in order, each [B, tokens, dim] -> [B, tokens, dim].
        numbers: of the layers; 0 is the first block's input.
        choice: layers and pooling; pooling "cls" or "mean".
        special: tokens before those of the patches.

    Raises:
        TypeError: a block's output is not [B, tokens, dim].
    """

    def __init__(
        self,
        network: torch.nn.Module,
        blocks: Sequence[torch.nn.Module],
        numbers: Sequence[int],
        choice: LayerChoice,
        special: int,
    ) -> None:
        super().__init__()
        self.network = network
        self._blocks, self._numbers = tuple(blocks), tuple(numbers)  # in a tuple modules are not registered twice
        self._choice, self._special = choice, special

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] normalised -> [B, dim] or, for several layers, [B, layers, dim]."""
        states: dict[int, torch.Tensor] = {}

        def keep(number: int, tokens: Any) -> None:
            if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
                raise TypeError("a block's output is not [B, tokens, dim]")
            cls = self._choice.pooling == "cls"
            states[number] = tokens[:, 0] if cls else tokens[:, self._special :].mean(dim=1)

        hooks = [
            self._blocks[number - 1].register_forward_hook(lambda _, __, output, number=number: keep(number, output))
            for number in self._numbers
            if number
        ]
        if 0 in self._numbers:
            hooks.append(self._blocks[0].register_forward_pre_hook(lambda _, inputs: keep(0, inputs[0])))
        try:
            self.network(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return self._choice.combine([states[number] for number in self._numbers], 1)


def encode_blocks(
    request: Request,
    network: torch.nn.Module,
    blocks: Sequence[torch.nn.Module] | None,
    special: int,
    class_token: bool,
    choice: LayerChoice,
    preprocessing: Preprocessing,
    identity: Mapping[str, Any],
) -> ImageEncoder:
    """Return an encoder of chosen blocks of a vision transformer.

    Args:
        blocks: as for `BlockOutputs`; None: the network has none.
        special: number of tokens before the patches'; class_token: whether the first one is a class token.
        choice: layers and pooling; pooling defaults to "cls" with a class token, else "mean".
        identity: of the encoder of the network's output; the layers and the pooling are added.

    Raises:
        UsageError: the network has no such layers or pooling.
    """
    if not blocks:
        problem = f"{request.name} is not a transformer: it has no layers to choose"
        raise UsageError(explain(problem, got=f"@{choice.layers}"))
    pooling = choice.pooling or ("cls" if class_token else "mean")
    if choice.layers == "last" or pooling not in ("mean", *(("cls",) if class_token else ())):
        choices = ["cls", "mean"] if class_token else ["mean"]
        got = f"@{choice.layers},pool={pooling}"
        expected = "@N,pool=POOLING; the output of the network has its own pooling" if choice.layers == "last" else None
        raise UsageError(explain(f"{request.name} has no such pooling", expected=expected, got=got, choices=choices))
    numbers = choice.numbers(request.name, len(blocks))
    module = BlockOutputs(network, blocks, numbers, replace(choice, pooling=pooling), special)
    settings = {**identity, "output": "outputs of blocks", "blocks": choice.layers, "pooling": pooling}
    try:
        return ImageEncoder(request, module, preprocessing, settings, numbers if choice.stacked else ())
    except (TypeError, RuntimeError) as error:  # blocks of a convolutional network, or of different widths
        problem = f"{request.name} is not a transformer with layers of one width"
        raise UsageError(explain(problem, got=f"@{choice.layers}", remedy="Remove the layers from the name")) from error


def build_resnet(request: Request) -> ImageEncoder:
    """Return ResNet-50 with torchvision's ImageNet weights, or those of the file `request.weights`.

    Raises:
        WeightsError: the weights are unreachable, are damaged, or do not fit.
    """
    path = request.weights if request.weights is not None else checked_url(published(), encoder=request.name)
    check_checksum(path)
    weights = {key: value for key, value in read_state_dict(path).items() if key not in CLASSIFIER}
    module = bare_resnet([3, 4, 6, 3])
    load_strictly(module, weights, str(path))
    return resnet_encoder(request, "resnet50", module)


def published() -> str:
    """Return the address of the default weights."""
    from torchvision.models import ResNet50_Weights

    address: str = ResNet50_Weights.IMAGENET1K_V1.url
    return address


def bare_resnet(blocks: list[int], *, width: int = 64, expansion: int = 4) -> torch.nn.Module:
    """Return torchvision's ResNet with bottleneck blocks and no classifier; its weights must be loaded.

    Args:
        blocks: number of blocks of each stage.
        width: inner width of the first stage's blocks.
        expansion: width of a stage's output, relative to its planes (64, 128, 256, 512).

    Shapes:
        [B, 3, S, S] -> [B, 512 * expansion].
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    block = type("Bottleneck", (Bottleneck,), {"expansion": expansion})  # torchvision fixes it per class
    with without_initial_weights():
        module: torch.nn.Module = ResNet(block, blocks, width_per_group=width)
    module.fc = torch.nn.Identity()
    return module


def resnet_encoder(request: Request, model: str, module: torch.nn.Module) -> ImageEncoder:
    """Return an encoder around a network without classifier."""
    import torchvision
    from torchvision.models import ResNet50_Weights

    transform = ResNet50_Weights.IMAGENET1K_V1.transforms()
    preprocessing = Preprocessing(Preparation(SIZE, "bilinear"), tuple(transform.mean), tuple(transform.std))
    state = {key: value for key, value in module.state_dict().items() if not key.endswith(COUNTER)}
    identity: dict[str, Any] = {
        "encoder": "resnet",
        "model": model,
        "weights": state_digest(state),
        "output": "global average pool",
        "preprocessing": preprocessing.identity(),
        "library": f"torchvision {torchvision.__version__.split('.')[0]}",
    }
    return ImageEncoder(request, module, preprocessing, identity)


def build_timm(request: Request) -> ImageEncoder:
    """Return the model with its published weights, those of FILE, or `request.weights`.

    Raises:
        UsageError: timm has no such model, its preprocessing is not supported, it has no such layer, or FILE does not
            exist.
        WeightsError: the weights are unreachable, are damaged, or do not fit.
    """
    import timm

    named, choice = split_layers(request.name, request.source)
    model_name, _, file = named.partition("/")
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        remedy = similar_names(architecture, timm.list_models(), "timm.list_models() lists them")
        raise UsageError(explain("timm has no such model", got=model_name, remedy=remedy))
    tagged = not tag or model_name in timm.list_pretrained(f"{architecture}.*")
    settings = timm.get_pretrained_cfg(model_name) if tagged else None
    if settings is None:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise UsageError(explain(f"timm has no such weights of {architecture}", got=model_name, choices=tags))
    if file and request.weights is None and not Path(file).expanduser().is_file():
        remedy = f"Check the path after timm:{model_name}/"
        raise UsageError(explain(f"The weights file {file} does not exist", remedy=remedy))
    if not (request.weights or file or settings.hf_hub_id):
        remedy = "Use timm:MODEL.TAG (timm.list_pretrained() lists them) or timm:MODEL/FILE"
        raise WeightsError(explain(f"timm publishes no weights of {request.name} on the hub", remedy=remedy))
    local = request.weights or (Path(file).expanduser() if file else None)
    path = local or hub_file(settings.hf_hub_id, ("model.safetensors",), encoder=request.name)
    state = read_state_dict(path)
    with without_initial_weights():
        module = timm.create_model(architecture, pretrained=False, num_classes=0)
    heads = settings.classifier or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    target = module.state_dict()
    weights = {k: v for k, v in state.items() if k in target or not k.startswith(tuple(f"{head}." for head in heads))}
    load_strictly(module, weights, str(path))
    preprocessing = data_config(request.name, module, settings.to_dict())
    digest = state_digest({key: value for key, value in module.state_dict().items() if not key.endswith(COUNTER)})
    identity: dict[str, Any] = {
        "encoder": "timm",
        "model": architecture,
        "weights": digest,
        "output": "pooled, before the classifier",
        "preprocessing": preprocessing.identity(),
        "library": f"timm {timm.__version__.split('.')[0]}",
    }
    if choice != LayerChoice():
        return encode_blocks(request, module, *blocks_of(module), choice, preprocessing, identity)
    return ImageEncoder(request, module, preprocessing, identity)


def blocks_of(module: Any) -> tuple[Any, int, bool]:
    """Return the blocks of timm's model, the number of tokens before the patches', and whether one is a class token."""
    special = getattr(module, "num_prefix_tokens", 0)
    return getattr(module, "blocks", None), special, special > 0 and getattr(module, "cls_token", None) is not None


def data_config(name: str, module: torch.nn.Module, settings: dict[str, Any]) -> Preprocessing:
    """Return the geometry and normalisation of timm's evaluation transform.

    Raises:
        UsageError: the transform cannot be reproduced: not square, or with borders.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config({}, pretrained_cfg=settings, model=module)
    (channels, height, width), mode = config["input_size"], config["crop_mode"]
    if height != width or channels != 3 or mode not in ("center", "squash") or config["interpolation"] not in KERNELS:
        problem = f"The preprocessing of {name} is not supported"
        got = f"{config['input_size']}, {mode}, {config['interpolation']}"
        raise UsageError(explain(problem, expected="square RGB input, crop mode center or squash", got=got))
    edge = floor(height / config["crop_pct"])
    resize = "shortest" if mode == "center" else "squash"
    preparation = Preparation(height, config["interpolation"], resize, edge if edge != height else 0)
    return Preprocessing(preparation, tuple(config["mean"]), tuple(config["std"]))
