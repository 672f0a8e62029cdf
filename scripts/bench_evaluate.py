"""Cost of scoring long recordings: metrics of 5 million frames and 10,000 bootstrap samples over their videos.

    python scripts/bench_evaluate.py
    python scripts/bench_evaluate.py --frames 5000000 --videos 594

Prints JSON with the seconds of: the moments of every video (one pass over the frames), the bootstrap interval from the
moments (no frame is read again), and the same interval by joining the frames of each sample, extrapolated from a few
samples. The goal for the interval is under one second.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from vaflow.train.metrics import bootstrap_interval, concordance, video_moments

SAMPLES = 10_000
BY_HAND = 3  # samples of joined frames that are timed


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it returns."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def bench(frames: int, videos: int) -> dict[str, float | int]:
    """Time each way on random predictions and labels, one frame in 20 unlabelled."""
    rng = np.random.default_rng(0)
    label = np.clip(rng.normal(0, 0.4, (frames, 2)), -1, 1)
    prediction = np.clip(label + rng.normal(0, 0.3, (frames, 2)), -1, 1)
    mask = rng.random((frames, 2)) < 0.95
    edges = np.linspace(0, frames, videos + 1).astype(int)
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    reading, moments = timed(lambda: [video_moments(prediction[p], label[p], mask[p]) for p in pieces])
    interval, _ = timed(lambda: bootstrap_interval(moments, resamples=SAMPLES))

    def join_frames() -> None:
        for drawn in rng.integers(videos, size=(BY_HAND, videos)):
            rows = np.concatenate([np.arange(pieces[i].start, pieces[i].stop) for i in drawn])
            concordance(prediction[rows], label[rows], mask[rows])

    joining, _ = timed(join_frames)
    return {
        "frames": frames,
        "videos": videos,
        "samples": SAMPLES,
        "moments_seconds": round(reading, 3),
        "interval_seconds": round(interval, 3),
        "joined_frames_seconds": round(joining * SAMPLES / BY_HAND),
    }


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=5_000_000)
    parser.add_argument("--videos", type=int, default=594, help="as Aff-Wild2 has")
    args = parser.parse_args()
    print(json.dumps(bench(args.frames, args.videos), indent=2))


if __name__ == "__main__":
    main()
