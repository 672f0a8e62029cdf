"""Prompt sets: region order, invalid files, prototypes against brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vaflow.encoders import build_encoder, encode_text
from vaflow.encoders.prompts import REGIONS, load_prompts, prototypes
from vaflow.errors import UsageError

GOOD = """
templates = ["a {} face", "looking {}"]
[descriptions]
v_high = {a_high = "nine", a_middle = "eight", a_low = "seven"}
v_middle = {a_high = "six", a_middle = "five", a_low = "four"}
v_low = {a_high = "three", a_middle = "two", a_low = "one"}
"""


def build(name: str, **options: Any) -> Any:
    """Return an encoder typed as Any."""
    return build_encoder(name, **options)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_regions_are_three_times_valence_plus_arousal() -> None:
    words = load_prompts().descriptions
    assert words[0] == "sad, tired, and low-energy"
    assert words[8] == "excited, joyful, and energetic"
    assert "uncomfortable" in words[3 * 0 + 1]
    assert "highly-aroused" in words[3 * 1 + 2]
    assert REGIONS[3 * 2 + 0] == ("v_high", "a_low")
    assert len(set(words)) == 9


def test_the_default_prompt_set_has_the_published_templates() -> None:
    prompts = load_prompts()
    assert prompts.name == "default"
    assert prompts.templates == (
        "a photo of a person who looks {}",
        "a face showing {}",
        "a facial expression of {}",
    )


def test_region_order_does_not_depend_on_file_order(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, GOOD))
    assert prompts.name == "mine"
    assert prompts.descriptions == ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert prompts.texts()[1][8] == "looking nine"


def test_identity_depends_on_the_words_only(tmp_path: Path) -> None:
    first = load_prompts(write(tmp_path, GOOD))
    (tmp_path / "other.toml").write_text(GOOD)
    assert load_prompts(tmp_path / "other.toml").identity() == first.identity()
    assert load_prompts(write(tmp_path, GOOD.replace("nine", "ten"))).identity() != first.identity()


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    text = GOOD.replace('a_low = "one"', 'a_lo = "one"').replace('"looking {}"', '"looking"').replace('"five"', '""')
    with pytest.raises(UsageError) as caught:
        load_prompts(write(tmp_path, text))
    for part in ("v_low.a_low is missing", "v_low.a_lo is not one", "template 2", "v_middle.a_middle"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "not toml at all [", 'templates = ["{}"]', '[descriptions]\nv_low = "x"', "templates = 3"]
)
def test_files_without_a_prompt_set_are_rejected(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_prompts(write(tmp_path, text))


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        load_prompts(tmp_path / "nowhere.toml")


def test_prototypes_equal_brute_force() -> None:
    encoder = build("clip-tiny")
    prompts = load_prompts()
    embedding, template = prototypes(encoder, prompts)
    assert embedding.shape == (9, encoder.dim)
    assert template.shape == (3, 9, encoder.dim)
    assert embedding.dtype == template.dtype == np.float32
    for region, words in enumerate(prompts.descriptions):
        rows = []
        for t, pattern in enumerate(prompts.templates):
            row = encode_text(encoder, [pattern.format(words)])[0].astype(np.float64)
            row /= np.sqrt(np.sum(row**2))
            np.testing.assert_allclose(template[t, region], row, atol=2e-6)
            rows.append(row)
        np.testing.assert_allclose(embedding[region], sum(rows) / 3, atol=2e-6)


def test_text_embeddings_equal_open_clip() -> None:
    import open_clip

    encoder = build("clip-tiny")
    texts = [f"a face showing number {i}" for i in range(70)]  # more than one batch
    with torch.no_grad():
        expected = encoder._model.encode_text(open_clip.tokenize(texts))
    expected = expected / expected.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(encode_text(encoder, texts), expected.numpy(), atol=2e-6)


def test_an_encoder_without_a_text_tower_is_rejected() -> None:
    with pytest.raises(UsageError, match="ast-tiny has no text tower"):
        prototypes(build("ast-tiny"), load_prompts())
