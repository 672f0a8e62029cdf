"""ResNet-50 equals torchvision's forward pass, loaded through the code for real weights."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import fake_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vaflow.encoders import build_encoder, image_models
from vaflow.encoders.image_models import ImageEncoder
from vaflow.errors import UsageError, WeightsError


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    """torchvision's ResNet-50 with random weights and statistics that are not the identity."""
    from torchvision.models import resnet50

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet50(weights=None)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(original: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision publishes it: classifier included, its SHA-256 in its name."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.save(original.state_dict(), folder / "plain.pth")
    digest = sha256((folder / "plain.pth").read_bytes()).hexdigest()
    return (folder / "plain.pth").rename(folder / f"resnet50-{digest[:8]}.pth")


def random_images(count: int = 2) -> np.ndarray:
    """[N, 112, 112, 3]: crops as Aff-Wild2 has them."""
    small = np.random.default_rng(0).integers(0, 255, (count, 9, 9, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((112, 112))) for p in small])


def test_features_equal_the_torchvision_pooled_output(original: torch.nn.Module, checkpoint: Path) -> None:
    from torchvision.transforms import functional as transforms

    encoder: Any = build_encoder("resnet50", weights=checkpoint)
    pooled: list[torch.Tensor] = []
    hook = original.avgpool.register_forward_hook(lambda module, inputs, out: pooled.append(out.flatten(1)))  # type: ignore[union-attr]
    for image in random_images():
        tensor = transforms.to_tensor(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))
        with torch.no_grad():
            original(transforms.normalize(tensor, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None])
    hook.remove()
    prepared = torch.from_numpy(np.stack([encoder.prepare(image) for image in random_images()]))
    features = encoder.encode(prepared)
    assert features.shape == (2, 2048) and encoder.dim == 2048 and features.dtype == torch.float32
    torch.testing.assert_close(features, torch.cat(pooled), rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-2


def test_weights_without_counters_or_classifier_have_the_same_identity(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    bare = {key: value for key, value in state.items() if not key.endswith(image_models.COUNTER) and "fc." not in key}
    save_file(bare, tmp_path / "bare.safetensors")
    identities = [
        build_encoder("resnet50", weights=path).identity for path in (checkpoint, tmp_path / "bare.safetensors")
    ]
    assert identities[0] == identities[1]
    changed = bare | {"conv1.weight": bare["conv1.weight"] + 1e-3}
    save_file(changed, tmp_path / "changed.safetensors")
    assert build_encoder("resnet50", weights=tmp_path / "changed.safetensors").identity != identities[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer4.2.bn3.running_var": None}, "1 missing keys: layer4.2.bn3.running_var"),
        ({"layer5.0.conv1.weight": torch.zeros(1)}, "1 unexpected keys: layer5.0.conv1.weight"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, "keys of another shape"),
        ({"bn1.bias": torch.full((64,), float("nan"))}, "NaN"),
    ],
)
def test_mismatched_weights_are_rejected(checkpoint: Path, tmp_path: Path, change: dict, message: str) -> None:
    state = torch.load(checkpoint, weights_only=True) | change
    path = tmp_path / "bad.safetensors"
    save_file({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(WeightsError, match=message):
        build_encoder("resnet50", weights=path)


def test_a_damaged_file_is_detected_by_its_checksum(checkpoint: Path, tmp_path: Path) -> None:
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / checkpoint.name).write_bytes(damaged)
    with pytest.raises(WeightsError, match="SHA-256 that begins with"):
        build_encoder("resnet50", weights=tmp_path / checkpoint.name)


def test_published_weights_are_downloaded_verified_and_cached(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    content = checkpoint.read_bytes()
    with fake_hub.serve({checkpoint.name: content, "resnet50-00000000.pth": content}) as address:
        monkeypatch.setattr(image_models, "published", lambda: f"{address}/{checkpoint.name}")
        first = build_encoder("resnet50").identity
        monkeypatch.setattr(image_models, "published", lambda: f"{address}/resnet50-00000000.pth")
        with pytest.raises(WeightsError, match="invalid hash value"):
            build_encoder("resnet50")
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert kept == [checkpoint.name]
    monkeypatch.setattr(image_models, "published", lambda: f"{address}/{checkpoint.name}")  # the server is stopped
    assert build_encoder("resnet50").identity == first


def test_an_unresponsive_address_is_reported_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(image_models, "published", lambda: "http://127.0.0.1:9/resnet50-0676ba61.pth")
    with pytest.raises(WeightsError, match="--weights resnet50=PATH"):
        build_encoder("resnet50")


def test_the_published_address_contains_the_checksum() -> None:
    from vaflow.encoders.weights import checksum_in_name

    name = image_models.published().rsplit("/", 1)[-1]
    assert name.startswith("resnet50-") and checksum_in_name(name) == name.removeprefix("resnet50-").removesuffix(
        ".pth"
    )


def test_the_tiny_encoder_is_reproducible_and_separates_images() -> None:
    state = torch.random.get_rng_state()
    one, other = build_encoder("resnet-tiny"), build_encoder("resnet-tiny")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.identity == other.identity and type(one) is ImageEncoder
    images = torch.from_numpy(np.stack([one.prepare(p) for p in random_images()]))
    features = one.encode(images)
    assert features.shape == (2, one.dim) and features.isfinite().all()
    assert (features[0] - features[1]).abs().mean() > 0.01 * features.abs().mean()
    with pytest.raises(UsageError, match="seeded"):
        build_encoder("resnet-tiny", weights=Path("x.pth"))


def test_other_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"224, 224, 3\], got \(1, 112, 112, 3\)"):
        build_encoder("resnet-tiny").encode(torch.zeros(1, 112, 112, 3, dtype=torch.uint8))  # type: ignore[call-arg]
