"""Learned context vectors replace word embeddings; the text tower stays frozen."""

from typing import Any

import open_clip
import pytest
import torch

from vaflow.encoders import build_encoder, context_tower, encode_text
from vaflow.encoders.clip import ContextTower
from vaflow.encoders.prompts import load_prompts
from vaflow.errors import UsageError

WORDS = list(load_prompts().descriptions)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return build_encoder("clip-tiny")


def embeddings_of(encoder: Any, words: str, count: int) -> torch.Tensor:
    """The tower's own vectors of `count` words, one token each."""
    tokens = open_clip.get_tokenizer("ViT-B-16")([words])[0, 1 : 1 + count]
    return encoder._model.token_embedding(tokens).detach()


def test_context_vectors_of_real_words_equal_their_text_embeddings(encoder: Any) -> None:
    context = embeddings_of(encoder, "a photo of a", 4)
    embeddings = context_tower(encoder, WORDS, 4)(context)
    expected = encode_text(encoder, [f"a photo of a {words}" for words in WORDS])
    torch.testing.assert_close(embeddings, torch.from_numpy(expected), rtol=0, atol=1e-5)
    assert (embeddings[0] - embeddings[8]).abs().max() > 1e-3


def test_only_context_vectors_are_trained(encoder: Any) -> None:
    tower = context_tower(encoder, WORDS, 2)
    context = torch.nn.Parameter(0.02 * torch.randn(2, tower.width, generator=torch.Generator().manual_seed(0)))
    embedded = tower(context)
    assert embedded.shape == (9, encoder.dim)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(9))
    embedded[:, 0].sum().backward()
    assert context.grad is not None and (context.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in encoder._model.parameters())
    assert not encoder._model.token_embedding._forward_hooks


def test_mismatched_context_shapes_are_rejected(encoder: Any) -> None:
    with pytest.raises(ValueError, match=r"context \[3, 128\]; got \[2, 128\]"):
        context_tower(encoder, WORDS, 3)(torch.zeros(2, 128))
    for count in (0, 74, 200):
        with pytest.raises(UsageError, match="do not fit into the text tower"):
            context_tower(encoder, WORDS, count)
    with pytest.raises(UsageError, match="no text tower"):
        context_tower(build_encoder("ast-tiny"), WORDS, 4)
    with pytest.raises(UsageError, match="does not support context vectors"):
        ContextTower(torch.nn.Linear(1, 1), lambda texts: torch.zeros(1, 1), WORDS, 4, torch.device("cpu"))
