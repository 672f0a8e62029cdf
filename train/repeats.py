"""Several runs of the same settings: one per seed, per fold of a cross-validation, or both."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.errors import UsageError, explain
from vaflow.files import lock_folder, write_file
from vaflow.train.config import TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.runs import RunFolder
from vaflow.train.together.runs import Trainer, batches_of, one_thread

log = logging.getLogger(__name__)

SCORES = ("valence", "arousal", "mean")


@dataclass(frozen=True)
class Repeats:
    """Outcome of several runs.

    Attributes:
        scores: name of each finished run -> CCC of valence, arousal and their mean; None where nothing is labelled.
        failures: name of each failed run -> its error.
    """

    scores: Mapping[str, Mapping[str, float | None]]
    failures: Mapping[str, Exception]

    def document(self) -> dict[str, Any]:
        """`repeats.json`: the scores, their mean and their standard deviation (n - 1)."""
        summary = {}
        for name in SCORES:
            values = [value for score in self.scores.values() if (value := score[name]) is not None]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                summary[name] = {"mean": float(np.mean(values)), "std": deviation}
        failures = {name: str(error) for name, error in self.failures.items()}
        return {"ccc": summary, "runs": {name: dict(s) for name, s in self.scores.items()}, "failures": failures}


def repeats_of(config: TrainConfig, seeds: int, all_folds: bool) -> dict[str, TrainConfig]:
    """Name of each run, such as "fold2-seed0", and its settings.

    Raises:
        UsageError: the options do not go together.
    """
    if seeds < 1:
        raise UsageError(explain(f"--seeds must be >= 1 (got {seeds})"))
    if all_folds and not config.folds:
        raise UsageError(explain("--all-folds requires --folds K"))
    if config.finetune:
        raise UsageError(explain("--seeds and --all-folds are not supported with --finetune"))
    runs = {}
    for fold in range(1, config.folds + 1) if all_folds else (config.fold,):
        for seed in range(config.seed, config.seed + seeds):
            parts = [f"fold{fold}"] * all_folds + [f"seed{seed}"] * (seeds > 1 or not all_folds)
            runs["-".join(parts)] = replace(config, fold=fold, seed=seed)
    return runs


def train_repeats(
    cache: Cache,
    runs: Mapping[str, TrainConfig],
    out: Path,
    *,
    together: str = "auto",
    allow_missing: bool = False,
    level: int = logging.ERROR,
    on_run: Callable[[str, float | None], None] | None = None,
    on_choice: Callable[[str], None] = log.info,
) -> Repeats:
    """Train or resume runs in `out/NAME`, in batches where that measures faster; writes `repeats.json`.

    Args:
        runs: name -> settings.
        out: directory of the runs; not a run itself.
        level: of the log lines of runs that are shown.
        on_run: called with the name and the mean CCC of each finished run.
        on_choice: called with a line about each batch that was timed.

    Raises:
        UsageError: settings that do not fit the cache; `out` is a run.
    """
    RunFolder(out).refuse()
    scores: dict[str, Mapping[str, float | None]] = {}
    failures: dict[str, Exception] = {}
    resolved = [(name, resolve(cache, config)[0]) for name, config in runs.items()]
    trainer = Trainer(cache, together=together, allow_missing=allow_missing, on_choice=on_choice)
    with lock_folder(out, "vaflow train"), one_thread(level):
        for batch in batches_of(resolved, lambda run: run[1]):
            for number, result in trainer.train([(config, out / name) for name, config in batch]):
                name = batch[number][0]
                if isinstance(result, Exception):
                    failures[name] = result
                    continue
                scores[name] = {key: result.metrics["ccc"][key] for key in SCORES}
                if on_run is not None:
                    on_run(name, scores[name]["mean"])
        repeats = Repeats({name: scores[name] for name in runs if name in scores}, failures)
        write_file(out / "repeats.json", json.dumps(repeats.document(), indent=1) + "\n")
    return repeats
