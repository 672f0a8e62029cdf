"""Loss functions: concordance and the distance-aware prompt loss (arXiv 2603.13415, eq. 2 and 6).

Masked entries do not contribute and receive no gradient; they can hold any value, including NaN.
"""

import math
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaflow.errors import UsageError, explain
from vaflow.train.batch import Batch, Output, extra_loss

CENTERS, SIGMA, KL_WEIGHT = 0.66, 0.45, 0.2  # the full model of the paper's tables
REGIONS = 9
LOSS_SETTINGS = ("kl_weight", "centers", "sigma", "mse_weight", "ccc_weight", "extra_weight", "nll_weight")
BETA = 0.5  # of the likelihood in training
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)

Array = NDArray[Any]


@overload
def ccc(prediction: Tensor, target: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor: ...
@overload
def ccc(prediction: Array, target: Array, mask: Array | None = None, eps: float = 1e-8) -> NDArray[np.float64]: ...
def ccc(prediction: Any, target: Any, mask: Any = None, eps: float = 1e-8) -> Any:
    """Concordance correlation of each dimension over all masked entries, flattened; population variance.

    Args:
        prediction: [..., 2]; a tensor or array-like.
        target: [..., 2], of the same kind.
        mask: [...] or [..., 2] bool: entries to include; None: all.
        eps: added to the denominator, so that constants give a number.

    Returns:
        [2], in at least float32 for tensors and in float64 otherwise. 0 for a constant target; NaN if the mask
        includes no entry.

    Raises:
        ValueError: shapes disagree.
    """
    if not isinstance(prediction, Tensor):
        arrays = [None if item is None else torch.from_numpy(np.array(item)) for item in (prediction, target, mask)]
        return ccc(_double(arrays[0]), _double(arrays[1]), arrays[2], eps).numpy()
    value, count = _concordance(prediction, target, mask, eps)
    return torch.where(count > 0, value, torch.nan)


def ccc_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - mean CCC over the labelled dimensions; the first term of eq. 6.

    Args:
        prediction: [..., 2].
        target: [..., 2].
        mask: [...] or [..., 2] bool: labelled and not padding.

    Returns:
        A scalar in [0, 2]. Constant labels give 1 with zero gradient, no labels at all give 0 with zero gradient.

    Raises:
        ValueError: shapes disagree.
    """
    value, count = _concordance(prediction, target, mask, 1e-8)
    present = (count > 0).to(value.dtype)
    return (present * (1 - value)).sum() / present.sum().clamp(min=1)


def _concordance(prediction: Tensor, target: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """CCC [2] (0 without entries) and the number of included entries [2]."""
    prediction, target, mask = _flat(prediction, target, mask)
    # Relative to one label, constant labels are exactly 0, so that rounding of their mean does not enter the gradient.
    origin = target.detach().masked_fill(~mask, torch.inf).amin(dim=0) if len(target) else target.new_zeros(2)
    origin = origin.nan_to_num(nan=0, posinf=0, neginf=0)
    count = mask.sum(dim=0)
    n = count.clamp(min=1).to(prediction.dtype)
    y = torch.where(mask, target - origin, 0)
    y = (y - y.sum(dim=0) / n) * mask
    error = torch.where(mask, prediction - target, 0)
    # Var x + var y + (mean x - mean y)^2 = E (x - y)^2 + 2 cov; here all are multiplied by n, and x keeps its mean.
    covariance = 2 * ((error + y) * y).sum(dim=0)
    return covariance / (error.square().sum(dim=0) + covariance + eps * n), count


def _flat(prediction: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All three as [N, 2], the numbers in float32 or better."""
    if prediction.shape != target.shape or prediction.shape[-1:] != (2,):
        raise ValueError(
            f"ccc: prediction and target must both be [..., 2]; got {[*prediction.shape]} and {[*target.shape]}"
        )
    if mask is None:
        mask = torch.ones_like(target, dtype=torch.bool)
    elif mask.shape == prediction.shape[:-1]:
        mask = mask.unsqueeze(-1).expand(prediction.shape)
    elif mask.shape != prediction.shape:
        raise ValueError(f"ccc: the mask must be [...] or [..., 2] of {[*prediction.shape]}; got {[*mask.shape]}")
    kind = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(kind).reshape(-1, 2), target.to(kind).reshape(-1, 2), mask.to(torch.bool).reshape(-1, 2)


def _double(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("ccc: prediction and target are required")
    return tensor.to(torch.float64)


def _levels(centers: float | Tensor, like: Tensor) -> Tensor:
    """The coordinates of the centres in each dimension, [3], created on the device of `like`.

    Region 3 * v + a has the centre (levels[v], levels[a]), with v, a in (low, middle, high).
    """
    _positive("centers", centers)
    return centers * torch.arange(-1, 2, dtype=like.dtype, device=like.device)


@overload
def soft_labels(va: Tensor, centers: float | Tensor = CENTERS, sigma: float | Tensor = SIGMA) -> Tensor: ...
@overload
def soft_labels(va: Array, centers: float = CENTERS, sigma: float = SIGMA) -> NDArray[np.float64]: ...
def soft_labels(va: Any, centers: float | Tensor = CENTERS, sigma: float | Tensor = SIGMA) -> Any:
    """Soft region labels: softmax of -|y - c|^2 / (2 sigma^2) over the nine centres (eq. 2).

    Args:
        va: [..., 2] valence and arousal; a tensor or array-like.
        centers: distance of the outer centres from 0.
        sigma: width of the Gaussian, in the units of `va`.

    Returns:
        [..., 9], sums to 1, region 3 * v + a with v, a in (low, middle, high).

    Raises:
        UsageError: `centers` or `sigma` is not above 0.
        ValueError: the last axis is not 2.
    """
    if not isinstance(va, Tensor):
        return soft_labels(torch.from_numpy(np.array(va, np.float64)), centers, sigma).numpy()
    _positive("sigma", sigma)
    return _log_softmax(_squared_distances(va, centers) * (-0.5 / sigma**2)).exp()


def _log_softmax(scores: Tensor) -> Tensor:
    """`log_softmax` over the last axis; PyTorch's takes two to four times as long over so few values on a CPU."""
    return scores - scores.logsumexp(dim=-1, keepdim=True)


def hard_labels(va: Tensor, centers: float | Tensor = CENTERS) -> Tensor:
    """One-hot of the nearest centre, [..., 2] -> [..., 9]; of equally near ones, the lowest region.

    Raises:
        UsageError: `centers` is not above 0.
        ValueError: the last axis is not 2.
    """
    distance = _squared_distances(va, centers)
    nearest = distance <= distance.amin(dim=-1, keepdim=True)
    first = nearest & (nearest.cumsum(dim=-1) == 1)
    return first.to(distance.dtype)


def _squared_distances(va: Tensor, centers: float | Tensor) -> Tensor:
    if va.shape[-1:] != (2,):
        raise ValueError(f"region labels need points [..., 2]; got {[*va.shape]}")
    va = va.to(torch.promote_types(va.dtype, torch.float32))
    squares = (va.unsqueeze(-1) - _levels(centers, va)).square()  # [..., 2, 3]
    return (squares[..., 0, :, None] + squares[..., 1, None, :]).flatten(-2)


def prompt_loss(
    region_logits: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    centers: float | Tensor = CENTERS,
    sigma: float | Tensor = SIGMA,
    hard: bool = False,
) -> Tensor:
    """KL(w || softmax(logits)), summed over the nine regions, mean over the masked frames; the second term of eq. 6.

    Args:
        region_logits: [B, F, 9].
        target: [B, F, 2].
        mask: [B, F] bool: labelled in both dimensions and not padding.
        centers: distance of the outer centres from 0.
        sigma: width of the soft labels.
        hard: the nearest region alone instead of soft labels (then this is cross-entropy).

    Returns:
        A scalar >= 0; 0 with zero gradient if the mask includes no frame.

    Raises:
        UsageError: `centers` or `sigma` is not above 0.
        ValueError: shapes disagree.
    """
    frames = mask.shape
    if region_logits.shape != (*frames, REGIONS) or target.shape != (*frames, 2):
        raise ValueError(
            "prompt_loss: expected logits [B, F, 9], target [B, F, 2] and mask [B, F]; "
            f"got {[*region_logits.shape]}, {[*target.shape]} and {[*frames]}"
        )
    chosen = mask.unsqueeze(-1)
    logits = torch.where(chosen, region_logits, 0).to(torch.promote_types(region_logits.dtype, torch.float32))
    va = torch.where(chosen, target, 0)
    weights = hard_labels(va, centers) if hard else soft_labels(va, centers, sigma)
    divergence = torch.special.xlogy(weights, weights) - weights * _log_softmax(logits)
    return (divergence * chosen).sum() / mask.sum().clamp(min=1)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the entries where `mask` is True; [..., 2] each -> scalar, 0 without entries."""
    prediction, target, mask = _flat(prediction, target, mask)
    return torch.where(mask, prediction - target, 0).square().sum() / mask.sum().clamp(min=1)


def gaussian_nll(mean: Tensor, log_std: Tensor, target: Tensor, mask: Tensor, *, beta: float = 0.0) -> Tensor:
    """Negative log-likelihood of a Gaussian, mean over the entries where `mask` is True.

    With `beta` the term of each entry is multiplied by std ** (2 beta), through which no gradient flows: otherwise
    entries with a small variance dominate (Seitzer et al. 2022, arXiv 2203.09168).

    Args:
        mean, log_std, target: [..., 2].
        mask: [..., 2] bool.
        beta: 0 for the likelihood itself.

    Returns:
        A scalar; 0 with zero gradient without entries.
    """
    mean, target, labelled = _flat(mean, target, mask)
    log_std = torch.where(labelled, log_std.reshape(-1, 2).to(mean.dtype), 0)
    error = torch.where(labelled, mean - target, 0)
    terms = log_std + 0.5 * (error * torch.exp(-log_std)).square() + HALF_LOG_2_PI
    if beta:
        terms = terms * torch.exp(2 * beta * log_std.detach())
    return torch.where(labelled, terms, 0).sum() / labelled.sum().clamp(min=1)


def total_loss(
    output: Output,
    batch: Batch,
    *,
    kl_weight: float | Tensor = KL_WEIGHT,
    centers: float | Tensor = CENTERS,
    sigma: float | Tensor = SIGMA,
    hard: bool = False,
    mse_weight: float | Tensor = 0.0,
    ccc_weight: float | Tensor = 1.0,
    extra_weight: float | Tensor = 0.0,
    nll_weight: float | Tensor = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = ccc_weight * L_CCC + kl_weight * L_KL (eq. 6), plus mse_weight * MSE and the loss of a variance head.

    The variance head is trained on the errors of the predictions, which receive no gradient from it; `nll_weight` adds
    the likelihood as a loss of the predictions.

    A number may be a scalar tensor, so that `torch.vmap` can give every run its own.

    Args:
        output: output of the model; without region logits, the loss has no KL term.
        batch: targets and their mask.
        kl_weight: lambda of eq. 6.
        centers: distance of the outer region centres from 0.
        sigma: width of the soft labels.
        hard: hard region labels instead of soft ones.
        mse_weight: weight of the squared error (0 in the paper).
        ccc_weight: weight of the concordance (1 in the paper).
        extra_weight: weight of the cross-entropy of each further target.
        nll_weight: weight of the Gaussian likelihood in the predictions.

    Returns:
        The loss, a scalar, and its unweighted parts `ccc`, `kl`, `mse`, `nll` (if computed) and `total`, detached
        scalars on the same device.

    Raises:
        UsageError: `centers` or `sigma` is not above 0.
        ValueError: shapes disagree.
    """
    parts = {"ccc": ccc_loss(output.va, batch.target, batch.labelled)}
    loss = ccc_weight * parts["ccc"]
    if output.region_logits is not None:
        both = batch.labelled.all(dim=-1)
        parts["kl"] = prompt_loss(output.region_logits, batch.target, both, centers=centers, sigma=sigma, hard=hard)
        if isinstance(kl_weight, Tensor) or kl_weight:
            loss = loss + kl_weight * parts["kl"]
    if isinstance(mse_weight, Tensor) or mse_weight:
        parts["mse"] = masked_mse(output.va, batch.target, batch.labelled)
        loss = loss + mse_weight * parts["mse"]
    for name, logits in output.extra.items():
        if name in batch.extra:
            loss = loss + extra_weight * extra_loss(logits, batch.extra[name])
    if output.log_std is not None:
        pair = batch.target, batch.labelled
        parts["nll"] = gaussian_nll(output.va.detach(), output.log_std.detach(), *pair)
        loss = loss + gaussian_nll(output.va.detach(), output.log_std, *pair, beta=BETA)
        if isinstance(nll_weight, Tensor) or nll_weight:
            loss = loss + nll_weight * gaussian_nll(output.va, output.log_std.detach(), *pair, beta=BETA)
    return loss, {name: part.detach() for name, part in {**parts, "total": loss}.items()}


def _positive(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not (np.isfinite(value) and value > 0):
        raise UsageError(explain(f"{name} must be positive", expected="a number above 0", got=value))
