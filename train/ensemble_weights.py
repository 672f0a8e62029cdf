"""Weights of the runs of an ensemble: by the CCC of each, or those whose mixture has the best CCC."""

import numpy as np

from vaflow.timeline import Floats

_ROUNDS, _STEPS = 60, 2000
_ENOUGH = 1e-12  # change of the concordance below which the search stops


def concordance_weights(ccc: Floats) -> Floats:
    """Weights proportional to each run's CCC, [N] -> [N]; a CCC at or below 0 gives 0, equal weights if all are."""
    worth = np.clip(np.nan_to_num(np.asarray(ccc, np.float64)), 0, None)
    total = worth.sum()
    return worth / total if total > 0 else np.full(len(worth), 1 / len(worth))


def best_weights(prediction: Floats, label: Floats) -> Floats:
    """Weights whose mixture has the highest CCC with the labels.

    For weights w on the simplex CCC = 2 c'w / w'Qw, with Q positive semidefinite: a linear function over a convex one,
    so a local maximum above 0 is the global one. Dinkelbach's method turns it into quadratic problems, which projected
    gradients solve.

    Args:
        prediction: [T, N], of N runs.
        label: [T].

    Returns:
        [N]. The best single run if no mixture is above 0.

    Raises:
        ValueError: shapes disagree, or there is no label.
    """
    x, y = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not x.size:
        raise ValueError(f"best_weights: expected predictions [T, N] and labels [T]; got {[*x.shape]}, {[*y.shape]}")
    # c and Q for weights that sum to one
    mean = x.mean(axis=0)
    dx, dy = x - mean, y - y.mean()
    apart = mean - y.mean()
    linear = dx.T @ dy / len(y)
    quadratic = dx.T @ dx / len(y) + np.outer(apart, apart) + dy @ dy / len(y)
    runs = x.shape[1]

    def ccc(w: Floats) -> float:
        spread = w @ quadratic @ w
        return float(2 * linear @ w / spread) if spread > 0 else 0.0

    weights = max(np.eye(runs), key=ccc)
    for _ in range(_ROUNDS):
        before = ccc(weights)
        if before <= 0:
            break
        better = maximize(linear, before * quadratic, weights)
        if ccc(better) <= before + _ENOUGH:
            break
        weights = better
    return weights


def maximize(linear: Floats, quadratic: Floats, start: Floats) -> Floats:
    """Maximize 2 linear'w - w'quadratic w over w on the simplex, by accelerated projected gradients."""
    # Only differences matter along the simplex.
    centred = quadratic - quadratic.mean(axis=0) - quadratic.mean(axis=1, keepdims=True) + quadratic.mean()
    curvature = float(np.linalg.norm(centred, 2))
    if curvature <= _ENOUGH * float(np.linalg.norm(quadratic, 2)):
        return start  # the runs agree
    step = 1 / curvature
    w, ahead, speed = start, start, 1.0
    for _ in range(_STEPS):
        following = onto_simplex(ahead + step * (linear - quadratic @ ahead))
        faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
        back = (ahead - following) @ (following - w) > 0  # the score has dropped: restart the acceleration
        ahead = following if back else following + (speed - 1) / faster * (following - w)
        speed = 1.0 if back else faster
        if np.abs(following - w).max() < _ENOUGH and not back:
            return following
        w = following
    return w


def onto_simplex(point: Floats) -> Floats:
    """Project a point onto the simplex (non-negative, sum 1), [N] -> [N]."""
    high = np.sort(point)[::-1]
    over = (np.cumsum(high) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - over[high > over][-1], 0)
