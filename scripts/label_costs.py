"""CCC that common mistakes cost on a set of labels, without any model: the figures of `extract/doctor/findings.py`.

    python scripts/label_costs.py VA_Estimation_Challenge/Validation_Set

Every .txt (challenge format) and .csv (columns time or frame, valence, arousal) in the folder is one video. Printed
are the CCC of valence and arousal

- of perfect predictions against labels shifted by 0.5 s and by 1 s,
- of each video's mean label as its prediction,
- of a synthetic predictor (labels and noise, .586 / .447 by default), and the same with -5 kept as a target,
- and the standard deviation of that predictor's mean CCC over resampled videos (bootstrap).

The noise of the synthetic predictor is half constant per video and half independent per frame. Only the shifts and the
means are exact; the other figures depend on the noise.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaflow.datasets.affwild2 import read_affwild2
from vaflow.datasets.files import SPLITS_FILE
from vaflow.datasets.labels import UNANNOTATED
from vaflow.datasets.videos import read_csv
from vaflow.errors import DataError
from vaflow.timeline import median_interval

Floats = NDArray[np.float64]
SHIFTS = (0.5, 1.0)  # seconds


@dataclass(frozen=True)
class Video:
    """Labels [N, 2] of one video, NaN where not annotated, and the seconds between two rows."""

    value: Floats
    interval: float


def read_videos(folder: Path, rate: float) -> list[Video]:
    """Labels of every file that can be read; `rate` is the rows per second of files that count frames."""
    videos = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".txt", ".csv") or path.name == SPLITS_FILE:
            continue
        try:
            annotation = read_affwild2(path) if path.suffix == ".txt" else read_csv(path)
        except DataError as error:
            print(f"skipped: {error}")
            continue
        interval = 1 / rate if annotation.time is None else median_interval(annotation.time, default=1 / rate)
        videos.append(Video(annotation.value.astype(np.float64), interval))
    return videos


def ccc(prediction: Floats, label: Floats) -> Floats:
    """CCC [2] of [N, 2] arrays over the rows that both have (population variances)."""
    scores = np.full(2, np.nan)
    for k in range(2):
        both = np.isfinite(prediction[:, k]) & np.isfinite(label[:, k])
        x, y = prediction[both, k], label[both, k]
        if x.size:
            spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
            scores[k] = 2 * ((x - x.mean()) * (y - y.mean())).mean() / spread if spread else np.nan
    return scores


def shifted(videos: Sequence[Video], seconds: float) -> Floats:
    """CCC of perfect predictions that are `seconds` late."""
    late, label = [], []
    for video in videos:
        rows = round(seconds / video.interval)
        late.append(video.value[: len(video.value) - rows])
        label.append(video.value[rows:])
    return ccc(np.concatenate(late), np.concatenate(label))


def means(videos: Sequence[Video]) -> Floats:
    """CCC of each video's mean label as its prediction."""
    with np.errstate(invalid="ignore"):
        known = [video.value for video in videos if np.isfinite(video.value).any()]
    constants = [np.broadcast_to(np.nanmean(value, axis=0), value.shape) for value in known]
    return ccc(np.concatenate(constants), np.concatenate(known))


def predict(videos: Sequence[Video], target: Floats, seed: int) -> list[Floats]:
    """Synthetic predictions [N, 2] per video with the CCC `target` [2], and the labels' mean and variance."""
    rng = np.random.default_rng(seed)
    label = np.concatenate([video.value for video in videos])
    known = np.isfinite(label)
    score = np.where(known, (label - np.nanmean(label, axis=0)) / np.nanstd(label, axis=0), 0.0)
    constant = np.concatenate([np.broadcast_to(rng.normal(size=2), video.value.shape) for video in videos])
    noise = constant + rng.normal(size=label.shape)
    for k in range(2):  # without mean and correlation with the labels, so that the CCC is exact
        rows = known[:, k]
        noise[:, k] -= noise[rows, k].mean()
        noise[:, k] -= (noise[rows, k] * score[rows, k]).mean() * score[:, k]
        noise[:, k] /= noise[rows, k].std()
    predicted = target * score + np.sqrt(1 - target**2) * noise
    predicted = np.nanmean(label, axis=0) + predicted * np.nanstd(label, axis=0)
    return np.split(predicted, np.cumsum([len(video.value) for video in videos])[:-1])


def bootstrap(predictions: Sequence[Floats], videos: Sequence[Video], draws: int, seed: int) -> float:
    """Standard deviation of the mean CCC over videos drawn with replacement."""
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(draws):
        chosen = rng.integers(len(videos), size=len(videos))
        parts = [predictions[k] for k in chosen], [videos[k].value for k in chosen]
        scores.append(ccc(np.concatenate(parts[0]), np.concatenate(parts[1])).mean())
    return float(np.nanstd(scores))


def measure(videos: Sequence[Video], target: Floats, draws: int, seed: int) -> dict[str, list[float]]:
    """Case -> CCC of valence and arousal; the bootstrap has one figure."""
    figures = {f"perfect, {seconds:g} s late": shifted(videos, seconds).tolist() for seconds in SHIFTS}
    figures["mean of each video"] = means(videos).tolist()
    predictions, label = predict(videos, target, seed), np.concatenate([video.value for video in videos])
    figures["synthetic predictor"] = ccc(np.concatenate(predictions), label).tolist()
    kept = np.where(np.isfinite(label), label, UNANNOTATED)
    figures["synthetic predictor, -5 kept as a target"] = ccc(np.concatenate(predictions), kept).tolist()
    figures["standard deviation over resampled videos"] = [bootstrap(predictions, videos, draws, seed)]
    return figures


def main() -> None:
    """Print the figures of a folder."""
    parser = argparse.ArgumentParser(description="CCC that common mistakes cost on a folder of label files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=30.0, help="rows per second of files that count frames (30)")
    parser.add_argument("--ccc", type=float, nargs=2, default=(0.586, 0.447), help="of the synthetic predictor")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws (1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    videos = read_videos(options.folder, options.rate)
    if not videos:
        parser.error(f"{options.folder} holds no label file that can be read")
    figures = measure(videos, np.array(options.ccc), options.draws, options.seed)
    if options.json:
        print(json.dumps({"videos": len(videos), "rows": sum(len(v.value) for v in videos), "ccc": figures}, indent=2))
        return
    print(f"{len(videos)} videos, {sum(len(video.value) for video in videos)} rows")
    for case, values in figures.items():
        print(f"{case:45} " + " / ".join(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    main()
