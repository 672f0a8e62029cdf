"""Agreement of annotators, their reaction lag, and fusion: arrays in, numbers out.

`ratings` is [K, N]: K annotators, N instants of one dimension, without NaN.
"""

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from vaflow.timeline import Floats


def pairwise_ccc(ratings: ArrayLike) -> Floats:
    """Concordance of every pair of annotators, [K, K], population variance; 1 on the diagonal."""
    x = np.asarray(ratings, np.float64)
    mean, spread = x.mean(axis=1), x.var(axis=1)
    covariance = np.atleast_2d(np.cov(x, bias=True))
    below = spread[:, None] + spread[None] + np.square(mean[:, None] - mean[None])
    ccc = np.where(below > 0, 2 * covariance / np.where(below > 0, below, 1), 0.0)
    np.fill_diagonal(ccc, 1.0)
    return ccc


def icc(ratings: ArrayLike) -> dict[str, float]:
    """Intraclass correlations of two-way models; NaN without variance or with fewer than two annotators.

    Returns:
        "ICC(2,1)", "ICC(2,k)": absolute agreement of one annotator and of the mean of all; "ICC(3,1)", "ICC(3,k)":
        consistency of the same.

    Source: Shrout and Fleiss, "Intraclass correlations: uses in assessing rater reliability", 1979.
    """
    x = np.asarray(ratings, np.float64).T  # [N, K]: targets by judges
    n, k = x.shape
    names = ("ICC(2,1)", "ICC(2,k)", "ICC(3,1)", "ICC(3,k)")
    if n < 2 or k < 2:
        return dict.fromkeys(names, float("nan"))
    mean = x.mean()
    targets = k * np.square(x.mean(axis=1) - mean).sum() / (n - 1)
    judges = n * np.square(x.mean(axis=0) - mean).sum() / (k - 1)
    total = np.square(x - mean).sum()
    error = (total - targets * (n - 1) - judges * (k - 1)) / ((n - 1) * (k - 1))
    above = targets - error
    below = (
        targets + (k - 1) * error + k * (judges - error) / n,
        targets + (judges - error) / n,
        targets + (k - 1) * error,
        targets,
    )
    return {name: float(above / b) if b > 0 else float("nan") for name, b in zip(names, below, strict=True)}


def cohen_kappa(one: ArrayLike, other: ArrayLike, categories: int = 9) -> float:
    """Agreement of two sequences of categories beyond chance; NaN where chance alone agrees everywhere."""
    a, b = np.asarray(one, int), np.asarray(other, int)
    table = np.bincount(categories * a + b, minlength=categories**2).reshape(categories, categories) / max(1, a.size)
    chance = float(table.sum(axis=1) @ table.sum(axis=0))
    return float((np.trace(table) - chance) / (1 - chance)) if chance < 1 else float("nan")


def mean_kappa(regions: ArrayLike) -> float:
    """Mean of Cohen's kappa over pairs of annotators; regions [K, N]."""
    table = np.asarray(regions, int)
    values = [cohen_kappa(table[i], table[j]) for i, j in combinations(range(len(table)), 2)]
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def delay(reference: Floats, late: Floats, most: int) -> int:
    """Samples by which `late` follows `reference`, in [-most, most]: where their correlation is highest.

    Args:
        reference, late: [D, N], all dimensions; correlations are averaged over the dimensions that vary.
        most: largest delay that is tried; at least half of the samples overlap.
    """
    length = reference.shape[-1]
    best, lag = -np.inf, 0
    for shift in sorted(range(-min(most, length // 2), min(most, length // 2) + 1), key=abs):
        a = reference[:, max(0, -shift) : length - max(0, shift)]
        b = late[:, max(0, shift) : length - max(0, -shift)]
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
        spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        varies = spread > 1e-12
        if varies.any():
            correlation = float(((a * b).sum(axis=1)[varies] / spread[varies]).mean())
            if correlation > best + 1e-12:
                best, lag = correlation, shift
    return lag


def evaluator_weights(ratings: ArrayLike) -> Floats:
    """Weight of each annotator in the evaluator-weighted estimator, [K], sums to 1.

    The weight is the correlation with the mean of all annotators; negative ones count as 0. Equal weights where no
    annotator correlates.

    Source: Grimm and Kroschel, "Evaluation of natural emotions using self assessment manikins", 2005.
    """
    x = np.asarray(ratings, np.float64)
    centred, mean = x - x.mean(axis=1, keepdims=True), x.mean(axis=0) - x.mean()
    below = np.sqrt((centred**2).sum(axis=1) * (mean**2).sum())
    weight = np.maximum(0, np.where(below > 1e-12, centred @ mean / np.where(below > 1e-12, below, 1), 0.0))
    return weight / weight.sum() if weight.sum() > 0 else np.full(len(x), 1 / len(x))
