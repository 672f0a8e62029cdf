"""Fine-tuning's forward pass on a fake GPU: mixed devices and synchronization fail. `backward` is excluded."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vaflow.encoders import build_encoder
from vaflow.train.batch import AUDIO, VISUAL, Batch, StreamSpec
from vaflow.train.finetune.backbones import Backbone
from vaflow.train.finetune.step import Raw, TunedModel, Units
from vaflow.train.heads import VAModel
from vaflow.train.inputs import InputStream

B, F, S, WINDOW = 2, 4, 4, 4.0
CUDA = torch.device("cuda")


def move(module: torch.nn.Module) -> None:
    """Replace parameters and buffers by fake GPU tensors; called within FakeTensorMode."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device=CUDA))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=CUDA)


def backbone(name: str, kind: str, per_unit: int) -> Backbone:
    encoder: Any = build_encoder(name)
    stream = InputStream(name, kind, encoder.dim, S, "", {})
    return Backbone(stream, encoder, WINDOW, per_unit)


@pytest.mark.parametrize("missing", [False, True], ids=["all inputs", "no image"])
def test_the_forward_pass_stays_on_the_device(missing: bool) -> None:
    backbones = [backbone("clip-tiny", VISUAL, 1), backbone("ast-tiny", AUDIO, S)]
    specs = tuple(StreamSpec(b.stream.name, b.stream.kind, b.stream.dim) for b in backbones)
    model = TunedModel(VAModel(specs, torch.zeros(9, 16), hidden=16), backbones)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model)
        for each in backbones:
            for name, value in vars(each.encoder).items():
                if isinstance(value, torch.Tensor):
                    setattr(each.encoder, name, torch.empty_like(value, device=CUDA))
            each.encoder.device = CUDA
        images = None if missing else torch.zeros(3, 224, 224, 3, dtype=torch.uint8, device=CUDA)
        mel = torch.zeros(2, 398, 128, device=CUDA)
        position = torch.ones(B, S, dtype=torch.int64, device=CUDA)
        inside = torch.ones(B, F, dtype=torch.bool, device=CUDA)
        times = torch.zeros(B, F, device=CUDA)
        features = {spec.name: torch.zeros(B, S, spec.dim, device=CUDA) for spec in specs}
        batch = Batch(
            features=features,
            valid=dict.fromkeys(features, inside),
            feature_inside=dict.fromkeys(features, inside),
            feature_time=dict.fromkeys(features, times),
            inside=inside,
            time=times,
            target=torch.zeros(B, F, 2, device=CUDA),
            labelled=inside[..., None].expand(B, F, 2),
            window=torch.zeros(B, dtype=torch.int64, device=CUDA),
        )
        packed = model(Raw(batch, {"clip-tiny": Units(images, position), "ast-tiny": Units(mel, position)}))
    assert packed.device.type == "cuda"
    assert packed.shape == (B, F, 2 + 9)
