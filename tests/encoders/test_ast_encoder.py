"""AST: loading from a directory, Hugging Face preprocessing, and the time span of each step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ASTModel

from vaflow.encoders import build_encoder
from vaflow.encoders.ast import AstEncoder, Geometry, window_frames
from vaflow.encoders.base import Request
from vaflow.encoders.logmel import RATE, FilterBank, frame_times
from vaflow.errors import UsageError, WeightsError

FULL = Geometry(patch=16, frequency_stride=10, time_stride=10, mel_bins=128, max_length=1024)


def build(name: str, **options: Any) -> Any:
    """Return an encoder typed as Any."""
    return build_encoder(name, **options)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.2 * np.sin(440 * time**1.5) + 0.02 * rng.standard_normal(time.size)).astype(np.float32)


# --- geometry


def test_token_times_are_the_mean_of_their_frame_times() -> None:
    frames = frame_times(1024)
    expected = [frames[10 * j : 10 * j + 16].mean() for j in range(101)]
    np.testing.assert_allclose(FULL.tokens.times(), expected, atol=1e-12)
    assert (FULL.frequency_tokens, FULL.tokens.count) == (12, 101)


@pytest.mark.parametrize(("window", "steps"), [(10, 20), (10, 10), (10, 100), (9.6, 24), (3, 7), (10.2, 17)])
def test_steps_average_the_tokens_centred_in_them(window: float, steps: int) -> None:
    step, centres = window / steps, FULL.tokens.times()
    expected = [[j for j, c in enumerate(centres) if k * step <= c < (k + 1) * step] for k in range(steps)]
    assert FULL.tokens.members(window, steps) == expected
    np.testing.assert_allclose(FULL.tokens.step_times(window, steps), [centres[g].mean() for g in expected], atol=1e-12)
    rows = FULL.tokens.pooling(window, steps)
    values = np.random.default_rng(0).standard_normal((101, 3))
    np.testing.assert_allclose(rows @ values, [values[g].mean(axis=0) for g in expected], atol=1e-6)


def test_twenty_steps_of_ten_seconds_have_five_tokens_each() -> None:
    assert FULL.tokens.members(10, 20) == [list(range(5 * k, 5 * k + 5)) for k in range(20)]
    np.testing.assert_allclose(FULL.tokens.step_times(10, 20), 0.5 * np.arange(20) + 0.2875, atol=1e-12)


def test_a_token_on_the_border_belongs_to_the_later_step() -> None:
    geometry = Geometry(patch=16, frequency_stride=10, time_stride=1, mel_bins=128, max_length=300)
    groups = geometry.tokens.members(0.975, 10)  # centres at 0.0875 + 0.01 j, borders at 0.0975 k: token 1 is on one
    assert (groups[0], groups[1][0]) == ([0], 1)


@pytest.mark.parametrize(("window", "steps"), [(10, 200), (12, 20), (30, 60)])
def test_a_step_without_a_token_is_rejected(window: float, steps: int) -> None:
    with pytest.raises(UsageError, match="would have no token"):
        FULL.tokens.step_times(window, steps)


def test_window_frames_match_the_filter_bank() -> None:
    for window in (10, 3, 0.5, 9.6):
        assert window_frames(window) == len(FilterBank().push(np.zeros(round(window * RATE), np.float32)))
    assert window_frames(10) == 998


# --- dependence of steps on audio, through the real class


@pytest.fixture(scope="module")
def local_encoder() -> Any:
    """A model without layers: each token is a function of its own patch only."""
    torch.manual_seed(0)
    module = ASTModel(ASTConfig(hidden_size=16, num_hidden_layers=0, num_attention_heads=1, intermediate_size=16))
    return AstEncoder(Request("local"), module, -4.0, 4.5)


@pytest.mark.parametrize("frame", [0, 7, 40, 63, 498, 505, 751, 990, 997])
def test_an_impulse_changes_the_steps_whose_tokens_cover_it(local_encoder: Any, frame: int) -> None:
    mel = torch.full((1, 998, 128), -6.0)
    changed = mel.clone()
    changed[0, frame] += 5
    difference = local_encoder.encode(changed, window=10, steps=20) - local_encoder.encode(mel, window=10, steps=20)
    strength = difference[0].norm(dim=-1).numpy()
    covering = {j // 5 for j in range(100) if 10 * j <= frame < 10 * j + 16}
    assert set(np.flatnonzero(strength > 1e-4).tolist()) == covering
    # The step that changes most is the one that contains the instant, up to half a patch at its borders.
    seconds = frame_times(998)[frame]
    assert abs(local_encoder.step_times(10, 20)[strength.argmax()] - seconds) <= 0.25 + 0.0875 + 0.025


def test_an_impulse_is_strongest_at_its_own_step_with_attention() -> None:
    encoder = build("ast-tiny")
    mel = torch.full((1, 998, 128), -6.0)
    for frame in (120, 430, 871):
        changed = mel.clone()
        changed[0, frame - 4 : frame + 4] += 8
        difference = encoder.encode(changed, window=10, steps=20) - encoder.encode(mel, window=10, steps=20)
        assert int(difference[0].norm(dim=-1).argmax()) == int(frame_times(998)[frame] / 0.5)


def test_tokens_are_frequency_major_without_special_tokens(local_encoder: Any) -> None:
    mel = torch.randn(2, 998, 128, generator=torch.Generator().manual_seed(1))
    embedding = local_encoder.encode(mel, window=10, steps=20)
    padded = torch.nn.functional.pad(mel, (0, 0, 0, 26))
    with torch.no_grad():
        hidden = local_encoder.module((padded + 4.0) / 9.0).last_hidden_state
    for step in (0, 7, 19):
        tokens = [2 + f * 101 + t for f in range(12) for t in range(5 * step, 5 * step + 5)]
        torch.testing.assert_close(embedding[:, step], hidden[:, tokens].mean(dim=1), atol=1e-5, rtol=0)


def test_pooling_is_float32_in_an_outer_autocast(local_encoder: Any) -> None:
    """Fine-tuning trains in autocast: a mean over tokens in bfloat16 loses 16 bits."""
    mel = torch.randn(1, 998, 128, generator=torch.Generator().manual_seed(2)) - 5
    hidden: list[torch.Tensor] = []
    hook = local_encoder.module.register_forward_hook(lambda module, inputs, out: hidden.append(out.last_hidden_state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = local_encoder.encode(mel, window=10, steps=20)
    hook.remove()
    assert pooled.dtype == torch.float32
    tokens = hidden[0][0, 2:].float().reshape(12, 101, -1).mean(dim=0)[:100]
    torch.testing.assert_close(pooled[0], tokens.reshape(20, 5, -1).mean(dim=1), atol=1e-6, rtol=1e-6)


def test_the_pooling_matrix_is_computed_once_per_shape(local_encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vaflow.encoders.base import TokenGrid

    mel = torch.zeros(1, 998, 128)
    for steps in (10, 20):
        local_encoder.encode(mel, window=10, steps=steps)
    monkeypatch.setattr(TokenGrid, "pooling", lambda *_: pytest.fail("computed again"))
    for steps in (10, 20):
        local_encoder.encode(mel, window=10, steps=steps)


# --- the input as Hugging Face makes it


@pytest.mark.parametrize("seconds", [10.0, 4.2, 0.3])
def test_hidden_states_equal_hugging_face(small_ast: Path, seconds: float) -> None:
    samples = noise(min(seconds, 2.5))  # the small model reads 2.56 s
    extractor, reference = ASTFeatureExtractor.from_pretrained(small_ast), ASTModel.from_pretrained(small_ast).eval()
    inputs = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_values"]
    with torch.no_grad():
        hidden = reference(inputs).last_hidden_state[0, 2:].reshape(12, 25, -1).mean(dim=0)
    encoder = build(f"ast:{small_ast}")
    mel = torch.from_numpy(FilterBank().push(samples))[None]
    embedding = encoder.encode(mel, window=2.5, steps=5)[0]
    for step, tokens in enumerate(encoder.geometry.tokens.members(2.5, 5)):
        torch.testing.assert_close(embedding[step], hidden[tokens].mean(dim=0), atol=1e-4, rtol=0)


def test_a_short_window_equals_one_padded_with_mel_zeros(small_ast: Path) -> None:
    encoder = build("ast", weights=small_ast)
    mel = torch.from_numpy(FilterBank().push(noise(1.1)))[None]
    filled = torch.cat([mel, torch.zeros(1, window_frames(2.5) - mel.shape[1], 128)], dim=1)
    assert torch.equal(encoder.encode(mel, window=2.5, steps=5), encoder.encode(filled, window=2.5, steps=5))


def test_features_do_not_depend_on_other_windows_in_the_batch() -> None:
    encoder = build("ast-tiny")
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(3, 998, 128, generator=generator) - 5
    others = torch.randn(3, 998, 128, generator=generator) * 3
    others[1] = mel[1]
    first, second = encoder.encode(mel, window=10, steps=20), encoder.encode(others, window=10, steps=20)
    assert torch.equal(first[1], second[1])
    assert first.shape == (3, 20, encoder.dim)
    assert first.dtype == torch.float32


def test_invalid_shapes_are_rejected(small_ast: Path) -> None:
    encoder = build(f"ast:{small_ast}")
    with pytest.raises(ValueError, match="at most 248, 128"):
        encoder.encode(torch.zeros(1, 249, 128), window=2.5, steps=5)
    with pytest.raises(ValueError, match="at most 248, 128"):
        encoder.encode(torch.zeros(1, 100, 64), window=2.5, steps=5)


# --- checkpoints


def test_a_checkpoint_directory_loads_with_its_normalization(small_ast: Path) -> None:
    encoder = build("ast", weights=small_ast)
    assert (encoder.identity["mean"], encoder.identity["std"]) == (-3.5, 2.25)
    original = ASTForAudioClassification.from_pretrained(small_ast).audio_spectrogram_transformer.state_dict()
    for key, value in encoder.module.state_dict().items():
        assert torch.equal(value, original[key]), key
    assert not encoder.module.training
    (small_ast / "preprocessor_config.json").unlink()
    audioset = build("ast", weights=small_ast)
    assert (audioset.identity["mean"], audioset.identity["std"]) == (-4.2677393, 4.5689974)
    assert audioset.identity != encoder.identity


def test_a_checkpoint_without_the_classifier_is_the_same_encoder(small_ast: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    ASTModel.from_pretrained(small_ast).save_pretrained(bare)
    ASTFeatureExtractor.from_pretrained(small_ast).save_pretrained(bare)
    assert build(f"ast:{bare}").identity == build(f"ast:{small_ast}").identity


def test_keys_in_hub_format_are_accepted(small_ast: Path) -> None:
    """The published checkpoint has key names that current transformers renames while loading."""
    old = {}
    for key, value in load_file(small_ast / "model.safetensors").items():
        for new, before in HUB_NAMES.items():
            key = key.replace(new, before)
        old[key] = value
    expected = build("ast", weights=small_ast).identity["weights"]
    save_file(old, small_ast / "model.safetensors", metadata={"format": "pt"})
    assert any("attention.attention.query.weight" in key for key in old)
    assert build("ast", weights=small_ast).identity["weights"] == expected


HUB_NAMES = {
    ".layers.": ".encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_mismatched_weights_are_reported_by_key(small_ast: Path, change: str) -> None:
    state = load_file(small_ast / "model.safetensors")
    key = next(k for k in state if k.endswith("layernorm_after.weight"))
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["audio_spectrogram_transformer.layernorm_between.weight"] = torch.zeros(3)
    else:
        state[key] = torch.zeros(5)
    save_file(state, small_ast / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"layernorm_(after|between)\.weight"):
        build("ast", weights=small_ast)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("config.json", "{", WeightsError),
        ("config.json", '{"model_type": "vit"}', UsageError),
        ("preprocessor_config.json", '{"sampling_rate": 8000}', UsageError),
        ("model.safetensors", "nothing of the kind", WeightsError),
    ],
)
def test_directories_of_other_models_are_rejected(
    small_ast: Path, file: str, content: str, error: type[Exception]
) -> None:
    (small_ast / file).write_text(content)
    with pytest.raises(error):
        build("ast", weights=small_ast)


def test_another_number_of_mel_bins_is_rejected(small_ast: Path) -> None:
    config = json.loads((small_ast / "config.json").read_text())
    (small_ast / "config.json").write_text(json.dumps(config | {"num_mel_bins": 64}))
    with pytest.raises(UsageError, match="num_mel_bins is 64"):
        build("ast", weights=small_ast)


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    for name, weights in (("ast", tmp_path / "none"), (f"ast:{tmp_path}/none", None)):
        with pytest.raises(UsageError, match=r"The folder .* does not exist.*Check the path after"):
            build(name, weights=weights)
