"""bfloat16: features close to float32, deterministic, stated in the identity; on CPU and GPU."""

from typing import Any

import numpy as np
import pytest
import torch

from vaflow.encoders import build_encoder
from vaflow.encoders.prompts import load_prompts, prototypes
from vaflow.extract.streams import text_info

NAMES = ["clip-tiny", "resnet-tiny", "ast-tiny", "vggish-tiny"]


def encode(encoder: Any, seed: int = 0) -> np.ndarray:
    """[N, dim] of random pictures or of random filter banks."""
    random = torch.Generator().manual_seed(seed)
    if encoder.kind == "visual":
        edge = encoder.image_size
        rows = torch.randint(0, 256, (3, edge, edge, 3), generator=random, dtype=torch.uint8)
        return encoder.encode(rows).numpy()
    frames, bins = encoder.segments(10.0, 20).frames, encoder.front_end.bins
    rows = torch.randn(3, frames, bins, generator=random) * 4 - 4
    return encoder.encode(rows, window=10.0, steps=20).flatten(0, 1).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_features_have_high_cosine_similarity_to_float32(name: str) -> None:
    exact, short = encode(build_encoder(name)), encode(build_encoder(name, precision="bfloat16"))
    assert short.dtype == np.float32
    cosine = (exact * short).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(short, axis=-1)
    assert cosine.min() > 0.999
    assert not np.array_equal(exact, short), "it was computed in bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_deterministic_and_has_its_own_identity(name: str) -> None:
    encoder: Any = build_encoder(name, precision="bfloat16")
    np.testing.assert_array_equal(encode(encoder), encode(build_encoder(name, precision="bfloat16")))
    assert encoder.identity == build_encoder(name).identity | {"precision": "bfloat16"}


def test_prompts_are_float32_for_every_image_precision() -> None:
    exact: Any = build_encoder("clip-tiny")
    short: Any = build_encoder("clip-tiny", precision="bfloat16")
    prompts = load_prompts()
    np.testing.assert_array_equal(prototypes(exact, prompts)[0], prototypes(short, prompts)[0])
    assert text_info(exact).identity == text_info(short).identity
