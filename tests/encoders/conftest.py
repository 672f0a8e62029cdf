"""Small checkpoints in the original key layouts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SMALL_AST: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_length": 256,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny checkpoint of every supported model type of transformers, shared by all tests."""
    from tiny_checkpoints import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub that refuses every connection."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return cache


@pytest.fixture
def small_clip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Patch open_clip so that ViT-B-16 and its quickgelu variant are small; yield it seeded, with QuickGELU."""
    import open_clip
    from open_clip import factory

    for name, quick in (("ViT-B-16", False), ("ViT-B-16-quickgelu", True)):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, {**SMALL_CLIP, "quick_gelu": quick})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield open_clip.CLIP(**SMALL_CLIP, quick_gelu=True).eval()


@pytest.fixture
def small_ast(tmp_path: Path) -> Path:
    """The folder of a small model for audio classification, as save_pretrained writes it."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path / "ast"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ASTForAudioClassification(ASTConfig(**SMALL_AST, num_labels=5))
        with torch.no_grad():
            model.audio_spectrogram_transformer.embeddings.position_embeddings.normal_(std=0.2)
    model.save_pretrained(folder)
    ASTFeatureExtractor(mean=-3.5, std=2.25, max_length=SMALL_AST["max_length"]).save_pretrained(folder)
    return folder
