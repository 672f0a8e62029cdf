"""Significance of differences between configurations: bootstrap over videos, with the same resamples for all.

The concordance of any set of videos follows from sums per video (`vaflow.train.metrics.video_moments`), so a resample
costs one matrix product, and a run is stored as a small table.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaflow.cache import Cache
from vaflow.errors import CorruptError, explain
from vaflow.files import write_file
from vaflow.timeline import Floats
from vaflow.train.metrics import (
    DIMENSIONS,
    concordance_of_moments,
    draw_videos,
    mean_over_dimensions,
    percentile_interval,
    video_moments,
)
from vaflow.train.runs import RunFolder

RESAMPLES = 10_000

Moments = Mapping[str, Floats]  # video -> [6, 2]


def moments_file(run: Path) -> Path:
    """File of a run's moments."""
    return run / "moments.json"


def video_moments_of(folder: RunFolder, cache: Cache, split: str) -> dict[str, Floats]:
    """Moments of every video of a finished run's split, from its prediction files; people of one video are added up.

    Clips that the run's metrics leave out are left out.
    """
    left_out = set(folder.read_metrics()["missing"]["clips"])
    moments: dict[str, Floats] = {}
    files = folder.predictions(split)
    for path in sorted(files.rglob("*.csv")):
        item = path.relative_to(files).as_posix().removesuffix(".csv")
        of_clip = None if item in left_out else _moments_of_csv(path)
        if of_clip is not None:
            video = str(cache.meta(item).get("group") or item)
            moments[video] = moments.get(video, 0) + of_clip
    return moments


def _moments_of_csv(path: Path) -> Floats | None:
    """[6, 2] of one prediction file; None where nothing is labelled."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader)
        if f"label_{DIMENSIONS[0]}" not in header:
            return None
        columns = [header.index(name) for name in (*DIMENSIONS, *(f"label_{name}" for name in DIMENSIONS))]
        table = np.array([[float(row[k] or "nan") for k in columns] for row in reader])
    target = table[:, 2:]
    return video_moments(table[:, :2], target, np.isfinite(target))


def write_moments(run: Path, moments: Moments) -> None:
    """Store moments with a run."""
    document = {video: table.tolist() for video, table in moments.items()}
    write_file(moments_file(run), (json.dumps(document) + "\n"))


def read_moments(run: Path) -> dict[str, Floats]:
    """Read the moments stored with a run.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        document = json.loads(moments_file(run).read_text("utf-8"))
        return {video: np.array(table, np.float64).reshape(6, 2) for video, table in document.items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(explain(f"{moments_file(run)} is damaged", got=error, remedy="Delete it")) from error


def draw(videos: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """[R, V]: the resamples that all configurations share, as of `draw_videos`."""
    return draw_videos(videos, resamples, np.random.default_rng(seed))


def resampled_ccc(moments: Floats, draws: Floats) -> Floats:
    """Concordance of every resample, averaged over seeds.

    Args:
        moments: [S, V, 6, 2], of each seed's run.
        draws: [R, V], from `draw`; all seeds are measured on the same videos.

    Returns:
        [R, 3]: valence, arousal and their mean; NaN where a resample has no label.
    """
    seeds, videos = moments.shape[:2]
    sums = np.einsum("rv,svk->srk", draws, moments.reshape(seeds, videos, -1), optimize=True)
    ccc = concordance_of_moments(sums.reshape(seeds, len(draws), 6, 2)).mean(axis=0)
    return np.concatenate([ccc, mean_over_dimensions(ccc)[:, None]], axis=1)


@dataclass(frozen=True)
class Comparison:
    """One configuration minus another on the same videos: [3] each, valence, arousal and mean.

    Attributes:
        difference: as observed. low, high: its 95 % interval.
        p: two-sided: twice the share of resamples in which the difference has the other sign, at least the smallest p
            of a sign test over these videos.
    """

    difference: Floats
    low: Floats
    high: Floats
    p: Floats


def compare(one: Floats, other: Floats, observed: Floats, videos: int) -> Comparison:
    """Compare two configurations by a paired bootstrap.

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
    return Comparison(observed, edges[:, 0], edges[:, 1], p)
