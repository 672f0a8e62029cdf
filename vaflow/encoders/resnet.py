"""ResNet-50 through torchvision: the 2,048 pooled features of a face crop, before the classifier.

The default weights are torchvision's IMAGENET1K_V1. The later recipe (V2) classifies better, but it smooths labels,
which makes worse features for other tasks (Kornblith et al. 2021, arXiv 2010.16402). It loads with
`--weights resnet50=FILE`, as does any ResNet-50 in torchvision's layout (timm's plain `resnet50` has the same).

Crops are resized whole to 224 pixels. torchvision's own transform resizes to 256 and crops the centre, which removes
chin and hairline of an aligned face.
"""

from typing import Any

import torch

from vaflow.encoders.base import Request
from vaflow.encoders.hub import check_checksum, checked_url
from vaflow.encoders.image_encoder import ImageEncoder
from vaflow.encoders.preprocessing import Preparation, Preprocessing
from vaflow.encoders.weights import COUNTER, load_strictly, read_state_dict, state_digest, without_initial_weights

SIZE = 224
CLASSIFIER = ("fc.weight", "fc.bias")


def build(request: Request) -> ImageEncoder:
    """Return ResNet-50 with torchvision's ImageNet weights, or those of the file `request.weights`.

    Raises:
        WeightsError: the weights are unreachable, are damaged, or do not fit.
    """
    path = request.weights if request.weights is not None else checked_url(published(), encoder=request.name)
    check_checksum(path)
    weights = {key: value for key, value in read_state_dict(path).items() if key not in CLASSIFIER}
    module = bare_resnet([3, 4, 6, 3])
    load_strictly(module, weights, str(path))
    return make_encoder(request, "resnet50", module)


def published() -> str:
    """Return the address of the default weights."""
    from torchvision.models import ResNet50_Weights

    address: str = ResNet50_Weights.IMAGENET1K_V1.url
    return address


def bare_resnet(blocks: list[int], *, width: int = 64, expansion: int = 4) -> torch.nn.Module:
    """Return torchvision's ResNet with bottleneck blocks and no classifier; its weights must be loaded.

    Args:
        blocks: per stage.
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


def make_encoder(request: Request, model: str, module: torch.nn.Module) -> ImageEncoder:
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
