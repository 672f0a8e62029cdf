"""Dropout: share and scale of the masks, and their random numbers."""

import pytest
import torch

from vaflow.train.heads.layers import Dropout, dropout_masks


def dropout_mask(shape, rate, generator=None):
    """One mask, in float32 on the CPU."""
    return dropout_masks(shape, rate, torch.float32, torch.device("cpu"), [generator])[0]


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9, 0.999999])
def test_a_mask_drops_the_share_and_keeps_the_mean(rate):
    mask = dropout_mask([1000, 1001], rate)
    dropped = float((mask == 0).float().mean())
    assert dropped == pytest.approx(rate, abs=3e-3)
    assert float(mask.max()) == pytest.approx(1 / (1 - rate), rel=1e-3 if rate < 0.99 else 20)
    assert float(mask.unique().numel()) <= 2
    if rate <= 0.9:
        assert float(mask.mean()) == pytest.approx(1, abs=0.02)


def test_neighbouring_values_are_dropped_independently():
    kept = dropout_mask([400_000], 0.5).bool().float() - 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 3e-3


def test_a_generator_repeats_its_masks():
    masks = [dropout_mask([3, 7], 0.3, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_masks_drawn_together_equal_masks_drawn_alone():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    together = dropout_masks([3, 7], 0.3, torch.float32, torch.device("cpu"), generators())
    alone = [dropout_mask([3, 7], 0.3, generator) for generator in generators()]
    assert torch.equal(together, torch.stack(alone))


def test_dropout_is_the_identity_outside_of_training_and_at_rate_zero():
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_the_gradient_has_the_mask_of_the_values():
    x = torch.ones(50, 20, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
