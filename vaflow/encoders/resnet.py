"""ResNet-50 through torchvision: the 2,048 pooled features of a face crop, before the classifier.

The default weights are torchvision's IMAGENET1K_V1. The later recipe (V2) classifies better, but it smooths labels, and
that makes worse features for other tasks (Kornblith et al. 2021, arXiv 2010.16402). It loads with
`--weights resnet50=FILE`, as does any ResNet-50 in torchvision's layout (timm's plain `resnet50` has the same).

Crops are resized whole to 224 pixels. torchvision's own transform resizes to 256 and keeps the middle, which on an
aligned face cuts off chin and hairline.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vaflow.encoders import Request
from vaflow.encoders.clip import Preprocessing
from vaflow.encoders.hub import check_checksum, checked_url
from vaflow.encoders.images import Picture, Preparation
from vaflow.encoders.weights import load_strictly, read_state_dict, state_digest

SIZE = 224
CLASSIFIER = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"  # how long training took: older files lack it, and nothing depends on it


class ResNetEncoder:
    """A visual encoder; see `vaflow.encoders.base.VisualEncoder`.

    Args:
        name: of the stream.
        module: [B, 3, S, S] normalised -> [B, dim].
        dim: length of the vector.
        preprocessing: from pixels to the network's input.
        identity: plain JSON of everything that changes the numbers.
        device, precision: where and how precisely to compute.
    """

    kind: ClassVar[str] = "visual"

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        dim: int,
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.dim = dim
        self.precision = precision
        self.preparation = preprocessing.preparation
        self.image_size = self.preparation.size
        self.identity = dict(identity)
        self.device = torch.device(device)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self._mean = torch.tensor(preprocessing.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=self.device).view(1, 3, 1, 1)

    def prepare(self, image: Picture) -> Picture:
        """RGB [H, W, 3] uint8 of any size -> [S, S, 3] uint8."""
        return self.preparation(image)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """As `encode`, with gradients.

        Raises:
            ValueError: the images have another shape.
        """
        edge = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (edge, edge, 3):
            raise ValueError(f"{self.name}: expected images [B, {edge}, {edge}, 3], got {tuple(images.shape)}")
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        pixels = (pixels - self._mean) / self._std
        if self.precision == "float32":
            return self.module(pixels)
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
            return self.module(pixels).to(torch.float32)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8, prepared, on any device -> [B, dim] float32 on the encoder's device."""
        return self.features(images)


def build_resnet50(request: Request) -> ResNetEncoder:
    """ResNet-50 with torchvision's ImageNet weights, or those of the file `request.weights`.

    Raises:
        WeightsError: the weights cannot be had, are damaged, or do not fit.
    """
    path = request.weights if request.weights is not None else checked_url(published(), encoder=request.name)
    check_checksum(path)
    state = read_state_dict(path)
    module = bare_resnet([3, 4, 6, 3])
    counters = {key: value for key, value in module.state_dict().items() if key.endswith(COUNTER)}
    weights = {key: value for key, value in state.items() if key not in CLASSIFIER}
    load_strictly(module, counters | weights, str(path))
    return make_encoder(request, "resnet50", module)


def published() -> str:
    """Address of the default weights."""
    from torchvision.models import ResNet50_Weights

    address: str = ResNet50_Weights.IMAGENET1K_V1.url
    return address


def bare_resnet(blocks: list[int], *, width: int = 64, expansion: int = 4) -> torch.nn.Module:
    """torchvision's ResNet with bottleneck blocks, fresh weights and no classifier.

    Args:
        blocks: per stage.
        width: inner width of the first stage's blocks.
        expansion: width of a stage's result, in its planes (64, 128, 256, 512).

    Returns:
        [B, 3, S, S] -> [B, 512 * expansion].
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    block = type("Bottleneck", (Bottleneck,), {"expansion": expansion})  # torchvision fixes it per class
    with torch.random.fork_rng():  # the weights are replaced: leave the caller's random numbers alone
        module: torch.nn.Module = ResNet(block, blocks, width_per_group=width)
    module.fc = torch.nn.Identity()
    return module


def make_encoder(request: Request, model: str, module: torch.nn.Module) -> ResNetEncoder:
    """An encoder around a built network without classifier."""
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
    if request.precision != "float32":
        identity["precision"] = request.precision
    dim = int(module.layer4[-1].conv3.out_channels)  # type: ignore[index, union-attr]
    return ResNetEncoder(request.name, module, dim, preprocessing, identity, request.device, request.precision)
