"""Image models of torchvision and timm: pooled features of a face crop before the classifier, or layers.

`resnet50` has torchvision's IMAGENET1K_V1 weights. The later recipe (V2) classifies better, but it smooths labels,
which makes worse features for other tasks (Kornblith et al. 2021, arXiv 2010.16402). It loads with
`--weights resnet50=FILE`, as does any ResNet-50 in torchvision's layout (timm's plain `resnet50` has the same). Crops
are resized whole to 224 pixels: torchvision's own transform resizes to 256 and crops the centre, which removes chin and
hairline of an aligned face.

`timm:MODEL[/FILE][@LAYER]` builds names in timm's own list only; `hf-hub:` and `local-dir:` names are refused. Without
FILE the published weights are read from safetensors. Size, crop, interpolation and normalisation are those of timm's
data configuration.
"""

from math import floor
from pathlib import Path
from typing import Any

import torch

from vaflow.encoders.base import LayerChoice, Request, split_layers
from vaflow.encoders.hub import check_checksum, checked_url, hub_file
from vaflow.encoders.network import ImageEncoder, encode_blocks
from vaflow.encoders.preprocessing import KERNELS, Preparation, Preprocessing
from vaflow.encoders.weights import COUNTER, load_strictly, read_state_dict, state_digest, without_initial_weights
from vaflow.errors import UsageError, WeightsError, explain, similar_names

SIZE = 224
CLASSIFIER = ("fc.weight", "fc.bias")


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
