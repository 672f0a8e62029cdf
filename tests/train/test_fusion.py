"""Fusion equals equations 3 to 5 in NumPy; interpolation equals numpy.interp."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_batches import inside_mask

from vaflow.errors import UsageError
from vaflow.train.heads.fusion import FUSION, CrossAttention, Fusion, Track, interpolate

FRAMES, HIDDEN, HEADS = 6, 8, 2
STEPS = (7, 4, 1, 5)
variants = pytest.mark.parametrize("variant", FUSION)


def build(variant: str, streams: int = 1) -> Fusion:
    torch.manual_seed(0)
    fusion = FUSION[variant](HIDDEN, streams, heads=HEADS).double()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases too: the default zeros would hide errors
    return fusion


def make_track(seed: int, silent: Sequence[int] = ()) -> Track:
    """Steps of several windows: one window has invalid audio steps, `silent` windows have no steps."""
    draw = torch.Generator().manual_seed(seed)
    inside = inside_mask(STEPS, max(STEPS))
    key = inside.clone()
    key[0, 3] = False
    key[list(silent)] = False
    time = torch.rand(inside.shape, generator=draw, dtype=torch.float64).add(0.1).cumsum(1)
    value = torch.randn(*inside.shape, HIDDEN, generator=draw, dtype=torch.float64) * inside.unsqueeze(-1)
    return Track(value, time, inside, key)


def make_visual() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(99)
    time = torch.arange(FRAMES, dtype=torch.float64).expand(len(STEPS), FRAMES) * 0.7 - 0.1
    return torch.randn(len(STEPS), FRAMES, HIDDEN, generator=draw, dtype=torch.float64), time


def numbers(parameter: Any) -> np.ndarray:
    return parameter.detach().numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(module: Any, visual: np.ndarray, track: Track, row: int) -> np.ndarray:
    """Equation 3 for one window: multi-head attention over valid steps, with the weights of the module."""
    keys = numbers(track.value[row])[track.key[row].numpy()]
    weights, biases = numbers(module.attention.in_proj_weight), numbers(module.attention.in_proj_bias)
    parts = [np.split(a, 3) for a in (weights, biases)]
    q, k, v = (x @ w.T + b for x, w, b in zip((visual, keys, keys), *parts, strict=True))
    size, heads = HIDDEN // HEADS, []
    for head in range(HEADS):
        cut = slice(head * size, (head + 1) * size)
        heads.append(softmax(q[:, cut] @ k[:, cut].T / np.sqrt(size)) @ v[:, cut])
    out = module.attention.out_proj
    return np.concatenate(heads, -1) @ numbers(out.weight).T + numbers(out.bias)


def at_frames(track: Track, time: Tensor, row: int) -> np.ndarray:
    inside = track.inside[row].numpy()
    known, value = numbers(track.time[row])[inside], numbers(track.value[row])[inside]
    return np.stack([np.interp(numbers(time[row]), known, column) for column in value.T], -1)


def restated(variant: str, fusion: Any, visual: Tensor, time: Tensor, tracks: Sequence[Track], row: int) -> np.ndarray:
    """F_fused of one window in which every track has a key."""
    query = numbers(visual[row])
    if variant in ("gated", "concat"):
        keys = [at_frames(track, time, row) for track in tracks]
    else:
        keys = [attention(a, query, track, row) for a, track in zip(fusion.attends, tracks, strict=True)]
    if "concat" in variant:
        return np.concatenate([query, *keys], -1)
    mean = np.mean(keys, axis=0)
    if variant == "attention":
        return mean
    scores = np.concatenate([mean, query], -1) @ numbers(fusion.gate.weight).T + numbers(fusion.gate.bias)
    gate = 1 / (1 + np.exp(-scores))  # eq. 4
    return gate * mean + (1 - gate) * query  # eq. 5


@variants
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_fusion_equals_the_published_equations(variant, streams):
    fusion, (visual, time) = build(variant, streams), make_visual()
    tracks = [make_track(seed) for seed in range(streams)]
    fused = fusion(visual, time, tracks)
    assert fused.shape == (len(STEPS), FRAMES, fusion.width)
    for row in range(len(STEPS)):
        expected = restated(variant, fusion, visual, time, tracks, row)
        np.testing.assert_allclose(numbers(fused[row]), expected, atol=1e-12)


@variants
def test_without_a_valid_key_the_output_is_the_visual_query(variant):
    fusion, (visual, time) = build(variant, 2), make_visual()
    tracks = [make_track(seed, silent=[1]) for seed in range(2)]
    inputs = [visual.requires_grad_(), *(track.value.requires_grad_() for track in tracks)]
    fused = fusion(visual, time, tracks)
    assert torch.equal(fused[1, :, :HIDDEN], visual[1])
    assert (fused[1, :, HIDDEN:] == 0).all()  # the remaining columns of the concatenation
    gradients = torch.autograd.grad(fused.square().sum(), [*inputs, *fusion.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    torch.testing.assert_close(gradients[0][1], 2 * visual[1])
    assert all((gradient[1] == 0).all() for gradient in gradients[1:3])


@variants
def test_windows_without_keys_are_supported(variant):
    fusion, (visual, time) = build(variant), make_visual()
    nothing = torch.zeros(len(STEPS), max(STEPS), dtype=torch.bool)
    for inside in (make_track(0).inside, nothing):  # all audio invalid, or no audio at all
        track = replace(make_track(0), inside=inside, key=nothing)
        fused = fusion(visual, time, [track])
        assert torch.equal(fused[..., :HIDDEN], visual)
        learned = [*fusion.parameters()]
        if learned:
            gradients = torch.autograd.grad(fused.sum(), learned, allow_unused=True, materialize_grads=True)
            assert all((gradient == 0).all() for gradient in gradients)


@variants
def test_a_missing_stream_gets_no_gate_weight(variant):
    fusion, (visual, time) = build(variant, 2), make_visual()
    tracks = [make_track(0), make_track(1, silent=[0, 2])]
    fused = fusion(visual, time, tracks)
    alone = build(variant, 1)
    kept = {name: value for name, value in fusion.state_dict().items() if "attends.1" not in name}
    alone.load_state_dict(kept)
    for row in (0, 2):
        expected = alone(visual, time, tracks[:1])[row]
        torch.testing.assert_close(fused[row, :, : expected.shape[-1]], expected)
        assert (fused[row, :, expected.shape[-1] :] == 0).all()


@pytest.mark.parametrize("variant", ["attention", "hierarchical", "attention-concat"])
def test_invalid_audio_steps_and_padding_are_not_attended(variant):
    fusion, (visual, time) = build(variant), make_visual()
    track = make_track(0)
    shouted = torch.where(track.key.unsqueeze(-1), track.value, 1e6)
    torch.testing.assert_close(
        fusion(visual, time, [replace(track, value=shouted)]), fusion(visual, time, [track]), rtol=0, atol=0
    )


def test_attention_has_no_residual_and_no_norm():
    """With one key, every frame attends to the same step, whatever its query."""
    torch.manual_seed(0)
    attend, (visual, _) = CrossAttention(HIDDEN, HEADS).double(), make_visual()
    track = make_track(0)
    attended = attend(visual, track.value, track)[2]  # window 2 has one step
    torch.testing.assert_close(attended, attended[:1].expand_as(attended))


def test_interpolation_equals_numpy():
    rng = np.random.default_rng(0)
    inside = inside_mask((1, 2, 5, 9, 9), 9)
    known = np.sort(rng.uniform(0, 10, (5, 9)), axis=1)
    value = rng.normal(size=(5, 9, 3))
    times = rng.uniform(-3, 13, (5, 20))
    times[:, :9] = known  # exactly on a step
    tensors = [torch.from_numpy(array) for array in (value, known, times)]
    junk = [torch.where(inside, tensors[1], 1e9), torch.where(inside.unsqueeze(-1), tensors[0], torch.nan)]
    ours = interpolate(junk[1], junk[0], tensors[2], inside)
    for row, n in enumerate(inside.sum(1)):
        for k in range(3):
            expected = np.interp(times[row], known[row, :n], value[row, :n, k])
            np.testing.assert_allclose(ours[row, :, k], expected, atol=1e-12)


def test_interpolation_gradients_reach_only_valid_steps():
    inside = inside_mask((4, 0), 6)
    value = torch.where(inside.unsqueeze(-1), torch.randn(2, 6, 3, dtype=torch.float64), torch.nan).requires_grad_()
    known = torch.arange(6, dtype=torch.float64).expand(2, 6)
    times = torch.tensor([[0.5, 2.0, 9.0, torch.nan]], dtype=torch.float64).expand(2, 4)  # NaN: a padded frame
    out = interpolate(value, known, times, inside)
    assert (out[1] == 0).all()
    (gradient,) = torch.autograd.grad(out[:, :3].sum(), value)
    weights = torch.tensor([0.5, 0.5, 1, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(gradient[0], weights.unsqueeze(-1).expand(6, 3))
    assert (gradient[1] == 0).all()


def test_mismatched_shapes_are_reported():
    fusion, (visual, time), track = build("hierarchical"), make_visual(), make_track(0)
    with pytest.raises(ValueError, match="1 audio streams; got 2"):
        fusion(visual, time, [track, track])
    with pytest.raises(ValueError, match=r"\[4, 6, 7\] and \[4, 7, 8\]"):
        fusion(visual[..., 1:], time, [track])
    with pytest.raises(ValueError, match=r"key must be \[4, 7\].*got \[4, 6\]"):
        fusion(visual, time, [replace(track, key=track.key[:, 1:])])
    with pytest.raises(ValueError, match=r"\[4, 7, 8\], \[4, 6\]"):
        interpolate(track.value, track.time[:, 1:], time, track.inside)


def test_invalid_fusions_are_rejected():
    with pytest.raises(UsageError, match="at least one audio stream"):
        FUSION["gated"](8, 0)
    with pytest.raises(UsageError, match=r"hidden \(8\) must be divisible by attention_heads \(3\)"):
        FUSION["attention"](8, 1, heads=3)


@pytest.mark.parametrize("variant", ["attention", "hierarchical", "attention-concat"])
def test_positions_are_sinusoids_of_times_on_queries_and_keys(variant):
    """Reference in NumPy for one window; positions do not change values."""
    torch.manual_seed(0)
    fusion: Any = FUSION[variant](HIDDEN, 1, heads=HEADS, positions="time").double()
    plain = FUSION[variant](HIDDEN, 1, heads=HEADS).double()
    plain.load_state_dict(fusion.state_dict())  # positions add no saved weights
    (visual, time), track = make_visual(), make_track(0)
    fused = fusion(visual, time, [track])
    assert not torch.allclose(fused, plain(visual, time, [track]))

    def position(seconds: np.ndarray) -> np.ndarray:
        angle = seconds[:, None] / 0.1 / 10_000 ** (np.arange(HIDDEN // 2) / (HIDDEN // 2))
        return np.concatenate([np.sin(angle), np.cos(angle)], -1)

    row, key = 0, track.key[0].numpy()
    value = numbers(track.value[row])[key]
    parts = [
        np.split(numbers(a), 3)
        for a in (fusion.attends[0].attention.in_proj_weight, fusion.attends[0].attention.in_proj_bias)
    ]
    sources = (
        numbers(visual[row]) + position(numbers(time[row])),
        value + position(numbers(track.time[row])[key]),
        value,
    )
    q, k, v = (x @ w.T + b for x, w, b in zip(sources, *parts, strict=True))
    size = HIDDEN // HEADS
    cuts = [slice(h * size, (h + 1) * size) for h in range(HEADS)]
    heads = [softmax(q[:, c] @ k[:, c].T / np.sqrt(size)) @ v[:, c] for c in cuts]
    out = fusion.attends[0].attention.out_proj
    attended = np.concatenate(heads, -1) @ numbers(out.weight).T + numbers(out.bias)
    result = fusion.attends[0](
        visual + fusion.positions(time).to(visual), track.value + fusion.positions(track.time), track
    )
    np.testing.assert_allclose(numbers(result[row]), attended, atol=1e-6)


def test_positions_ignore_times_at_padding():
    (visual, time), track = make_visual(), make_track(0)
    fusion = FUSION["attention"](HIDDEN, 1, heads=HEADS, positions="time").double()
    junk = replace(track, time=torch.where(track.inside, track.time, torch.nan))
    assert torch.equal(fusion(visual, time, [track]), fusion(visual, time, [junk]))


def test_unknown_positions_are_refused():
    with pytest.raises(UsageError, match="attention_positions"):
        FUSION["attention"](HIDDEN, 1, heads=HEADS, positions="steps")
