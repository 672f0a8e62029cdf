"""Effect of rounding on predictions, measured on the demo's clips: float16 storage, bfloat16 encoders.

    python scripts/rounding_effect.py --out /tmp/rounding        about two minutes on two cores

The same clips are extracted three times: all in float32; stored as float16 (AST then reads rounded log-Mel frames,
too); and so stored, of encoders that compute in bfloat16. One model, trained on the float32 cache, predicts the
validation clips from each; and models trained on each are compared, beside models that differ in nothing but their
seed. Folders that are there are reused.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

EXACT = "float32"
ROUNDED: dict[str, dict[str, str]] = {
    "float16 storage": {"dtype": "float16"},
    "bfloat16 encoders": {"dtype": "float16", "precision": "bfloat16"},
}
VARIANTS = {EXACT: {"dtype": "float32"}, **ROUNDED}


@dataclass(frozen=True)
class Difference:
    """Between two sets of predictions of the same frames: the largest, the mean, and that of the mean CCC."""

    name: str
    largest: float
    mean: float
    ccc: float

    def row(self) -> str:
        """One line of the table."""
        return f"{self.name:<58}{self.largest:>12.2e}{self.mean:>12.2e}{self.ccc:>+12.2e}"


def main() -> None:
    """Extract, train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="clips (default: as in the demo)")
    parser.add_argument("--epochs", type=int, help="epochs (default: as in the demo)")
    options = parser.parse_args()
    print(report(options.out, options.clips, options.epochs))


def report(out: Path, clips: list[int] | None = None, epochs: int | None = None) -> str:
    """The whole measurement as a table."""
    caches = {variant: extracted(out, variant, clips) for variant in VARIANTS}
    runs = {variant: trained(caches[variant], out, variant, 0, epochs) for variant in VARIANTS}
    exact = predictions(runs[EXACT], caches[EXACT])
    rows = []
    for variant in ROUNDED:
        across = predictions(runs[EXACT], caches[variant])
        rows.append(difference(f"{variant}: one model on both caches", exact, across))
        rows.append(difference(f"{variant}: a model on each", exact, predictions(runs[variant], caches[variant])))
    other = trained(caches[EXACT], out, EXACT, 1, epochs)
    rows.append(difference("another seed, for comparison", exact, predictions(other, caches[EXACT])))
    header = f"{'difference from float32':<58}{'largest':>12}{'mean':>12}{'mean CCC':>12}"
    sizes = [f"{size_of(cache) / 1e6:.2f} MB {variant}" for variant, cache in caches.items()]
    ccc = f"mean CCC of the float32 model: {exact[1]:.4f}; {len(exact[0])} frames"
    return "\n".join([header, *(row.row() for row in rows), ccc, f"embeddings: {', '.join(sizes)}"])


def extracted(out: Path, variant: str, clips: list[int] | None) -> Path:
    """The demonstration's clips, in a cache of that variant."""
    from vaflow.datasets import open_dataset
    from vaflow.demo import AUDIO, VISUAL, write_demo
    from vaflow.extract.config import ExtractConfig
    from vaflow.extract.pipeline import extract

    sizes: dict[str, Any] = {} if clips is None else {"train": clips[0], "val": clips[1]}
    write_demo(out / "data", seed=0, **sizes)
    config = ExtractConfig(visual=(VISUAL,), audio=(AUDIO,), device="cpu", **VARIANTS[variant])  # type: ignore[arg-type]
    cache = out / f"cache-{variant.replace(' ', '-')}"
    summary = extract(open_dataset(out / "data", "affwild2"), cache, config)
    if summary.failures:
        raise SystemExit(f"{summary.failures[0].item}: {summary.failures[0].message}")
    return cache


def trained(cache: Path, out: Path, variant: str, seed: int, epochs: int | None) -> Path:
    """A run with the demonstration's settings."""
    from vaflow.cache import open_cache
    from vaflow.demo import AUDIO, TRAINING, VISUAL
    from vaflow.train.config import TrainConfig
    from vaflow.train.train_run import train_run

    folder = out / f"run-{variant.replace(' ', '-')}-{seed}"
    settings: dict[str, Any] = {**TRAINING, **({} if epochs is None else {"epochs": epochs})}
    config = TrainConfig(visual=(VISUAL,), audio=(AUDIO,), seed=seed, device="cpu", **settings)
    train_run(open_cache(cache), config, folder, tensorboard=False, figures=False)
    return folder


def predictions(run: Path, cache: Path) -> tuple[np.ndarray, float]:
    """Of every frame of the validation split, [N, 2] in one order, and their mean CCC."""
    from vaflow.cache import open_cache
    from vaflow.train.data import load_split
    from vaflow.train.run_folder import load_run
    from vaflow.train.scores import score
    from vaflow.train.traces import predict_clips

    trained_run = load_run(run)
    windows = load_split(open_cache(cache), "val", trained_run.record.streams, trained_run.record.config)
    traces = list(predict_clips(trained_run.predictor, windows))
    return np.concatenate([trace.va for trace in traces]), float(score(traces)[2])


def difference(name: str, one: tuple[np.ndarray, float], other: tuple[np.ndarray, float]) -> Difference:
    """How far two sets of predictions lie apart."""
    apart = np.abs(one[0] - other[0])
    return Difference(name, float(apart.max()), float(apart.mean()), other[1] - one[1])


def size_of(cache: Path) -> int:
    """Bytes of the embeddings of clips."""
    from vaflow.cache import open_cache

    streams = open_cache(cache).info()["streams"].values()
    return sum(stream["bytes"] for stream in streams if stream["kind"] in ("visual", "audio"))


if __name__ == "__main__":
    main()
