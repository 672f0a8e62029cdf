"""How much each run counts in an ensemble, per dimension: weights that are not negative and sum to one."""

import numpy as np

from vaflow.timeline import Floats

_ROUNDS, _STEPS = 60, 2000
_ENOUGH = 1e-12  # change of the concordance below which the search has ended


def concordance_weights(ccc: Floats) -> Floats:
    """Weights in proportion to each run's concordance, [N] -> [N]; those at or below 0 count only where all are."""
    worth = np.clip(np.nan_to_num(np.asarray(ccc, np.float64)), 0, None)
    total = worth.sum()
    return worth / total if total > 0 else np.full(len(worth), 1 / len(worth))


def best_weights(prediction: Floats, label: Floats) -> Floats:
    """The weights whose mixture has the highest concordance with the labels.

    For weights w on the simplex CCC = 2 c'w / w'Qw, with Q positive semidefinite: a linear function over a convex one,
    so a local maximum above 0 is the global one. Dinkelbach's method makes quadratic problems of it, which projected
    gradients solve.

    Args:
        prediction: [T, N], what each of N runs says.
        label: [T].

    Returns:
        [N]. The best single run where no mixture is better than 0.

    Raises:
        ValueError: shapes disagree, or there is nothing to learn from.
    """
    x, y = np.asarray(prediction, np.float64), np.asarray(label, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or not x.size:
        raise ValueError(f"best_weights: expected predictions [T, N] and labels [T]; got {[*x.shape]}, {[*y.shape]}")
    linear, quadratic = _terms(x, y)
    runs = x.shape[1]

    def ccc(w: Floats) -> float:
        spread = w @ quadratic @ w
        return float(2 * linear @ w / spread) if spread > 0 else 0.0

    weights = max(np.eye(runs), key=ccc)
    for _ in range(_ROUNDS):
        before = ccc(weights)
        if before <= 0:
            break
        found = _maximum(linear, before * quadratic, weights)
        if ccc(found) <= before + _ENOUGH:
            break
        weights = found
    return weights


def _terms(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """c and the matrix Q with CCC(w) = 2 c'w / w'Qw for weights that sum to one."""
    mean = x.mean(axis=0)
    dx, dy = x - mean, y - y.mean()
    apart = mean - y.mean()
    return dx.T @ dy / len(y), dx.T @ dx / len(y) + np.outer(apart, apart) + dy @ dy / len(y)


def _maximum(linear: Floats, quadratic: Floats, start: Floats) -> Floats:
    """The w on the simplex that maximises 2 linear'w - w'quadratic w, by accelerated projected gradients."""
    # Along the simplex only differences count.
    centred = quadratic - quadratic.mean(axis=0) - quadratic.mean(axis=1, keepdims=True) + quadratic.mean()
    curvature = float(np.linalg.norm(centred, 2))
    if curvature <= _ENOUGH * float(np.linalg.norm(quadratic, 2)):
        return start  # the runs say the same
    step = 1 / curvature
    w, ahead, speed = start, start, 1.0
    for _ in range(_STEPS):
        found = onto_simplex(ahead + step * (linear - quadratic @ ahead))
        faster = (1 + np.sqrt(1 + 4 * speed**2)) / 2
        back = (ahead - found) @ (found - w) > 0  # uphill no longer: begin the acceleration anew
        ahead = found if back else found + (speed - 1) / faster * (found - w)
        speed = 1.0 if back else faster
        if np.abs(found - w).max() < _ENOUGH and not back:
            return found
        w = found
    return w


def onto_simplex(point: Floats) -> Floats:
    """The nearest weights, not negative and summing to one, [N] -> [N]."""
    high = np.sort(point)[::-1]
    over = (np.cumsum(high) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - over[high > over][-1], 0)
