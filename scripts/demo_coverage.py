"""Measure the coverage of the intervals on people that neither trained the model nor calibrated its intervals.

    python scripts/demo_coverage.py [--demo DIR] [--clips 60] [--folds 3] [--set KEY=VALUE]

DIR is what `vaflow demo --clips N --out DIR` writes; it is written if missing. A model is trained per fold of people.
Coverage on the held-out people of each fold is printed for intervals that were calibrated on the other held-out people
(leave one out), and on half of them (mean and deviation over random halves).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from vaflow.cli import main as vaflow
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.uncertainty import LEVELS, ScaleSearch, VideoErrors, coverage_of
from vaflow.viewer import find_predictions, read_predictions

HALVES = 200


def held_out_people(run: Path, k: int) -> list[VideoErrors]:
    """Errors of every held-out person in dimension `k`; their standard deviations are those of the run."""
    people = []
    for clip in find_predictions(run).clips:
        table = read_predictions(clip.csv)
        if table.label is not None and table.std is not None:
            valid = np.isfinite(table.label[:, k])
            people.append(VideoErrors((table.va - table.label)[valid, k], table.std[valid, k]))
    return people


def half_coverage(people: list[VideoErrors], rng: np.random.Generator) -> list[float]:
    """Coverage per level of a random half of the people, calibrated on the other half."""
    order = rng.permutation(len(people))
    half = len(people) // 2
    scale = ScaleSearch.of([people[i] for i in order[:half]]).best()
    return [float(x or 0) for x in coverage_of([people[i] for i in order[half:]], scale).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = options.demo or Path(folder) / "demo"
        if not (demo / "cache").is_dir():
            vaflow(["demo", "--out", str(demo), "--clips", str(options.clips), "-q"])
        settings = ["uncertainty=variance", "normalize=standard", *options.settings]
        runs = [Path(folder) / f"fold{k}" for k in range(1, options.folds + 1)]
        for k, run in enumerate(runs, 1):
            fold = ["--folds", str(options.folds), "--fold", str(k), *(f"--set={text}" for text in settings)]
            vaflow(["train", str(demo / "cache"), "--out", str(run), *fold, "-q"])
        metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
        print("mean CCC per fold:", ", ".join(f"{m['ccc']['mean']:.4f}" for m in metrics))
        for k, name in enumerate(DIMENSIONS):
            for what in ("nll", "nll_constant"):
                print(f"{name} {what} per fold:", ", ".join(f"{m['uncertainty'][what][name]:.3f}" for m in metrics))
            one_out = np.array([[m["coverage"][name][str(level)] for level in LEVELS] for m in metrics])
            rng = np.random.default_rng(0)
            halves = [[half_coverage(held_out_people(run, k), rng) for _ in range(HALVES)] for run in runs]
            table = np.array(halves).reshape(-1, len(LEVELS))
            for j, level in enumerate(LEVELS):
                folds = ", ".join(f"{100 * x:.1f}" for x in one_out[:, j])
                print(
                    f"{name} {level} %: leave one out {100 * one_out[:, j].mean():.1f} (folds {folds}); "
                    f"halves {100 * table[:, j].mean():.1f} (deviation {100 * table[:, j].std():.1f})"
                )


if __name__ == "__main__":
    main()
