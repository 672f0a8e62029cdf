"""Agreement of predictions with labels, bootstrap intervals over videos and paired tests, in NumPy and float64.

Everywhere `prediction` and `target` are [..., 2] (valence, arousal) and `mask` is [...] or [..., 2] bool, True where
labelled; None means everywhere. Masked values may be anything, NaN too. Results are per dimension, [2], and NaN where
nothing is labelled.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vaflow.errors import UsageError, count, explain
from vaflow.timeline import Bools, Floats, Ints

DIMENSIONS = ("valence", "arousal")
SCORES = (*DIMENSIONS, "mean")
MOMENTS = 6  # count, sum x, sum y, sum xx, sum yy, sum xy
BINS = 3  # of intensity
RESAMPLES = 10_000  # of videos


def concordance(prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> Floats:
    """Concordance correlation with population variance over all labelled entries together (the ABAW metric), [2].

    0 where prediction and target are both constant, even if they agree: the CCC is undefined there.

    Raises:
        ValueError: shapes disagree.
    """
    return np.array([_concordance(x, y) for x, y in _columns(prediction, target, mask)])


def pearson(prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> Floats:
    """Pearson correlation over all labelled entries together, [2]; 0 where either is constant.

    Raises:
        ValueError: shapes disagree.
    """
    correlations = []
    for x, y in _columns(prediction, target, mask):
        if not x.size:
            correlations.append(np.nan)
            continue
        dx, dy = x - x[0], y - y[0]  # relative to one entry, constants are exactly constant
        dx, dy = dx - dx.mean(), dy - dy.mean()
        spread = np.sqrt((dx @ dx) * (dy @ dy))
        correlations.append(float(dx @ dy / spread) if spread > 0 else 0.0)
    return np.array(correlations)


def rmse(prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> Floats:
    """Root mean squared error over all labelled entries together, [2].

    Raises:
        ValueError: shapes disagree.
    """
    columns = _columns(prediction, target, mask)
    return np.array([np.sqrt(np.mean((x - y) ** 2)) if x.size else np.nan for x, y in columns])


def mean_over_dimensions(values: ArrayLike) -> Floats:
    """[..., 2] -> [...]: the mean over the finite dimensions; NaN where none is."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    count = finite.sum(axis=-1)
    return np.where(count > 0, np.where(finite, values, 0.0).sum(axis=-1) / np.maximum(count, 1), np.nan)


Group = tuple[ArrayLike, ArrayLike, ArrayLike | None]


def within_video_ccc(groups: Iterable[Group]) -> tuple[Floats, Ints]:
    """Unweighted mean over videos of the concordance within each.

    Args:
        groups: one (prediction [N, 2], target [N, 2], mask) per video.

    Returns:
        The mean, [2], NaN where no video counts; and how many videos do not count, [2]: those whose labels in that
        dimension are constant or missing, for which no prediction could score.

    Raises:
        ValueError: shapes disagree.
    """
    scores: list[list[float]] = [[], []]
    excluded = np.zeros(2, np.int64)
    for prediction, target, mask in groups:
        for k, (x, y) in enumerate(_columns(prediction, target, mask)):
            if y.size == 0 or y.min() == y.max():
                excluded[k] += 1
            else:
                scores[k].append(_concordance(x, y))
    return np.array([np.mean(s) if s else np.nan for s in scores]), excluded


def video_moments(prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None) -> Floats:
    """Sufficient statistics of one video's concordance, [6, 2]: count and sums of x, y, xx, yy, xy.

    Moments of videos add up: the concordance of any set of videos is that of their summed moments.

    Raises:
        ValueError: shapes disagree.
    """
    # Not `x @ y`: BLAS starts threads for long vectors, and they wait for each other on a busy machine.
    columns = [
        [x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        for x, y in _columns(prediction, target, mask)
    ]
    return np.array(columns, np.float64).T


def concordance_of_moments(moments: Floats) -> Floats:
    """[..., 6, 2] -> [..., 2]; NaN where the count is 0, 0 where both sides are constant."""
    count, x, y, xx, yy, xy = np.moveaxis(np.asarray(moments, np.float64), -2, 0)
    n = np.maximum(count, 1)
    mean_x, mean_y = x / n, y / n
    spread = (xx + yy) / n - mean_x**2 - mean_y**2 + (mean_x - mean_y) ** 2
    # A variance within the rounding error counts as 0.
    some = spread > 64 * np.finfo(np.float64).eps * np.maximum((xx + yy) / n, np.finfo(np.float64).tiny)
    value = np.where(some, 2 * (xy / n - mean_x * mean_y) / np.where(some, spread, 1), 0.0)
    return np.where(count > 0, value, np.nan)


def smoothness(value: ArrayLike, time: ArrayLike) -> Floats:
    """Mean absolute change of a trace per second, [K]. Lower is smoother. NaN where the trace lasts no time.

    Args:
        value: [N, K].
        time: [N] seconds, ascending.

    Raises:
        ValueError: shapes disagree.
    """
    value, time = np.asarray(value, np.float64), np.asarray(time, np.float64)
    if value.ndim != 2 or time.shape != value.shape[:1]:
        raise ValueError(f"smoothness: expected value [N, K] and time [N]; got {[*value.shape]} and {[*time.shape]}")
    lasting = time[-1] - time[0] if time.size else 0.0
    if not lasting > 0:
        return np.full(value.shape[1], np.nan)
    return np.abs(np.diff(value, axis=0)).sum(axis=0) / lasting


def by_intensity(prediction: Floats, label: Floats, valid: Bools) -> dict[str, list[dict[str, Any]]]:
    """CCC and error per dimension in up to three bins of |label| with about equal numbers of frames.

    Labels vary less within a bin than overall, so its CCC is lower than the overall one: compare bins with each other,
    by their error first. arXiv 2503.10523 lists intensity among its limitations; neither paper measures it.

    Args:
        prediction, label: [N, 2]; valid: [N, 2] labelled.

    Returns:
        dimension -> bins from weak to strong: {"from", "to" (|label|, both included), "n_frames", "ccc", "rmse",
        "bias" (mean of sign(label) * (prediction - label): below 0 where intensity is underestimated)}.
    """
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in DIMENSIONS}
    for k, name in enumerate(DIMENSIONS):
        x, y = prediction[valid[:, k], k], label[valid[:, k], k]
        for mask in intensity_bins(y):
            p, t = x[mask], y[mask]
            result[name].append(
                {
                    "from": float(np.abs(t).min()),
                    "to": float(np.abs(t).max()),
                    "n_frames": len(t),
                    "ccc": plain(_concordance(p, t)),
                    "rmse": plain(np.sqrt(np.mean((p - t) ** 2))),
                    "bias": float(np.mean(np.sign(t) * (p - t))),
                }
            )
    return result


def intensity_bins(label: Floats) -> list[Bools]:
    """Masks [N] that divide labels [N] by |label| at its quantiles; empty bins are left out."""
    strength = np.abs(label)
    if not strength.size:
        return []
    edges = np.unique(np.quantile(strength, np.arange(1, BINS) / BINS))
    level = np.searchsorted(edges, strength)  # an edge belongs to the lower bin
    return [level == number for number in range(len(edges) + 1) if (level == number).any()]


def region_occupancy(target: ArrayLike, mask: ArrayLike | None = None, centers: float = 0.66) -> Floats:
    """Share of the frames labelled in both dimensions that lie nearest to each region's center, [9], sums to 1.

    NaN where no frame is labelled in both.

    Raises:
        UsageError: `centers` is not above 0.
        ValueError: shapes disagree.
    """
    if not (np.isfinite(centers) and centers > 0):
        raise UsageError(explain("centers must be positive", expected="a number above 0", got=centers))
    y, _, labelled = _pair(target, target, mask)
    y = y[labelled.all(axis=-1)]
    if not len(y):
        return np.full(9, np.nan)
    return np.bincount(region_of(y, centers), minlength=9) / len(y)


def region_of(va: Floats, centers: float) -> Ints:
    """[..., 2] -> [...] region 3 * valence level + arousal level; borders lie half-way between centers.

    A point on a border is in the lower region, as in `hard_labels`: labels are stored, and compared here, as float32.
    """
    va = np.asarray(va, np.float32)
    level = (va > -centers / 2).astype(np.int64) + (va > centers / 2)
    return 3 * level[..., 0] + level[..., 1]


def _concordance(x: Floats, y: Floats) -> float:
    if not x.size:
        return float("nan")
    x, y = x - y[0], y - y[0]  # relative to one label, constants are exactly constant
    dx, dy = x - x.mean(), y - y.mean()
    spread = np.mean(dx * dx) + np.mean(dy * dy) + (x.mean() - y.mean()) ** 2
    return float(2 * np.mean(dx * dy) / spread) if spread > 0 else 0.0


def _columns(prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None) -> list[tuple[Floats, Floats]]:
    """The labelled entries of each dimension: [(x [N_v], y [N_v]), (x [N_a], y [N_a])]."""
    x, y, labelled = _pair(prediction, target, mask)
    return [(x[labelled[:, k], k], y[labelled[:, k], k]) for k in range(2)]


def _pair(prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None) -> tuple[Floats, Floats, Bools]:
    """All three as [N, 2]."""
    x, y = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    if x.shape != y.shape or x.shape[-1:] != (2,):
        raise ValueError(f"prediction and target must both be [..., 2]; got {[*x.shape]} and {[*y.shape]}")
    labelled = np.ones(x.shape, bool) if mask is None else np.asarray(mask, bool)
    if labelled.shape == x.shape[:-1]:
        labelled = np.broadcast_to(labelled[..., None], x.shape)
    if labelled.shape != x.shape:
        raise ValueError(f"the mask must be [...] or [..., 2] of {[*x.shape]}; got {[*labelled.shape]}")
    return x.reshape(-1, 2), y.reshape(-1, 2), labelled.reshape(-1, 2)


def by_dimension(values: Floats, *, mean: bool = False) -> dict[str, Any]:
    """[2] -> {"valence", "arousal"} and their mean where wanted; None where a number is not finite."""
    named = {name: plain(value) for name, value in zip(DIMENSIONS, values, strict=True)}
    return named | ({"mean": plain(mean_over_dimensions(values))} if mean else {})


def plain(value: Any) -> float | None:
    """A number for JSON: None where it is not finite."""
    number = float(value)
    return number if np.isfinite(number) else None


def scope(metrics: Mapping[str, Any]) -> str:
    """What the scores in `metrics.json` are of: split, frames, videos, what is left out, and the smoothing."""
    text = f"{metrics['split']}: {metrics['n_frames']} labelled frames of {count(metrics['n_videos'], 'video')}"
    missing = metrics.get("missing") or {"frames": 0, "clips": []}
    if missing["frames"] or missing["clips"]:
        clips = count(len(missing["clips"]), "clip")
        text += f"; left out: {count(missing['frames'], 'frame')}, {clips} without features"
    if "without" in metrics:
        text += f"; without {metrics['without']}"
    if "smoothing" in metrics:
        text += f"; smoothed: {smoothing_text(metrics['smoothing'])}"
        if metrics["smoothing"]["chosen_on"] == metrics["split"]:
            text += ", tuned on this split; the score is optimistic"
    return text


def smoothing_text(smoothing: Mapping[str, Any]) -> str:
    """Kind and width of a smoothing as `metrics.json` states it: "mean, 8 s"."""
    return f"{smoothing['kind']}, {smoothing['seconds']:g} s"


def bootstrap_interval(
    moments: Sequence[Floats] | Floats, *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> Floats:
    """Percentile interval [low, high] of the concordance under resampling whole videos with replacement, [3, 2].

    Rows are valence, arousal and their mean.

    Frames of a video are not independent, so videos are resampled. Exact, because moments are additive. NaN in a
    dimension without labels.

    Args:
        moments: [V, 6, 2], `video_moments` of every video.
        resamples: how many samples of V videos are drawn.
        level: share of them inside the interval.
        seed: of the draws; equal seeds give equal intervals.

    Raises:
        UsageError: no video, no resample, or a level outside (0, 1).
        ValueError: moments are not [V, 6, 2].
    """
    table = np.asarray(moments, np.float64)
    if not (len(table) and resamples >= 1 and 0 < level < 1):
        expected = "at least one video and one resample, and a level between 0 and 1"
        got = f"{len(table)} videos, {resamples} resamples, level {level}"
        raise UsageError(explain("A bootstrap needs videos to draw from", expected=expected, got=got))
    if table.shape[1:] != (MOMENTS, 2):
        raise ValueError(f"moments must be [V, {MOMENTS}, 2]; got {[*table.shape]}")
    ccc = concordance_of_moments(_resampled(table, resamples, np.random.default_rng(seed)))
    return percentile_interval(np.column_stack([ccc, mean_over_dimensions(ccc)]), level)


def percentile_interval(values: Floats, level: float = 0.95) -> Floats:
    """[R, K] -> [K, 2]: the percentile interval of each column; NaN where a column has no number."""
    edges = ((1 - level) / 2, (1 + level) / 2)
    finite = [column[np.isfinite(column)] for column in values.T]
    return np.array([np.quantile(c, edges) if c.size else (np.nan, np.nan) for c in finite])


def draw_videos(videos: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[R, V]: how often each resample of V videos, drawn with replacement, holds each of them."""
    drawn = rng.integers(videos, size=(resamples, videos)) + videos * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * videos).reshape(resamples, videos).astype(np.float64)


def _resampled(moments: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Summed moments of each resample, [R, 6, 2], computed in chunks to bound memory."""
    videos = len(moments)
    flat = moments.reshape(videos, -1)
    out = np.empty((resamples, flat.shape[1]))
    chunk = max(1, 1_000_000 // videos)
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        out[first : first + rows] = draw_videos(videos, rows, rng) @ flat
    return out.reshape(resamples, MOMENTS, 2)


def shared_draws(videos: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """[R, V]: the resamples that all compared runs share, as of `draw_videos`."""
    return draw_videos(videos, resamples, np.random.default_rng(seed))


def resampled_ccc(moments: Floats, draws: Floats) -> Floats:
    """Concordance of every resample, averaged over seeds: one matrix product, because moments add up.

    Args:
        moments: [S, V, 6, 2], of each seed's run.
        draws: [R, V], from `shared_draws`; all seeds are measured on the same videos.

    Returns:
        [R, 3]: valence, arousal and their mean; NaN where a resample has no label.
    """
    seeds, videos = moments.shape[:2]
    sums = np.einsum("rv,svk->srk", draws, moments.reshape(seeds, videos, -1), optimize=True)
    ccc = concordance_of_moments(sums.reshape(seeds, len(draws), 6, 2)).mean(axis=0)
    return np.concatenate([ccc, mean_over_dimensions(ccc)[:, None]], axis=1)


@dataclass(frozen=True)
class PairedDifference:
    """One run or configuration minus another on the same videos: [3] each, valence, arousal and mean.

    Attributes:
        difference: as observed. low, high: its 95 % interval.
        p: two-sided: twice the share of resamples in which the difference has the other sign, at least the smallest p
            of a sign test over these videos.
    """

    difference: Floats
    low: Floats
    high: Floats
    p: Floats


def paired_difference(one: Floats, other: Floats, observed: Floats, videos: int) -> PairedDifference:
    """Compare two runs or configurations by a paired bootstrap over videos.

    Args:
        one, other: [R, 3] from `resampled_ccc` with the same draws.
        observed: [3] difference on the videos as they are.
        videos: number of videos.
    """
    difference = one - other
    edges = percentile_interval(difference)
    least = 2.0 ** (1 - videos)  # all videos agree by chance; a bootstrap of three videos alone would give p < .001
    p = np.full(difference.shape[1], np.nan)
    for k, column in enumerate(difference.T):
        finite = column[np.isfinite(column)]
        if finite.size:
            tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
            p[k] = max(least, min(1.0, 2 * (tail + 1) / (finite.size + 1)))  # + 1: resamples are finite, no p is 0
    return PairedDifference(observed, edges[:, 0], edges[:, 1], p)
