"""Uncertainty of scores: bootstrap intervals over videos, and paired tests between rows of a table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vaflow.errors import UsageError, explain
from vaflow.timeline import Floats
from vaflow.train.metrics import MOMENTS, concordance_of_moments, mean_over_dimensions

RESAMPLES = 10_000  # of videos


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
