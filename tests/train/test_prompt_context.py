"""Training with context vectors: prototypes follow them, are stored with the run, and need no text tower later."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_cache import Toy, make_cache

from vaflow.cache import Cache
from vaflow.cache.schema import StreamInfo
from vaflow.encoders import build_encoder, context_tower
from vaflow.encoders.prompts import load_prompts, prototypes
from vaflow.errors import FingerprintError, UsageError
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import evaluate_run
from vaflow.train.heads.layers import PromptHead
from vaflow.train.run_folder import load_run
from vaflow.train.train_run import train_run

CONFIG = TrainConfig(
    hidden=16, lr=3e-3, batch_size=8, epochs=2, device="cpu", text="clip-tiny.text", prompt_context=3, kl_weight=1.0
)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return build_encoder("clip-tiny")


def with_prompts(cache: Cache, encoder: Any, **identity: str) -> Cache:
    """The cache with prototypes of the seeded CLIP, as after extraction."""
    prompt_set = load_prompts()
    embedding, template = prototypes(encoder, prompt_set)
    cache.declare(StreamInfo("clip-tiny.text", "text", encoder.dim, "float32", encoder.identity | identity))
    source = {"prompts": prompt_set.identity()}
    cache.write("clip-tiny.text", "default", {"embedding": embedding, "template": template}, source=source)
    return cache


@pytest.fixture(scope="module")
def cache(encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    toy = Toy(seconds=(6, 9), splits={"train": 3, "val": 2}, text=False)
    return with_prompts(make_cache(tmp_path_factory.mktemp("context") / "cache", toy), encoder)


def train(cache: Cache, config: TrainConfig, out: Path) -> Any:
    return train_run(cache, config, out, tensorboard=False, figures=False)


def test_a_run_trains_and_stores_its_context_vectors(cache: Cache, encoder: Any, tmp_path: Path) -> None:
    result = train(cache, CONFIG, tmp_path / "run")
    head = load_run(tmp_path / "run").model.prompt
    assert head is not None and head.context is not None and head.context.shape == (3, 128)
    tower = context_tower(encoder, load_prompts().descriptions, 3)
    torch.testing.assert_close(head.prototypes, tower(head.context.detach()))
    short = train(cache, replace(CONFIG, lr=1e-9), tmp_path / "still")
    start = load_run(tmp_path / "still").model.prompt
    assert start is not None and (start.context - head.context).abs().max() > 1e-3, "the context vectors did not change"  # type: ignore[operator]
    assert short.metrics["epochs"] == 2
    assert evaluate_run(tmp_path / "run", cache, device="cpu")["ccc"] == result.metrics["ccc"]


def test_an_encoder_different_from_the_cache_is_rejected(encoder: Any, tmp_path: Path) -> None:
    toy = Toy(seconds=(6, 7), splits={"train": 1, "val": 1}, text=False)
    other = with_prompts(make_cache(tmp_path / "cache", toy), encoder, weights="others")
    with pytest.raises(FingerprintError, match="text_weights"):
        train(other, CONFIG, tmp_path / "run")


def test_prompts_without_text_are_rejected(tmp_path: Path) -> None:
    toy = make_cache(tmp_path / "cache", Toy(seconds=(6, 7), splits={"train": 1, "val": 1}))
    with pytest.raises(UsageError, match="descriptions of the nine regions"):
        train(toy, replace(CONFIG, text=""), tmp_path / "run")


def test_contradictory_settings_are_rejected() -> None:
    with pytest.raises(UsageError, match="requires the prompt loss"):
        TrainConfig(prompt_context=4, kl_weight=0)
    with pytest.raises(UsageError, match="both"):
        TrainConfig(prompt_context=4, learnable_prompts=True)
    with pytest.raises(ValueError, match="no context vectors"):
        PromptHead(4, torch.ones(9, 5)).attach(lambda context: context)
