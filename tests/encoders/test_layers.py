"""`@LAYER` after the names of built-in transformers and of timm's; `hf:` has its own tests in test_huggingface."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from vaflow.encoders import build_encoder
from vaflow.encoders.base import with_layers
from vaflow.errors import UsageError


def build(name: str) -> Any:
    return build_encoder(name)


def random_images(count: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 224, 224, 3), np.uint8))


def timm_model(name: str, folder: Path) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model(name, pretrained=False).state_dict(), folder / f"{name}.safetensors")
    return f"timm:{name}/{folder / name}.safetensors"


def normalised(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    return (images.permute(0, 3, 1, 2) / 255 - encoder._mean) / encoder._std


@torch.no_grad()
def test_clip_layers_equal_block_outputs() -> None:
    """The oracle is open_clip's own function for intermediate outputs."""
    whole, every = build("clip-tiny"), build("clip-tiny@all")
    options = {"output_fmt": "NLC", "output_extra_tokens": True, "intermediates_only": True}
    output = whole.module.forward_intermediates(normalised(whole, random_images()), **options)
    classes = torch.stack([tokens[:, 0] for tokens in output["image_intermediates_prefix"]], dim=1)
    encoded = every.encode(random_images())
    assert every.layers == (0, 1, 2) and every.identity["layers"] == [0, 1, 2] and encoded.shape == (2, 3, every.dim)
    torch.testing.assert_close(encoded[:, 1:], classes)
    assert torch.equal(build("clip-tiny@2").encode(random_images()), encoded[:, 2])
    torch.testing.assert_close(build("clip-tiny@mean").encode(random_images()), encoded.mean(dim=1))
    patches = output["image_intermediates"][0].mean(dim=1)
    torch.testing.assert_close(build("clip-tiny@1,pool=mean").encode(random_images()), patches)
    assert not hasattr(every, "encode_text"), "blocks are not in the space of the text tower"
    assert build("clip-tiny@last").identity == whole.identity


@torch.no_grad()
def test_timm_layers_equal_block_outputs(tmp_path: Path) -> None:
    name = timm_model("vit_tiny_patch16_224", tmp_path)
    encoder = build(f"{name}@6-8")
    network = encoder.module.network
    options = {"indices": [5, 6, 7], "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
    output = network.forward_intermediates(normalised(encoder, random_images()), **options)
    expected = torch.stack([prefix[:, 0] for _, prefix in output], dim=1)
    assert encoder.layers == (6, 7, 8)
    torch.testing.assert_close(encoder.encode(random_images()), expected)
    with pytest.raises(UsageError, match=r"no such layer.*to 12.*@13"):
        build(f"{name}@13")


@torch.no_grad()
def test_layers_of_ast_are_pooled_like_its_output() -> None:
    whole, both = build("ast-tiny"), build("ast-tiny@1-2")
    frames = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 398, 128)).astype(np.float32))
    encoded = both.encode(frames, window=4, steps=4)
    assert both.layers == (1, 2) and encoded.shape == (1, 4, 2, both.dim) and both.identity["layers"] == [1, 2]
    length, mean, std = both.geometry.max_length, both.identity["mean"], both.identity["std"]
    padded = torch.nn.functional.pad(frames, (0, 0, 0, length - frames.shape[1]))
    hidden = both.module((padded - mean) / (2 * std), output_hidden_states=True).hidden_states[1][0, 2:]
    tokens = hidden.unflatten(0, (whole.geometry.frequency_tokens, -1)).mean(dim=0)
    for step, members in enumerate(whole.geometry.tokens.members(4, 4)):
        torch.testing.assert_close(encoded[0, step, 0], tokens[members].mean(dim=0))
    mean = build("ast-tiny@mean").encode(frames, window=4, steps=4)
    torch.testing.assert_close(mean, build("ast-tiny@all").encode(frames, window=4, steps=4).mean(dim=2))
    np.testing.assert_array_equal(both.step_times(4, 4), whole.step_times(4, 4))


@pytest.mark.parametrize("name", ["resnet-tiny@1", "vggish-tiny@all", "resnet50@2", "opensmile:eGeMAPSv02@mean"])
def test_networks_without_layers_are_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="has no layers to choose"):
        build_encoder(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip-tiny@3", r"no such layer.*0 \(embeddings\) to 2"),
        ("ast-tiny@3", r"no such layer.*0 \(embeddings\) to 2"),
        ("clip-tiny@1,pool=pooler", "no such pooling.*Choices: cls, mean"),
        ("clip-tiny@pool=mean", "output of the network has its own pooling"),
        ("ast-tiny@1,pool=cls", "averaged in each step"),
    ],
)
def test_unknown_layers_and_poolings_are_rejected(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_encoder(name)


@pytest.mark.parametrize("model", ["resnet10t", "efficientnet_lite0"])
def test_convolutional_networks_of_timm_have_no_layers(model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a transformer"):
        build_encoder(f"{timm_model(model, tmp_path)}@1")


def test_layers_option_applies_to_transformers_only() -> None:
    for name in ("clip-vit-b16", "ast", "hf:org/model", "timm:vit_tiny", "clip:ViT-B-16/openai", "ast-tiny"):
        assert with_layers(name, "6-12") == f"{name}@6-12"
    for name in ("resnet50", "vggish", "onnx:a.onnx", "opensmile:eGeMAPSv02", "logmel", "clip-tiny@2", "none"):
        assert with_layers(name, "6-12") == name
