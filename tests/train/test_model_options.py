"""Model options: behaviour, parameter counts, saved state, rejected values."""

from dataclasses import replace

import pytest
import torch
from toy_batches import AUDIO_STREAM, AUDIO_STREAM_2, PROTOTYPES, VISUAL_STREAM, VISUAL_STREAM_2, toy_batch, toy_model

from vaflow.errors import UsageError
from vaflow.train.batch import VISUAL, StreamSpec
from vaflow.train.heads import VAModel, count_parameters

FOUR = (AUDIO_STREAM_2, VISUAL_STREAM, AUDIO_STREAM, VISUAL_STREAM_2)


def test_models_without_prototypes_have_no_region_logits():
    model = VAModel((VISUAL_STREAM, AUDIO_STREAM), None, hidden=8).double()
    assert model(toy_batch()).region_logits is None


def test_equal_seeds_give_equal_models_and_outputs():
    batch = toy_batch()
    one, two = toy_model(), toy_model()
    assert torch.equal(one(batch).va, two(batch).va)
    torch.manual_seed(1)
    other = VAModel((VISUAL_STREAM, AUDIO_STREAM), PROTOTYPES, hidden=8, attention_heads=2).double()
    assert not torch.allclose(other.eval()(batch).va, one(batch).va)


def test_dropout_is_active_in_training_only():
    batch = toy_batch()
    model = toy_model(dropout=0.5)
    assert not torch.equal(model(batch).va, model(batch).va)
    model.eval()
    assert torch.equal(model(batch).va, model(batch).va)


def test_weights_round_trip_through_a_file():
    batch = toy_batch(streams=FOUR)
    one = toy_model(FOUR, normalize="standard")
    two = VAModel(FOUR, torch.zeros(9, 6), hidden=8, attention_heads=2, normalize="standard").double()
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two.eval()(batch).va, one.eval()(batch).va)


def test_standard_normalisation_uses_the_given_statistics():
    batch, name = toy_batch(), VISUAL_STREAM.name
    model, plain = toy_model(normalize="standard"), toy_model(normalize="none")
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(batch).va, plain(batch).va)  # the identity until statistics are set
    mean, deviation = (
        torch.linspace(-3, 4, VISUAL_STREAM.dim).double(),
        torch.linspace(0.5, 5, VISUAL_STREAM.dim).double(),
    )
    model.set_statistics(name, mean, deviation)
    moved = replace(batch, features={**batch.features, name: batch.features[name] * deviation + mean})
    torch.testing.assert_close(model(moved).va, plain(batch).va)


def test_unit_normalisation_ignores_vector_length():
    batch = toy_batch()
    model = toy_model(normalize="l2")
    longer = replace(batch, features={name: 7 * tensor for name, tensor in batch.features.items()})
    torch.testing.assert_close(model(longer).va, model(batch).va)


def test_statistics_require_standard_normalisation():
    ones = torch.ones(VISUAL_STREAM.dim)
    with pytest.raises(ValueError, match=r"no stream 'ear'.*see\.it"):
        toy_model(normalize="standard").set_statistics("ear", ones, ones)
    with pytest.raises(ValueError, match="LayerNorm"):
        toy_model().set_statistics(VISUAL_STREAM.name, ones, ones)
    with pytest.raises(ValueError, match=r"\[5\]; got \[5\] and \[4\]"):
        toy_model(normalize="standard").set_statistics(VISUAL_STREAM.name, ones, ones[1:])


def test_parameters_are_counted():
    model = toy_model((VISUAL_STREAM,))
    h, d, text = 8, VISUAL_STREAM.dim, 6
    branch = 2 * d + (d * h + h) + h + 2 * 3 * (h // 2) * (h + h // 2 + 2)
    heads = (h * h + h) + (2 * h + 2) + (h * text + text) + 1
    assert count_parameters(model) == branch + heads
    model.branches.requires_grad_(False)
    assert count_parameters(model) == heads
    assert count_parameters(model, trainable=False) == branch + heads


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temporal": "grus"}, "temporal model.*gru, lstm, tcn, transformer.*Did you mean 'gru'"),
        ({"fusion": "gate"}, "fusion.*attention, attention-concat, concat, gated, hierarchical"),
        ({"normalize": "batch"}, "normalisation.*l2, layer, none, standard"),
        ({"temporal_options": {"kernel_size": 3}}, "has no option 'kernel_size'.*dropout, layers, per_direction"),
        ({"hidden": 7}, "even"),
    ],
)
def test_unknown_name_errors_list_the_choices(options, words):
    with pytest.raises(UsageError, match=words):
        toy_model(**options)


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        ((), "at least one"),
        ((VISUAL_STREAM, VISUAL_STREAM), "different names"),
        ((StreamSpec("x", "logmel", 128),), "unknown kind.*audio, visual"),
    ],
)
def test_invalid_streams_are_rejected(streams, words):
    with pytest.raises(UsageError, match=words):
        VAModel(streams)


def test_mismatched_batches_are_reported():
    model, batch = toy_model(), toy_batch()
    with pytest.raises(ValueError, match=r"'hear/it'.*see\.it"):
        model(replace(batch, features={VISUAL_STREAM.name: batch.features[VISUAL_STREAM.name]}))
    wide = toy_batch(streams=(StreamSpec(VISUAL_STREAM.name, VISUAL, 6), AUDIO_STREAM))
    with pytest.raises(ValueError, match=r"see\.it.*\[4, 6, 5\]; got \[4, 6, 6\]"):
        model(wide)
    with pytest.raises(ValueError, match=r"hear/it.*valid \[4, 7\]; got \[4, 6\]"):
        model(replace(batch, valid={**batch.valid, AUDIO_STREAM.name: batch.inside}))
