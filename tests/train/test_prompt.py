"""The prompt head equals cosines in NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vaflow.train.heads.layers import PromptHead


@pytest.fixture
def prototypes() -> Tensor:
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(0)) * 3


def test_logits_are_scaled_cosines(prototypes):
    head = PromptHead(5, prototypes)
    x = torch.randn(2, 4, 5)
    point = x.numpy() @ head.project.weight.detach().numpy().T + head.project.bias.detach().numpy()
    expected = np.empty((2, 4, 9))
    for b, f, i in np.ndindex(2, 4, 9):
        p, q = point[b, f], prototypes[i].numpy()
        expected[b, f, i] = p @ q / np.linalg.norm(p) / np.linalg.norm(q) / 0.07
    np.testing.assert_allclose(head(x).detach(), expected, rtol=1e-4, atol=1e-4)


def test_training_computes_the_logits_and_gradients_of_evaluation(prototypes):
    """Training multiplies short vectors with the Gram matrix of the projection."""
    torch.manual_seed(0)
    head = PromptHead(5, prototypes, learnable=True).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 4, 9, dtype=torch.float64)
    results = []
    for mode in (True, False):
        logits = head.train(mode)(x)
        results.append((logits, *torch.autograd.grad((logits * pull).sum(), [x, *head.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_prototype_length_does_not_change_the_logits(prototypes):
    torch.manual_seed(0)
    head = PromptHead(5, prototypes)
    torch.manual_seed(0)
    longer = PromptHead(5, prototypes * torch.arange(1, 10).unsqueeze(1))
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(head(x), longer(x))


def test_the_logit_scale_is_logarithmic_and_at_most_100(prototypes):
    head = PromptHead(5, prototypes)
    torch.testing.assert_close(head.scale.detach(), torch.tensor(1 / 0.07))
    head(torch.randn(3, 5)).square().sum().backward()
    assert head.log_scale.grad is not None
    assert head.log_scale.grad != 0
    torch.nn.init.constant_(head.log_scale, 20.0)
    assert head.scale.item() == pytest.approx(100)
    assert head(torch.randn(50, 5)).abs().max() <= 100.001


@pytest.mark.parametrize("learnable", [False, True])
def test_prototypes_are_fixed_or_trained_and_always_saved(prototypes, learnable):
    original = prototypes.clone()
    head = PromptHead(5, prototypes, learnable=learnable)
    assert ("prototypes" in dict(head.named_parameters())) is learnable
    torch.testing.assert_close(head.state_dict()["prototypes"], original)
    with torch.no_grad():
        head.prototypes.add_(1)
    torch.testing.assert_close(prototypes, original)  # the tensor of the caller is copied


def test_mismatched_shapes_are_reported(prototypes):
    with pytest.raises(ValueError, match=r"\[9, D\]; got \[8, 12\]"):
        PromptHead(5, prototypes[:8])
    with pytest.raises(ValueError, match=r"\[\.\.\., 5\]; got \[2, 6\]"):
        PromptHead(5, prototypes)(torch.zeros(2, 6))
