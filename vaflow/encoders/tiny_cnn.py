"""Tiny twins of the convolutional encoders: the genuine classes with seeded weights, no download.

Input sizes and strides stay; depth and widths shrink. Weights are drawn as in `tiny.py`, with
the deviation that keeps a ReLU network's scale from layer to layer (He et al. 2015).
"""

import math

import torch

from vaflow.encoders import Request
from vaflow.encoders.resnet import ResNetEncoder, bare_resnet
from vaflow.encoders.resnet import make_encoder as make_resnet
from vaflow.encoders.tiny import SEED, uniform
from vaflow.encoders.vggish import VGGish, VggishEncoder
from vaflow.encoders.vggish import make_encoder as make_vggish

RESNET_BLOCKS, RESNET_WIDTH, RESNET_EXPANSION = [1, 1, 1, 1], 16, 1
VGGISH_CHANNELS, VGGISH_WIDTHS = ((16,), (32,), (48, 48), (64, 64)), (256, 256, 128)


def build_resnet(request: Request) -> ResNetEncoder:
    """The tiny ResNet.

    Raises:
        UsageError: local weights were given.
    """
    request.refuse_weights("its weights are seeded")
    module = bare_resnet(RESNET_BLOCKS, width=RESNET_WIDTH, expansion=RESNET_EXPANSION)
    seed_weights(module, "resnet-tiny")
    return make_resnet(request, "resnet-tiny", module)


def build_vggish(request: Request) -> VggishEncoder:
    """The tiny VGGish.

    Raises:
        UsageError: local weights were given.
    """
    request.refuse_weights("its weights are seeded")
    with torch.random.fork_rng():
        module = VGGish(VGGISH_CHANNELS, VGGISH_WIDTHS)
    seed_weights(module, "vggish-tiny")
    return make_vggish(request, module)


def seed_weights(module: torch.nn.Module, name: str) -> None:
    """Overwrite every convolution and dense layer: uniform, deviation sqrt(2 / fan in), biases zero.

    Batch norms stay what they are at first, the identity in evaluation mode.
    """
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.ndim > 1:
                shape = tuple(parameter.shape)
                deviation = math.sqrt(2 / math.prod(shape[1:]))
                parameter.copy_(torch.from_numpy(uniform(f"{SEED}/{name}/{key}", shape, deviation)))
            elif key.endswith("bias"):
                parameter.zero_()
