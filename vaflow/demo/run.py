"""The demo: synthetic clips -> cache -> trained heads -> scores on unseen people -> figures."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vaflow.cache import open_cache
from vaflow.datasets import open_dataset
from vaflow.demo.writer import write_demo
from vaflow.errors import VaflowError, explain
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract
from vaflow.train.config import TrainConfig
from vaflow.train.training import train_run

log = logging.getLogger(__name__)

VISUAL, AUDIO = "clip-tiny", "ast-tiny"
CLIPS = 24  # labelled clips, training and validation
# Deviations from the published settings: the first removes the large constant offset in features of random encoders;
# the second adds standard deviations and leaves the predictions as they are.
TRAINING: dict[str, Any] = {"normalize": "standard", "uncertainty": "variance"}


@dataclass(frozen=True)
class DemoResult:
    """Result of a demo.

    Attributes:
        out: folder of data, cache and run.
        metrics: scores of the full model on the held-out people, as in `metrics.json`.
        seconds: duration of each stage.
        pictures: the figures.
    """

    out: Path
    metrics: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


def run_demo(out: Path, *, seed: int = 0, clips: int = CLIPS, show_progress: bool = False) -> DemoResult:
    """Write clips, extract, train, evaluate and draw; finished steps are reused.

    Args:
        out: folder for data, cache and run.
        seed: random seed (synthetic data and training).
        clips: labelled clips; two thirds are for training.
        show_progress: draw progress bars.

    Raises:
        UsageError: `out` is not writable or holds other files; too few clips.
        VaflowError: a synthetic clip could not be extracted.
    """
    seconds: dict[str, float] = {}
    with _timed("write clips", seconds):
        write_demo(out / "data", seed=seed, train=clips - clips // 3, val=clips // 3)
    with _timed("extract", seconds):
        config = ExtractConfig(visual=(VISUAL,), audio=(AUDIO,), device="cpu")
        summary = extract(open_dataset(out / "data", "affwild2"), out / "cache", config, show_progress=show_progress)
    if summary.failures:
        raise VaflowError(explain("The synthetic clips could not be extracted", got=summary.failures[0].message))
    with _timed("train and evaluate", seconds):
        settings = TrainConfig(visual=(VISUAL,), audio=(AUDIO,), seed=seed, device="cpu", **TRAINING)
        result = train_run(open_cache(out / "cache"), settings, out / "run", show=show_progress)
    pictures = sorted((out / "run" / "pictures").glob("*.png"))
    return DemoResult(out, result.metrics, seconds, pictures)


def describe(result: DemoResult) -> str:
    """The result as text: scores with intervals, durations and the paths of the figures."""
    ccc, interval = result.metrics["ccc"], result.metrics["ci95"]
    lines = ["", "Held-out people, concatenated CCC (95 % interval from a bootstrap over videos):"]
    lines += [
        f"  {name:8} {ccc[name]:.3f}  [{interval[name][0]:.3f}, {interval[name][1]:.3f}]"
        for name in ("valence", "arousal", "mean")
    ]
    lines += ["", f"Labels inside the intervals, in percent ({result.metrics['uncertainty']['held_out']}):"]
    for name, levels in result.metrics["coverage"].items():
        shares = (f"{'-' if x is None else f'{100 * x:.1f}'} of stated {level}" for level, x in levels.items())
        lines.append(f"  {name:8} {', '.join(shares)}")
    lines += ["", "Time: " + ", ".join(f"{stage} {value:.0f} s" for stage, value in result.seconds.items())]
    lines += ["Figures:", *(f"  {path}" for path in result.pictures)]
    lines += ["", f"Next: vaflow predict {result.out / 'run'} YOUR_VIDEO.mp4 --out {result.out / 'predictions'}"]
    return "\n".join(lines)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    log.info("%s ...", stage)
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
