"""Forward passes of large families on a fake GPU: no mixed devices, no synchronization.

FakeTensorMode runs shapes and devices without a GPU; `.item()` and mixed devices fail.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import AUDIO_MODELS, IMAGES
from torch._subclasses.fake_tensor import FakeTensorMode

from vaflow.encoders import build_encoder

CUDA = torch.device("cuda")


def moved(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(CUDA)


def to_cuda(encoder: Any) -> None:
    """`Encoder(device="cuda")` for an encoder that is built already; called within FakeTensorMode."""
    encoder.device = CUDA
    for part in encoder.module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(moved(value), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else moved(buffer)
    for name in ("_mean", "_std", "_filters"):
        if isinstance(getattr(encoder, name, None), torch.Tensor):
            setattr(encoder, name, moved(getattr(encoder, name)))


@pytest.mark.parametrize("name", [*IMAGES, *AUDIO_MODELS])
@pytest.mark.parametrize("suffix", ["", "@2", "@0-2"])
def test_a_forward_pass_stays_on_the_device(checkpoints: Mapping[str, Path], name: str, suffix: str) -> None:
    if name == "convnextv2" and suffix == "@0-2":
        pytest.skip("its stages have different widths")
    encoder: Any = build_encoder(f"hf:{checkpoints[name]}{suffix}")
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_cuda(encoder)
        if name in IMAGES:
            output = encoder.encode(torch.zeros(2, 224, 224, 3, dtype=torch.uint8))
        else:
            output = encoder.encode(torch.zeros(2, 400, 160), window=4, steps=8)
    assert output.device.type == "cuda" and output.shape[-1] == encoder.dim
