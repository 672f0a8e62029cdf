"""Saved encoders load as equal encoders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vaflow.encoders import build_encoder
from vaflow.errors import VaflowError, WeightsError


def trained(encoder: Any) -> Any:
    """The encoder with every weight of its network moved a little."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.module.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return encoder


def random_images(edge: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, edge, edge, 3), dtype=np.uint8))


def noise(frames: int) -> torch.Tensor:
    return torch.randn(2, frames, 128, generator=torch.Generator().manual_seed(0)) * 3 - 5


def assert_same_encoders(saved: Any, first: Any, give: Any) -> None:
    """Assert that the loaded encoder gives equal features and a new identity."""
    assert saved.identity["weights"] != first.identity["weights"]
    assert {**saved.identity, "weights": ""} == {**first.identity, "weights": ""}
    assert torch.equal(give(saved), give(first))


@pytest.mark.parametrize("name", ["clip-vit-b16", "clip:ViT-B-16-quickgelu/FILE"])
def test_saving_a_clip_checkpoint_round_trips(small_clip: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "openai.safetensors"
    save_file({key: value.contiguous() for key, value in small_clip.state_dict().items()}, path)
    named = ":" in name
    name = name.replace("FILE", str(path))
    first = trained(build_encoder(name, weights=None if named else path))
    tuned = first.save(tmp_path / "made" / "here", "tuned")
    assert tuned.name == "tuned.safetensors"
    assert_same_encoders(build_encoder(name, weights=tuned), first, lambda encoder: encoder.encode(random_images(32)))


@pytest.mark.parametrize("name", ["ast", "ast:FOLDER"])
def test_saving_an_ast_directory_keeps_its_normalization(small_ast: Path, tmp_path: Path, name: str) -> None:
    named = ":" in name
    name = name.replace("FOLDER", str(small_ast))
    first: Any = trained(build_encoder(name, weights=None if named else small_ast))
    for _ in range(2):  # the second replaces the first
        tuned = first.save(tmp_path, "tuned")
    assert sorted(path.name for path in tmp_path.glob("*tuned*")) == ["tuned"]
    assert_same_encoders(build_encoder(name, weights=tuned), first, lambda e: e.encode(noise(200), window=2.5, steps=5))


def test_saving_the_tiny_encoders_round_trips(tmp_path: Path) -> None:
    clip, ast = (trained(build_encoder(name)) for name in ("clip-tiny", "ast-tiny"))
    paths = [encoder.save(tmp_path, encoder.name) for encoder in (clip, ast)]
    assert_same_encoders(
        build_encoder("clip-tiny", weights=paths[0]), clip, lambda encoder: encoder.encode(random_images(224))
    )
    assert_same_encoders(
        build_encoder("ast-tiny", weights=paths[1]), ast, lambda e: e.encode(noise(998), window=10, steps=20)
    )


def test_tiny_encoders_reject_other_sizes(small_clip: Any, small_ast: Path, tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in small_clip.state_dict().items()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="keys of another shape"):
        build_encoder("clip-tiny", weights=tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="do not fit the model"):
        build_encoder("ast-tiny", weights=small_ast)


def test_a_failed_save_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("clip-tiny", "ast-tiny"):
        encoder: Any = build_encoder(name)
        with pytest.raises(VaflowError, match="Cannot write"):
            encoder.save(tmp_path / "file" / "below", "tuned")
