"""What seeds and videos say about a difference: bootstrap over videos, the same resamples for every configuration.

Concordance of any set of videos follows from sums per video (`vaflow.train.metrics.video_moments`), so a resample costs
one product of matrices, and a run is kept as a small table.
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
from vaflow.train.metrics import DIMENSIONS, concordance_of_moments, mean_over_dimensions, video_moments
from vaflow.train.runs import RunFolder

RESAMPLES = 10_000
LEVEL = 0.95

Moments = Mapping[str, Floats]  # video -> [6, 2]


def moments_file(run: Path) -> Path:
    """Where a run's moments are kept."""
    return run / "moments.json"


def video_moments_of(folder: RunFolder, cache: Cache, split: str) -> dict[str, Floats]:
    """Moments of every video of a finished run's split, from its prediction files; people of one video are added up.

    Clips that the run's metrics leave out are left out.
    """
    left_out = set(folder.read_metrics()["missing"]["clips"])
    found: dict[str, Floats] = {}
    files = folder.predictions(split)
    for path in sorted(files.rglob("*.csv")):
        item = path.relative_to(files).as_posix().removesuffix(".csv")
        moments = None if item in left_out else _moments_of_csv(path)
        if moments is not None:
            video = str(cache.meta(item).get("group") or item)
            found[video] = found.get(video, 0) + moments
    return found


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
    """Keep them beside the run."""
    document = {video: table.tolist() for video, table in moments.items()}
    write_file(moments_file(run), (json.dumps(document) + "\n"))


def read_moments(run: Path) -> dict[str, Floats]:
    """What `write_moments` wrote.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        document = json.loads(moments_file(run).read_text("utf-8"))
        return {video: np.array(table, np.float64).reshape(6, 2) for video, table in document.items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptError(explain(f"{moments_file(run)} is damaged", got=error, remedy="Delete it")) from error


def draw(videos: int, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """[R, V]: how often each resample of V videos, drawn with replacement, holds each of them."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(videos, size=(resamples, videos)) + videos * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * videos).reshape(resamples, videos).astype(np.float64)


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


def interval(values: Floats, level: float = LEVEL) -> Floats:
    """[R, K] -> [K, 2]: the percentile interval of each column; NaN where a column has no number."""
    edges = ((1 - level) / 2, (1 + level) / 2)
    finite = [column[np.isfinite(column)] for column in values.T]
    return np.array([np.quantile(c, edges) if c.size else (np.nan, np.nan) for c in finite])


@dataclass(frozen=True)
class Comparison:
    """One configuration minus another on the same videos: [3] each, valence, arousal and mean.

    Attributes:
        difference: as observed. low, high: its 95 % interval.
        p: of two sides: twice the share of resamples in which the difference has the other sign, but not less than a
            test of signs over these videos could give.
    """

    difference: Floats
    low: Floats
    high: Floats
    p: Floats


def compare(one: Floats, other: Floats, observed: Floats, videos: int) -> Comparison:
    """Paired bootstrap.

    Args:
        one, other: [R, 3] from `resampled_ccc` with the same draws.
        observed: [3] difference on the videos as they are.
        videos: how many there are.
    """
    difference = one - other
    edges = interval(difference)
    least = 2.0 ** (1 - videos)  # that all of them agree by chance: a bootstrap of three videos would say p < .001
    p = np.array([np.maximum(least, _p_value(column)) for column in difference.T])
    return Comparison(observed, edges[:, 0], edges[:, 1], p)


def _p_value(differences: Floats) -> float:
    """Two-sided; one is added to both counts, so that no p is 0 because resamples are finite."""
    finite = differences[np.isfinite(differences)]
    if not finite.size:
        return float("nan")
    tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
    return min(1.0, 2 * (tail + 1) / (finite.size + 1))
