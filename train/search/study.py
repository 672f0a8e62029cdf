"""`vaflow search` as one function: propose, train on folds, stop early, score the winner on the held-out split."""

import csv
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import DataError, UsageError, explain
from vaflow.files import lock_folder, write_file
from vaflow.train.ablate.plan import data_key
from vaflow.train.ablate.pool import FAILURES, one_thread
from vaflow.train.config import TrainConfig, merge
from vaflow.train.folds import make_folds
from vaflow.train.inputs import resolve
from vaflow.train.runs import RunFolder
from vaflow.train.search.page import html_page
from vaflow.train.search.space import Space
from vaflow.train.search.trials import (
    DONE,
    FAILED,
    STOPPED,
    Log,
    SearchOptions,
    SearchResult,
    Trial,
    continues,
    importances,
    propose,
    rungs,
)
from vaflow.train.session import Data, load_data
from vaflow.train.settings_files import to_toml
from vaflow.train.training import evaluate_run, train_run

LOG, STARTED, RESULT = "trials.jsonl", "started.json", "search.json"
OnTrial = Callable[[Trial], None]


def run_search(
    cache: Cache,
    space: Space,
    trials: int,
    out: Path,
    options: SearchOptions,
    *,
    level: int = logging.ERROR,
    on_trial: OnTrial | None = None,
) -> SearchResult:
    """Search for settings; run it again to resume, or with more trials to continue.

    The score of a trial chooses the winner, so it is optimistic. The winner's models are scored on a split that no
    trial has seen: neither the choice of the trial nor that of an epoch depends on it.

    Args:
        cache: what to train on.
        space: settings to search.
        trials: how many in all.
        out: the search's folder.
        options: see `SearchOptions`.
        level: of the log lines of runs that are shown.
        on_trial: called after each trial.

    Raises:
        UsageError: Optuna is not installed, a split or the folds do not exist, `out` holds another search, or another
            process uses it.
        CorruptError: the log of the search is damaged.
    """
    _require_optuna()
    if trials < 1:
        raise UsageError(explain(f"--trials must be >= 1 (got {trials})"))
    cache.items(split=options.holdout)
    make_folds(cache, (options.train,), options.folds)
    if not {"visual", "audio", "text"} & space.searched.keys():  # what fails every trial fails here
        resolve(cache, merge(space.fixed))
    with lock_folder(out, "vaflow search"):
        _check_same(cache, space, out, options)
        log = Log.read(out / LOG)
        runner = _Runner(cache, space, out, options)
        with one_thread(level):
            while len(log.trials) < trials:
                trial = runner.run(log.trials)
                log.add(trial)
                if on_trial is not None:
                    on_trial(trial)
            done = [trial for trial in log.trials if trial.state == DONE]
            best = max(done, key=lambda trial: trial.score, default=None)
            holdout = {} if best is None else runner.holdout(best)
        return _write(cache, space, out, options, log.trials, best, holdout)


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        remedy = "pip install -e '.[search]' in the clone"
        raise UsageError(explain("vaflow search needs Optuna, which is not installed", remedy=remedy)) from error


def _check_same(cache: Cache, space: Space, out: Path, options: SearchOptions) -> None:
    """Compare with what the search in `out` was started with; note it at the first start.

    Raises:
        UsageError: the cache, the space or an option differs.
    """
    facts = {
        "cache": {name: cache.fingerprint(name) for name in cache.streams()},
        "fixed": {key: list(value) if isinstance(value, tuple) else value for key, value in space.fixed.items()},
        "searched": {name: repr(kind) for name, kind in space.searched.items()},
        "options": {key: value for key, value in vars(options).items() if key != "device"},
    }
    path = out / STARTED
    if not path.is_file():
        if (out / LOG).is_file():
            raise UsageError(explain(f"{path} is missing", remedy="Choose another --out"))
        write_file(path, json.dumps(facts, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(explain(f"{path} is damaged", got=error, remedy="Choose another --out")) from error
    changed = [name for name in facts if not isinstance(before, dict) or before.get(name) != facts[name]]
    if changed:
        raise UsageError(
            explain(
                f"{out} holds a search that was started differently",
                got=f"other {', '.join(changed)}",
                remedy="Use the same cache, space and options to resume, or choose another --out",
            )
        )


class _Runner:
    """Trains trials; the data of the folds stay loaded until a trial needs others."""

    def __init__(self, cache: Cache, space: Space, out: Path, options: SearchOptions) -> None:
        self._cache, self._space, self._out, self._options = cache, space, out, options
        self._loaded: dict[tuple[object, ...], Data] = {}

    def run(self, before: list[Trial]) -> Trial:
        """Train the next trial, or resume one that was interrupted."""
        begun, number = time.perf_counter(), len(before) + 1
        values = propose(self._space, before, self._options.sampler, self._options.seed)
        scores: list[float] = []
        folds: list[float] = []
        epochs, state = 0, DONE
        try:
            config = self._space.config(values)
            steps = rungs(config, halving=self._options.halving)
            for rung, step in enumerate(steps):
                folds = [self._train(config, number, fold, step) for fold in range(1, self._options.folds + 1)]
                scores.append(float(np.mean(folds)))
                epochs = step
                if step != steps[-1] and not continues(scores[-1], rung, before):
                    state = STOPPED
                    break
        except FAILURES as error:
            return Trial(number, values, FAILED, seconds=time.perf_counter() - begun, message=str(error))
        for fold in range(1, self._options.folds + 1):  # nothing continues a finished trial
            RunFolder(self.folder(number, fold)).checkpoint_file.unlink(missing_ok=True)
        return Trial(number, values, state, epochs, tuple(scores), tuple(folds), time.perf_counter() - begun)

    def folder(self, number: int, fold: int) -> Path:
        """The run of a trial and a fold."""
        return self._out / "runs" / f"trial{number:04d}" / f"fold{fold}"

    def _train(self, config: TrainConfig, number: int, fold: int, epochs: int) -> float:
        """Train one fold up to a number of epochs; returns the mean CCC of its best epoch.

        The score is kept beside the run: an interrupted trial asks for it again when the run has more epochs.
        """
        options = self._options
        kept = self.folder(number, fold).with_name(f"fold{fold}-{epochs}.json")
        if kept.is_file():
            with suppress(ValueError):
                return float(json.loads(kept.read_text("utf-8")))
        config = replace(
            config,
            folds=options.folds,
            fold=fold,
            fold_splits=(options.train,),
            epochs=epochs,
            device=options.device,
        )
        result = train_run(
            self._cache,
            config,
            self.folder(number, fold),
            data=self._data(config),
            allow_missing=options.allow_missing,
            tensorboard=False,
            figures=False,
        )
        score = result.metrics["ccc"]["mean"]
        if score is None:
            raise DataError(explain(f"Fold {fold} cannot be scored", expected="labels of valence or arousal"))
        write_file(kept, f"{json.dumps(score)}\n")
        return float(score)

    def _data(self, config: TrainConfig) -> Data:
        config, inputs = resolve(self._cache, config)
        key = data_key(config)
        if key not in self._loaded:
            while len(self._loaded) >= self._options.folds:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[key] = load_data(self._cache, config, inputs, device=choose_device(config.device))
        return self._loaded[key]

    def holdout(self, best: Trial) -> dict[str, tuple[float, ...]]:
        """CCC of the winner's models on the held-out split: dimension -> one per inner fold."""
        self._loaded = {}
        scores: dict[str, list[float]] = {}
        options = self._options
        for fold in range(1, options.folds + 1):
            run = self.folder(best.number, fold)
            report = evaluate_run(
                run, self._cache, options.holdout, device=options.device, allow_missing=options.allow_missing
            )
            for name, value in report["ccc"].items():
                if value is not None:
                    scores.setdefault(name, []).append(value)
        return {name: tuple(values) for name, values in scores.items()}


def _write(
    cache: Cache,
    space: Space,
    out: Path,
    options: SearchOptions,
    trials: list[Trial],
    best: Trial | None,
    holdout: Mapping[str, tuple[float, ...]],
) -> SearchResult:
    importance = importances(space, trials)
    streams: tuple[str, ...] = ()
    files = {"csv": out / "trials.csv", "json": out / RESULT, "html": out / "search.html"}
    write_file(files["csv"], _csv(space, trials))
    if best is not None:
        files["config"] = out / "best.toml"
        config = space.config(best.values)
        write_file(files["config"], to_toml(config))
        config, _ = resolve(cache, config)
        streams = (*config.visual, *config.audio)
    result = SearchResult(tuple(trials), best, holdout, importance, files)
    write_file(files["json"], json.dumps(document(result), indent=1) + "\n")
    write_file(files["html"], html_page(space, result, cache.place, options, streams))
    return result


def document(result: SearchResult) -> dict[str, Any]:
    """`search.json`, which --json prints."""
    best = result.best
    return {
        "trials": len(result.trials),
        "states": {state: sum(t.state == state for t in result.trials) for state in (DONE, STOPPED, FAILED)},
        "best": None
        if best is None
        else {"trial": best.number, "values": dict(best.values), "selected_ccc": best.score},
        "holdout_ccc": {name: float(np.mean(values)) for name, values in result.holdout.items()},
        "importance": dict(result.importance),
        "files": {kind: str(path) for kind, path in result.files.items()},
    }


def _csv(space: Space, trials: list[Trial]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "ccc_mean", "epochs", "seconds", *space.searched, "folds", "rungs", "message"])
    for trial in trials:
        values = [trial.values[name] for name in space.searched]
        lists = [" ".join(f"{score:.6f}" for score in scores) for scores in (trial.folds, trial.rungs)]
        score = f"{trial.score:.6f}" if trial.rungs else ""
        writer.writerow(
            [trial.number, trial.state, score, trial.epochs, f"{trial.seconds:.1f}", *values, *lists, trial.message]
        )
    return text.getvalue()
