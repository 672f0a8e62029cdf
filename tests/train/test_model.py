"""The complete model: masks in every combination, missing input, one modality, several streams."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from toy_batches import (
    AUDIO_STREAM,
    AUDIO_STREAM_2,
    VISUAL_STREAM,
    VISUAL_STREAM_2,
    pad_more,
    toy_batch,
    toy_model,
    without,
)

from vaflow.train.batch import Batch
from vaflow.train.heads import NORMALIZE, VAModel
from vaflow.train.heads.fusion import FUSION, interpolate
from vaflow.train.heads.temporal import TEMPORAL
from vaflow.train.losses import total_loss
from vaflow.train.metrics import concordance

STREAMS = {
    "both": (VISUAL_STREAM, AUDIO_STREAM),
    "seen": (VISUAL_STREAM,),
    "heard": (AUDIO_STREAM,),
    "two seen": (VISUAL_STREAM, VISUAL_STREAM_2),
    "two heard": (AUDIO_STREAM, AUDIO_STREAM_2),
    "four": (AUDIO_STREAM_2, VISUAL_STREAM, AUDIO_STREAM, VISUAL_STREAM_2),
}
combinations = pytest.mark.parametrize(("temporal", "fusion"), list(product(TEMPORAL, FUSION)))
some_streams = pytest.mark.parametrize("case", STREAMS)


def in_context(model: VAModel, batch: Batch, name: str, inside: Tensor) -> Tensor:
    """The only stream of a model, or its first one, after the temporal model."""
    branch: Any = model.branches[0]
    entering = branch.enter(batch.features[name], batch.valid[name], inside, batch.feature_time[name])
    output: Tensor = branch.temporal(entering.value, entering.inside)
    return output


def loss_and_gradients(model: VAModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    output = model(batch)
    assert output.region_logits is not None
    loss, _ = total_loss(output, batch, kl_weight=0.2, mse_weight=0.1)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return output.va.detach(), output.region_logits.detach(), loss.detach(), list(gradients)


def assert_padding_is_harmless(model: VAModel, batch: Batch, junk: float) -> None:
    padded = pad_more(batch, 3, junk)
    plain, with_padding = loss_and_gradients(model, batch), loss_and_gradients(model, padded)
    frames = batch.inside.shape[1]
    for before, after in zip(plain[:2], with_padding[:2], strict=True):
        torch.testing.assert_close(after[:, :frames], before)
        assert (after[~padded.inside] == 0).all()
    torch.testing.assert_close(with_padding[2], plain[2])
    for before, after in zip(plain[3], with_padding[3], strict=True):
        assert torch.isfinite(after).all()
        torch.testing.assert_close(after, before)
    scores = [concordance(r[0], b.target, b.labelled) for r, b in ((plain, batch), (with_padding, padded))]
    assert scores[1] == pytest.approx(scores[0])


@combinations
@pytest.mark.parametrize("junk", [1e6, float("nan")])
def test_padding_changes_no_prediction_loss_gradient_or_metric(temporal, fusion, junk):
    assert_padding_is_harmless(toy_model(temporal=temporal, fusion=fusion), toy_batch(), junk)


@some_streams
def test_padding_changes_nothing_for_every_set_of_streams(case):
    assert_padding_is_harmless(toy_model(STREAMS[case]), toy_batch(streams=STREAMS[case]), float("nan"))


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_padding_changes_nothing_under_every_normalisation(normalize):
    assert_padding_is_harmless(toy_model(normalize=normalize), toy_batch(), float("nan"))


def test_padding_changes_nothing_in_a_non_causal_tcn():
    model = toy_model(temporal="tcn", temporal_options={"causal": False, "layers": 2})
    assert_padding_is_harmless(model, toy_batch(), float("nan"))


@combinations
def test_windows_without_audio_or_face_give_finite_outputs(temporal, fusion):
    model = toy_model(temporal=temporal, fusion=fusion)
    batch = without(without(toy_batch(), AUDIO_STREAM.name, [0, 2]), VISUAL_STREAM.name, [1, 2])
    va, logits, loss, gradients = loss_and_gradients(model, batch)
    assert all(torch.isfinite(tensor).all() for tensor in (va, logits, loss, *gradients))
    everything = without(without(batch, AUDIO_STREAM.name, range(4)), VISUAL_STREAM.name, range(4))
    assert all(torch.isfinite(tensor).all() for tensor in loss_and_gradients(model, everything)[3])


@pytest.mark.parametrize("fusion", FUSION)
def test_without_audio_the_output_depends_on_frames_only(fusion):
    model, batch = toy_model(fusion=fusion), without(toy_batch(), AUDIO_STREAM.name, [0, 3])
    visual = in_context(model, batch, VISUAL_STREAM.name, batch.inside)
    fused = model.fuse(batch)
    for row in (0, 3):
        assert torch.equal(fused[row, :, :8], visual[row])
        assert (fused[row, :, 8:] == 0).all()
    assert not torch.allclose(fused[1], functional.pad(visual[1], (0, fused.shape[-1] - 8)))


@some_streams
def test_missing_input_is_not_read_and_still_predicted(case):
    streams = STREAMS[case]
    model, batch = toy_model(streams), toy_batch(streams=streams)
    features = {
        name: torch.where(batch.valid[name].unsqueeze(-1), tensor, torch.nan) for name, tensor in batch.features.items()
    }
    before, after = model(batch), model(replace(batch, features=features))
    assert torch.equal(after.va, before.va)
    assert torch.equal(after.region_logits, before.region_logits)
    assert (before.va[0, 1] != 0).all()  # a frame without a face


def test_missing_is_not_padding_and_not_zero():
    batch = toy_batch()
    model = toy_model()
    missing = without(batch, VISUAL_STREAM.name, [0])
    zeros = replace(
        batch, features={**batch.features, VISUAL_STREAM.name: torch.zeros_like(batch.features[VISUAL_STREAM.name])}
    )
    outputs = [model(case).va[0] for case in (batch, missing, zeros)]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(outputs[i], outputs[j])
    shorter = replace(missing, inside=missing.inside.clone())
    shorter.inside[0, -1] = False
    assert (model(shorter).va[0, -1] == 0).all()
    assert (outputs[1][-1] != 0).all()


def test_the_missing_frame_vector_is_trained_by_missing_frames_only():
    model, batch = toy_model(), toy_batch()
    missing = dict(model.named_parameters())["branches.0.missing"]
    all_valid = replace(batch, valid={name: mask.clone() for name, mask in batch.feature_inside.items()})
    for case, learns in ((batch, True), (all_valid, False)):
        (gradient,) = torch.autograd.grad(total_loss(model(case), case)[0], missing)
        assert bool((gradient != 0).any()) is learns


def test_frames_after_the_end_of_a_stream_count_as_missing():
    model, batch = toy_model(), toy_batch()
    ended = {name: mask.clone() for name, mask in batch.feature_inside.items()}
    ended[VISUAL_STREAM.name][0, 3:] = False
    lost = {name: mask.clone() for name, mask in batch.valid.items()}
    lost[VISUAL_STREAM.name][0, 3:] = False
    expected = model(replace(batch, valid=lost)).va
    assert torch.equal(model(replace(batch, feature_inside=ended)).va, expected)


def test_the_model_equals_its_composed_modules():
    """Compose projection, temporal model, fusion and heads in the published order from the model's modules."""
    model, batch = toy_model(), toy_batch()
    audio_mask = batch.valid[AUDIO_STREAM.name] & batch.feature_inside[AUDIO_STREAM.name]
    branch: Any
    sequences = []
    for branch, stream in zip(model.branches, (VISUAL_STREAM, AUDIO_STREAM), strict=True):
        present = batch.valid[stream.name].unsqueeze(-1)
        norm = functional.layer_norm(
            batch.features[stream.name], (stream.dim,), branch.normalize.weight, branch.normalize.bias
        )
        projected = norm @ branch.project.weight.T + branch.project.bias
        replaced = torch.where(present, projected, branch.missing)
        sequences.append(branch.temporal(replaced, batch.feature_inside[stream.name]))
    visual, audio = sequences
    fusion: Any = model.fusion
    unmasked = fusion.attends[0].attention(visual, audio, audio, key_padding_mask=~audio_mask)[0]
    gate = torch.sigmoid(fusion.gate(torch.cat([unmasked, visual], dim=-1)))
    fused = gate * unmasked + (1 - gate) * visual
    first, second = model.regression[0], model.regression[3]
    va = torch.tanh(second(functional.gelu(first(fused))))
    logits = model.prompt(fused)  # type: ignore[misc]
    output = model(batch)
    inside = batch.inside
    torch.testing.assert_close(output.va[inside], va[inside])
    torch.testing.assert_close(output.region_logits[inside], logits[inside])
    assert output.va.abs().max() <= 1


def test_one_modality_uses_no_fusion():
    batch = toy_batch()
    visual_model, audio_model = toy_model((VISUAL_STREAM,)), toy_model((AUDIO_STREAM,))
    assert visual_model.fusion is None
    h_v = in_context(visual_model, batch, VISUAL_STREAM.name, batch.inside)
    assert torch.equal(visual_model.fuse(batch), h_v)
    name = AUDIO_STREAM.name
    h_a = in_context(audio_model, batch, name, batch.feature_inside[name])
    expected = interpolate(h_a, batch.feature_time[name], batch.time, batch.feature_inside[name])
    assert torch.equal(audio_model.fuse(batch), expected)


@some_streams
@pytest.mark.parametrize("fusion", FUSION)
def test_any_number_of_streams_is_supported_and_each_is_used(case, fusion):
    streams = STREAMS[case]
    model, batch = toy_model(streams, fusion=fusion), toy_batch(streams=streams)
    features = {name: tensor.clone().requires_grad_() for name, tensor in batch.features.items()}
    output = model(replace(batch, features=features))
    assert output.va.shape == (4, 6, 2)
    assert output.region_logits.shape == (4, 6, 9)
    for gradient in torch.autograd.grad(output.va.sum(), list(features.values())):
        assert (gradient != 0).any()


def test_the_model_learns_from_both_modalities():
    """Valence is encoded in visual features, arousal in audio; both are learned on unseen windows."""

    def world(seed: int) -> Batch:
        batch = toy_batch((12,) * 24, (12,) * 24, seed=seed)
        draw = torch.Generator().manual_seed(seed + 1)
        path = torch.rand(24, 12, 2, generator=draw, dtype=torch.float64) * 2 - 1
        face, voice = batch.features[VISUAL_STREAM.name].clone(), batch.features[AUDIO_STREAM.name].clone()
        face[..., 0], voice[..., 0] = 3 * path[..., 0], 3 * path[..., 1]
        time = {VISUAL_STREAM.name: batch.time, AUDIO_STREAM.name: batch.time}
        return replace(
            batch,
            features={VISUAL_STREAM.name: face, AUDIO_STREAM.name: voice},
            feature_time=time,
            target=torch.where(batch.labelled, path, 0),
        )

    train, test = world(0), world(100)
    model = toy_model(fusion="concat", hidden=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = concordance(model(test).va.detach(), test.target, test.labelled)
    for _ in range(60):
        optimizer.zero_grad()
        total_loss(model(train), train)[0].backward()
        optimizer.step()
    after = concordance(model.eval()(test).va.detach(), test.target, test.labelled)
    assert (after > before + 0.5).all()
