"""Controls for the demo: trains on its data in ways that must score better or worse than the full model.

    python scripts/demo_honesty.py --seeds 3 --out /tmp/honesty        about ten minutes a seed on two cores

Per seed: the full model, each modality alone, shuffled training labels, noise instead of video, noise instead of audio.
Prints the mean CCC on held-out people. Existing folders are reused.
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FULL, VIDEO_ONLY, AUDIO_ONLY = "both", "video only", "audio only"
SHUFFLED, VIDEO_NOISE, AUDIO_NOISE = "shuffled labels", "noise for video", "noise for audio"
MARGIN, WRONG, SAME = 0.03, 0.1, 0.08


def main() -> None:
    """Run all variants, print a table and the failed checks; exit with 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    scores = [measure(options.out / f"seed{seed}", seed) for seed in range(options.seeds)]
    print(table(scores))
    wrong = broken(scores)
    print("\n".join(wrong) if wrong else "All checks passed.")
    raise SystemExit(bool(wrong))


def measure(out: Path, seed: int) -> dict[str, float]:
    """Held-out mean CCC of every variant for one seed."""
    from vaflow.demo import AUDIO, TRAINING, VISUAL
    from vaflow.train.config import TrainConfig

    config = TrainConfig(visual=(VISUAL,), audio=(AUDIO,), seed=seed, device="cpu", **TRAINING)
    plain = cache(out, "plain", seed)
    shuffled = out / "shuffled" / "cache"
    if not shuffled.exists():
        shutil.copytree(plain, shuffled)  # only its labels will be extracted again
    return {
        FULL: train(plain, out / "runs" / "full", config),
        VIDEO_ONLY: train(plain, out / "runs" / "picture", replace(config, audio=("none",))),
        AUDIO_ONLY: train(plain, out / "runs" / "sound", replace(config, visual=("none",))),
        SHUFFLED: train(cache(out, "shuffled", seed, shuffle_labels=True), out / "runs" / "shuffled", config),
        VIDEO_NOISE: train(cache(out, "no-picture", seed, picture="noise"), out / "runs" / "no-picture", config),
        AUDIO_NOISE: train(cache(out, "no-sound", seed, sound="noise"), out / "runs" / "no-sound", config),
    }


def cache(out: Path, name: str, seed: int, **options: Any) -> Path:
    """Write a variant of the demo's data and extract it."""
    from vaflow.datasets import open_dataset
    from vaflow.demo import AUDIO, VISUAL, write_demo
    from vaflow.extract.config import ExtractConfig
    from vaflow.extract.pipeline import extract

    data, folder = out / name / "data", out / name / "cache"
    write_demo(data, seed=seed, **options)
    config = ExtractConfig(visual=(VISUAL,), audio=(AUDIO,), device="cpu")
    summary = extract(open_dataset(data, "affwild2"), folder, config)
    if summary.failures:
        raise SystemExit(f"{name}: {summary.failures[0].message}")
    return folder


def train(folder: Path, out: Path, config: Any) -> float:
    """Train on a cache; the mean CCC on its validation people."""
    from vaflow.cache import open_cache
    from vaflow.train.train_run import train_run

    result = train_run(open_cache(folder), config, out, tensorboard=False, figures=False)
    return float(result.metrics["ccc"]["mean"])


def table(scores: list[dict[str, float]]) -> str:
    """A row per variant, a column per seed, and the mean."""
    lines = [f"{'mean CCC':18}" + "".join(f"  seed {k}" for k in range(len(scores))) + "    mean"]
    for name in scores[0]:
        values = [score[name] for score in scores]
        lines.append(f"{name:18}" + "".join(f"{v:8.3f}" for v in values) + f"{sum(values) / len(values):8.3f}")
    return "\n".join(lines)


def broken(scores: list[dict[str, float]]) -> list[str]:
    """The promises that do not hold, on the mean over seeds."""
    mean = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    promises = {
        f"both modalities beat the picture alone by {MARGIN}": mean[FULL] >= mean[VIDEO_ONLY] + MARGIN,
        f"both modalities beat the sound alone by {MARGIN}": mean[FULL] >= mean[AUDIO_ONLY] + MARGIN,
        f"shuffled labels score below {WRONG}": all(score[SHUFFLED] < WRONG for score in scores),
        "without pictures it falls to what sound gives": mean[VIDEO_NOISE] <= mean[AUDIO_ONLY] + SAME,
        "without sound it falls to what pictures give": mean[AUDIO_NOISE] <= mean[VIDEO_ONLY] + SAME,
    }
    return [f"NOT TRUE: {promise}" for promise, holds in promises.items() if not holds]


if __name__ == "__main__":
    main()
