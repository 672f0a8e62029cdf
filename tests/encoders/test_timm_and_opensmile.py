"""`timm:` encoders equal timm's transform and model; `opensmile:` equals openSMILE."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from vaflow.encoders import build_encoder
from vaflow.errors import UsageError, WeightsError

MODELS = [
    "resnet10t",
    pytest.param("convnextv2_atto", marks=pytest.mark.slow),
    "vit_tiny_patch16_224",
]  # three families


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(request.param, pretrained=False).eval()
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), path)
    return request.param, model, path


def test_features_and_preprocessing_equal_timm(saved: tuple[str, Any, Path]) -> None:
    name, model, path = saved
    encoder: Any = build_encoder(f"timm:{name}/{path}")
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config, is_training=False)
    rng = np.random.default_rng(0)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = []
    for _ in range(100):
        height, width = rng.integers(60, 420, 2).tolist()
        coarse = Image.fromarray(rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        images.append(encoder.prepare(np.asarray(image)))
        pixels = (torch.from_numpy(images[-1]).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(pixels, transform(image), atol=2e-6, rtol=0)
    batch = torch.from_numpy(np.stack(images[:3]))
    pixels = (batch.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(encoder.encode(batch), expected, atol=1e-4, rtol=1e-4)
    assert encoder.dim == expected.shape[1]
    assert torch.equal(encoder.encode(batch)[[2, 0, 1]], encoder.encode(batch[[2, 0, 1]]))


def test_unknown_timm_names_are_rejected(tmp_path: Path, hub_cache: Path) -> None:
    for name in ("timm:resnet10x", "timm:local-dir:planted/x", "timm:hf-hub:org/model", "timm:resnet10t.mine"):
        with pytest.raises(UsageError, match="timm has no such"):
            build_encoder(name)
    names = {"timm:resnet18x": "resnet18", "timm:vit_bse_patch16_224": "vit_base_patch16_224"}
    names |= {"timm:resnet18.a1_in1kk": "resnet18.a1_in1k", "timm:resnet10t/./none.pt": "./none.pt does not exist"}
    for name, part in names.items():
        with pytest.raises(UsageError) as caught:
            build_encoder(name)
        assert part in str(caught.value)
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="do not fit"):
        build_encoder(f"timm:resnet10t/{tmp_path / 'w.safetensors'}")
    with pytest.raises(WeightsError, match="--weights timm:resnet10t=PATH"):
        build_encoder("timm:resnet10t")


def test_descriptors_equal_opensmile_averaged_per_step() -> None:
    opensmile = pytest.importorskip("opensmile")
    time = np.arange(4 * 16000) / 16000
    samples = (0.3 * np.sin(2 * np.pi * 180 * time**1.1)).astype(np.float32)
    encoder: Any = build_encoder("opensmile:eGeMAPSv02")
    level = opensmile.FeatureLevel.LowLevelDescriptors
    table = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, level).process_signal(samples, 16000)
    centres = table.index.get_level_values("start").total_seconds().to_numpy() + 0.01
    rows = torch.from_numpy(samples.reshape(1, 400, 160))
    encoded = encoder.encode(rows, window=4, steps=8)[0].numpy()
    assert encoded.shape == (8, 25) and encoder.dim == 25
    for step in range(7):
        inside = (centres >= 0.5 * step - 1e-9) & (centres < 0.5 * (step + 1) - 1e-9)
        np.testing.assert_allclose(encoded[step], table.to_numpy()[inside].mean(axis=0), rtol=1e-4, atol=1e-4)
    whole: Any = build_encoder("opensmile:eGeMAPSv02/functionals")
    functionals = whole.encode(rows, window=4, steps=8)[0].numpy()
    expected = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02).process_signal(samples, 16000).to_numpy()[0]
    np.testing.assert_allclose(functionals, np.tile(expected, (8, 1)), rtol=1e-5)
    assert whole.identity != encoder.identity


def test_unsupported_feature_sets_are_rejected() -> None:
    with pytest.raises(UsageError, match=r"Choices: eGeMAPSv02, eGeMAPSv02/functionals"):
        build_encoder("opensmile:ComParE_2016")
