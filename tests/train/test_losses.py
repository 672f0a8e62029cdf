"""Losses equal their formulas in NumPy, torchmetrics and SciPy, with manual gradients."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor
from toy_batches import pad_more, toy_batch

from vaflow.errors import UsageError
from vaflow.train.batch import Output
from vaflow.train.losses import (
    ccc,
    ccc_loss,
    hard_labels,
    masked_mse,
    prompt_loss,
    soft_labels,
    total_loss,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def formula(x: np.ndarray, y: np.ndarray) -> float:
    """Lin's coefficient with population moments, in NumPy."""
    covariance = np.cov(x, y, ddof=0)
    return 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + (x.mean() - y.mean()) ** 2)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array))


@pytest.mark.parametrize("per_dimension", [False, True])
def test_ccc_equals_the_population_formula_on_masked_values(rng, per_dimension):
    x, y = rng.uniform(-1, 1, (2, 4, 9, 2))
    y = 0.5 * y + 0.4 * x + 0.1
    mask = rng.random((4, 9, 2) if per_dimension else (4, 9)) < 0.7
    wide = mask if per_dimension else np.repeat(mask[..., None], 2, axis=-1)
    expected = [formula(x[..., k][wide[..., k]], y[..., k][wide[..., k]]) for k in range(2)]
    from_numpy = ccc(x, y, mask)
    assert isinstance(from_numpy, np.ndarray)
    np.testing.assert_allclose(from_numpy, expected, rtol=1e-6)
    np.testing.assert_allclose(ccc(tensor(x).float(), tensor(y).float(), tensor(mask)), expected, atol=1e-6)


def test_ccc_equals_torchmetrics_up_to_sample_variance(rng):
    from torchmetrics.functional.regression import concordance_corrcoef  # 3 s

    x, y = tensor(rng.uniform(-1, 1, (2, 50, 2)))
    y = y + 0.5
    n = len(x)
    variances = x.var(0) + y.var(0)  # n - 1, like torchmetrics
    distance = (x.mean(0) - y.mean(0)).square()
    theirs = concordance_corrcoef(x, y) * (variances + distance) / (variances + distance * n / (n - 1))
    torch.testing.assert_close(ccc(x, y, eps=0.0), theirs)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    torch.testing.assert_close(ccc(centred_x, centred_y, eps=0.0), concordance_corrcoef(centred_x, centred_y))


def test_ccc_in_half_precision_is_computed_in_float32(rng):
    x, y = rng.uniform(-1, 1, (2, 3000, 2)).astype(np.float16)
    value = ccc(tensor(x), tensor(y))
    assert value.dtype == torch.float32
    np.testing.assert_allclose(
        value, [formula(x[:, k].astype(float), y[:, k].astype(float)) for k in range(2)], atol=1e-6
    )


def test_ccc_is_nan_without_values_and_zero_for_a_constant(rng):
    x = rng.uniform(-1, 1, (5, 2))
    labelled = np.zeros((5, 2), bool)
    labelled[:, 1] = True
    value = ccc(x, np.full((5, 2), 0.3), labelled)
    assert np.isnan(value[0])
    assert value[1] == 0


@pytest.mark.parametrize("shape", [(4, 3), (5, 2)])
def test_ccc_reports_mismatched_shapes(shape):
    with pytest.raises(ValueError, match=r"\[4, 2\].*\[" + f"{shape[0]}, {shape[1]}"):
        ccc(torch.zeros(4, 2), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"mask"):
        ccc(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(3, dtype=torch.bool))


def test_ccc_loss_flattens_the_batch_and_averages_the_dimensions(rng):
    x, y = rng.uniform(-1, 1, (2, 4, 9, 2))
    mask = rng.random((4, 9, 2)) < 0.7
    expected = 1 - np.mean([formula(x[..., k][mask[..., k]], y[..., k][mask[..., k]]) for k in range(2)])
    np.testing.assert_allclose(ccc_loss(tensor(x), tensor(y), tensor(mask)), expected, rtol=1e-6)


def test_ccc_loss_gradient_equals_the_formula(rng):
    x, y = tensor(rng.uniform(-1, 1, (2, 3, 4, 2)))
    mask = tensor(rng.random((3, 4, 2)) < 0.8)
    assert torch.autograd.gradcheck(lambda p: ccc_loss(p, y, mask), x.requires_grad_())


def test_ccc_loss_counts_only_dimensions_with_labels(rng):
    x, y = rng.uniform(-1, 1, (2, 12, 2))
    mask = np.ones((12, 2), bool)
    mask[:, 0] = False
    prediction = tensor(x).requires_grad_()
    loss = ccc_loss(prediction, tensor(y), tensor(mask))
    loss.backward()
    np.testing.assert_allclose(loss.detach(), 1 - formula(x[:, 1], y[:, 1]), rtol=1e-6)
    assert prediction.grad is not None
    assert (prediction.grad[:, 0] == 0).all()
    assert (prediction.grad[:, 1] != 0).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, -0.7])
def test_constant_labels_give_a_finite_loss_and_exactly_no_gradient(rng, constant):
    for prediction in (rng.uniform(-1, 1, (7, 30, 2)), np.full((7, 30, 2), constant)):
        x = tensor(prediction.astype(np.float32)).requires_grad_()
        loss = ccc_loss(x, torch.full((7, 30, 2), constant), torch.ones(7, 30, dtype=torch.bool))
        loss.backward()
        assert loss.item() == 1
        assert x.grad is not None
        assert (x.grad == 0).all()


def test_no_labels_at_all_give_zero_loss_and_zero_gradient():
    x = torch.randn(3, 4, 2, requires_grad=True)
    logits = torch.randn(3, 4, 9, requires_grad=True)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    loss = ccc_loss(x, torch.zeros(3, 4, 2), nothing) + prompt_loss(logits, torch.zeros(3, 4, 2), nothing)
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()  # type: ignore[union-attr]
    assert (logits.grad == 0).all()  # type: ignore[union-attr]


def test_soft_labels_equal_equation_two(rng):
    va = rng.uniform(-1, 1, (6, 5, 2))
    grid = np.array([(v, a) for v in (-0.8, 0, 0.8) for a in (-0.8, 0, 0.8)])
    weight = np.exp(-((va[..., None, :] - grid) ** 2).sum(-1) / (2 * 0.6**2))
    expected = weight / weight.sum(-1, keepdims=True)
    ours = soft_labels(va, centers=0.8, sigma=0.6)
    assert isinstance(ours, np.ndarray)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    np.testing.assert_allclose(soft_labels(tensor(va).float(), 0.8, 0.6), expected, atol=1e-6)


def test_regions_are_numbered_valence_first():
    corners = {(-1, -1): 0, (-1, 1): 2, (0, 0): 4, (1, -1): 6, (1, 1): 8}
    for point, region in corners.items():
        assert soft_labels(np.array(point)).argmax() == region
        assert hard_labels(torch.tensor(point, dtype=torch.float32)).argmax() == region


def test_hard_labels_select_the_nearest_centre(rng):
    va = rng.uniform(-1, 1, (200, 2))
    grid = [(v, a) for v in (-0.66, 0, 0.66) for a in (-0.66, 0, 0.66)]
    nearest = [min(range(9), key=lambda i: np.hypot(*(point - grid[i]))) for point in va]
    assert (hard_labels(tensor(va), 0.66) == torch.eye(9)[nearest]).all()
    between = hard_labels(torch.tensor([[0.5, -0.5]]), centers=1.0)  # as far from 0 as from +-1
    assert between.sum() == 1


@pytest.mark.parametrize(("centers", "sigma"), [(0, 0.45), (-1, 0.45), (0.66, 0), (0.66, float("nan"))])
def test_regions_require_positive_sizes(centers, sigma):
    with pytest.raises(UsageError, match="must be positive"):
        soft_labels(np.zeros(2), centers, sigma)


def test_points_have_two_dimensions():
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        soft_labels(torch.zeros(4, 3))


@pytest.mark.parametrize("hard", [False, True])
def test_prompt_loss_is_the_divergence_summed_over_regions(rng, hard):
    logits, va = rng.normal(size=(4, 6, 9)) * 3, rng.uniform(-1, 1, (4, 6, 2))
    mask = rng.random((4, 6)) < 0.6
    grid = np.array([(v, a) for v in (-0.66, 0, 0.66) for a in (-0.66, 0, 0.66)])
    divergences = []
    for b, f in zip(*np.nonzero(mask), strict=True):
        distance = ((va[b, f] - grid) ** 2).sum(-1)
        w = np.eye(9)[distance.argmin()] if hard else np.exp(-distance / (2 * 0.45**2))
        divergences.append(entropy(w, np.exp(logits[b, f])))  # SciPy normalises both
    loss = prompt_loss(tensor(logits), tensor(va), tensor(mask), centers=0.66, sigma=0.45, hard=hard)
    np.testing.assert_allclose(loss, np.mean(divergences), rtol=1e-6)


def test_prompt_loss_gradient_is_softmax_minus_target(rng):
    logits = tensor(rng.normal(size=(3, 5, 9))).requires_grad_()
    va, mask = tensor(rng.uniform(-1, 1, (3, 5, 2))), tensor(rng.random((3, 5)) < 0.6)
    prompt_loss(logits, va, mask).backward()
    expected = (logits.detach().softmax(-1) - soft_labels(va)) / mask.sum() * mask.unsqueeze(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_hard_prompt_loss_is_cross_entropy(rng):
    logits, va = tensor(rng.normal(size=(3, 5, 9))), tensor(rng.uniform(-1, 1, (3, 5, 2)))
    everywhere = torch.ones(3, 5, dtype=torch.bool)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), hard_labels(va).argmax(-1).flatten())
    torch.testing.assert_close(prompt_loss(logits, va, everywhere, hard=True), expected)


def test_prompt_loss_reports_mismatched_shapes():
    with pytest.raises(ValueError, match=r"\[3, 5, 8\].*\[3, 5, 2\].*\[3, 5\]"):
        prompt_loss(torch.zeros(3, 5, 8), torch.zeros(3, 5, 2), torch.ones(3, 5, dtype=torch.bool))


def random_output(seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    va = torch.rand(4, 6, 2, generator=draw, dtype=torch.float64)
    return va.requires_grad_(), torch.randn(4, 6, 9, generator=draw, dtype=torch.float64).requires_grad_()


def test_total_loss_is_the_weighted_sum_of_its_parts():
    batch = toy_batch()
    va, logits = random_output()
    loss, parts = total_loss(Output(va, logits), batch, kl_weight=0.2, centers=0.7, sigma=0.5, mse_weight=3.0)
    both = batch.labelled.all(-1)
    expected = {
        "ccc": ccc_loss(va, batch.target, batch.labelled),
        "kl": prompt_loss(logits, batch.target, both, centers=0.7, sigma=0.5),
        "mse": (va - batch.target)[batch.labelled].square().mean(),
    }
    assert set(parts) == {*expected, "total"}
    assert not any(part.requires_grad for part in parts.values())
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value.detach())
    torch.testing.assert_close(loss, expected["ccc"] + 0.2 * expected["kl"] + 3 * expected["mse"])
    assert loss.requires_grad  # a detached loss has no gradient


def test_total_loss_without_prompts_is_the_ccc_loss():
    batch = toy_batch()
    va, logits = random_output()
    bare, parts = total_loss(Output(va, None), batch, kl_weight=0.2)
    assert set(parts) == {"ccc", "total"}
    unweighted, parts = total_loss(Output(va, logits), batch, kl_weight=0.0)
    torch.testing.assert_close(bare, unweighted)
    assert "kl" in parts  # still reported
    (gradient,) = torch.autograd.grad(unweighted, logits, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("junk", [1e6, float("nan")])
def test_padding_and_missing_labels_change_neither_loss_nor_gradient(junk):
    batch = toy_batch()
    padded = pad_more(batch, 3, junk)
    padded.target[:, :6][~batch.labelled] = junk
    results = []
    for case in (batch, padded):
        va, logits = random_output()
        grown = [torch.nn.functional.pad(t, (0, 0, 0, case.inside.shape[1] - 6), value=junk) for t in (va, logits)]
        loss, _ = total_loss(Output(grown[0], grown[1]), case, kl_weight=0.2, mse_weight=1.0)
        results.append([loss.detach(), *torch.autograd.grad(loss, [va, logits])])
    for plain, with_padding in zip(*results, strict=True):
        assert torch.isfinite(plain).all()
        torch.testing.assert_close(with_padding, plain)
    assert (results[1][1][~batch.labelled] == 0).all()


def test_squared_error_without_values_is_zero():
    assert masked_mse(torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)) == 0
