"""`vaflow search`: random or Bayesian search over settings, scored by cross-validation within the training split.

Trials are proposed, trained on folds and stopped early; the best one is scored on the held-out split. Files:
`trials.csv`, `search.json`, `best.toml`, and the page `search.html`.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vaflow.cache import Cache
from vaflow.encoders import random_encoders
from vaflow.errors import DataError, UsageError, VaflowError, examples, explain
from vaflow.files import lock_folder, write_file
from vaflow.pages import render
from vaflow.train.ablate.pool import Pool
from vaflow.train.config import TrainConfig, merge, to_toml
from vaflow.train.evaluate import evaluate_run
from vaflow.train.folds import make_folds, split_items
from vaflow.train.inputs import resolve
from vaflow.train.repeats import one_thread
from vaflow.train.run_folder import RunFolder
from vaflow.train.run_record import check_splits_apart, clip_digests
from vaflow.train.search_space import (
    DONE,
    FAILED,
    STOPPED,
    Choice,
    Log,
    SearchOptions,
    SearchResult,
    Space,
    Trial,
    continues,
    importances,
    propose,
    rungs,
    trials_csv,
)
from vaflow.train.stacked_loop import FAILURES

LOG, STARTED, RESULT = "trials.jsonl", "started.json", "search.json"
WIDTH, HEIGHT = 860, 260  # pixels of the plot
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40
OnTrial = Callable[[Trial], None]


def run_search(
    cache: Cache,
    space: Space,
    trials: int,
    out: Path,
    options: SearchOptions,
    *,
    on_trial: OnTrial | None = None,
    **pool: Any,
) -> SearchResult:
    """Search for settings; run it again to resume, or with more trials to continue.

    The score of a trial chooses the winner, so it is optimistic. The winner's models are scored on a split that no
    trial has seen: neither the choice of the trial nor that of an epoch depends on it. It may not share recordings with
    the training split, unless the space sets `shared_sources`.

    Args:
        pool: keyword arguments of `vaflow.train.ablate.pool.Pool`: engine, ray_address, level, on_choice.

    Raises:
        UsageError: Optuna is not installed, a split or the folds do not exist, the splits share clips or recordings,
            `out` holds another search, or another process uses it.
        CorruptError: the log of the search is damaged.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        remedy = "pip install -e '.[search]' in the clone"
        raise UsageError(explain("vaflow search needs Optuna, which is not installed", remedy=remedy)) from error
    if trials < 1:
        raise UsageError(explain(f"--trials must be >= 1 (got {trials})"))
    RunFolder(out).refuse()
    make_folds(cache, (options.train,), options.folds)
    _check_apart(cache, space, options)
    if not {"visual", "audio", "text"} & space.searched.keys():  # errors that would fail every trial are raised here
        resolve(cache, merge(space.fixed))
    with lock_folder(out, "vaflow search"):
        _check_same(cache, space, out, options)
        finished = Log.read(out / LOG)
        pool |= {"together": options.together, "allow_missing": options.allow_missing, "keep_checkpoint": True}
        with one_thread(pool.get("level", logging.ERROR)), Pool(cache, out, **pool) as workers:
            runner = _Runner(cache, space, out, options, workers)
            while len(finished.trials) < trials:
                last = min(trials, (len(finished.trials) // options.batch + 1) * options.batch)
                for trial in runner.run(finished.trials, last):
                    finished.add(trial)
                    if on_trial is not None:
                        on_trial(trial)
            done = [trial for trial in finished.trials if trial.state == DONE]
            best = max(done, key=lambda trial: trial.score, default=None)
            holdout, warnings = ({}, ()) if best is None else runner.holdout(best)
        return write_results(cache, space, out, options, finished.trials, best, holdout, warnings)


def _check_apart(cache: Cache, space: Space, options: SearchOptions) -> None:
    """Check that no trial trains on a clip or a recording of the held-out split.

    Raises:
        UsageError: a split does not exist, or both share clips or recordings.
    """
    streams = [name for name, info in cache.streams().items() if info.kind != "text"]
    train, holdout = (
        clip_digests(cache, streams, split_items(cache, split, TrainConfig.fold_splits))
        for split in (options.train, options.holdout)
    )
    if both := sorted(train.keys() & holdout.keys()):
        problem = f"--holdout {options.holdout} holds clips of the split that is searched ({options.train})"
        raise UsageError(explain(problem, expected="a split that no trial sees", got=examples(both)))
    if not space.fixed.get("shared_sources"):
        check_splits_apart(train, holdout, "shared_sources = true in the space")


def _check_same(cache: Cache, space: Space, out: Path, options: SearchOptions) -> None:
    """Compare with the stored arguments of the search in `out`; store them at the first start.

    Raises:
        UsageError: the cache, the space or an option differs.
    """
    facts = {
        "cache": {name: cache.fingerprint(name) for name in cache.streams()},
        "fixed": {key: list(value) if isinstance(value, tuple) else value for key, value in space.fixed.items()},
        "searched": {name: repr(kind) for name, kind in space.searched.items()},
        "options": {key: value for key, value in vars(options).items() if key not in ("device", "together")},
        "clips": _clips_digest(cache, options.train),
        "prompts": _prompts(cache, space),
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
    if isinstance(before, dict) and isinstance(before.get("options"), dict):
        before["options"].setdefault("batch", 1)  # a search of an older version proposed one trial at a time
        for name in ("clips", "prompts"):
            before.setdefault(name, facts[name])  # ... and did not store them
    changed = [name for name in facts if not isinstance(before, dict) or before.get(name) != facts[name]]
    if changed:
        problem = f"{out} holds a search that was started differently"
        remedy = "Use the same cache, clips, space and options to resume, or choose another --out"
        raise UsageError(explain(problem, got=f"other {', '.join(changed)}", remedy=remedy))


def _clips_digest(cache: Cache, split: str) -> str:
    """Digest of the clips of a split and of what their streams were made from: scores on others do not compare."""
    stamps = {name: cache.source_stamps(name) for name, info in cache.streams().items() if info.kind != "text"}
    items = split_items(cache, split, TrainConfig.fold_splits)
    facts = [[item, {name: known[item] for name, known in stamps.items() if item in known}] for item in items]
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _prompts(cache: Cache, space: Space) -> dict[str, dict[str, str]]:
    """What the prompt sets that trials use were made from: stream -> set -> stamp."""
    searched = space.searched.get("prompts")
    used = set(searched.values) if isinstance(searched, Choice) else {space.fixed.get("prompts", TrainConfig.prompts)}
    texts = {name: cache.source_stamps(name) for name, info in cache.streams().items() if info.kind == "text"}
    return {name: {item: stamp for item, stamp in stamps.items() if item in used} for name, stamps in texts.items()}


@dataclass
class _Open:
    """A trial that is being trained.

    Attributes:
        epochs: at which it is compared, the last of them its end.
        trial: what is known of it so far.
    """

    config: TrainConfig
    epochs: tuple[int, ...]
    trial: Trial


class _Runner:
    """Trains trials in the workers of a pool."""

    def __init__(self, cache: Cache, space: Space, out: Path, options: SearchOptions, pool: Pool) -> None:
        self._cache, self._space, self._out, self._options, self._pool = cache, space, out, options, pool

    def run(self, before: Sequence[Trial], last: int) -> list[Trial]:
        """Train the trials up to number `last`, or resume them.

        Their folds train in batches up to a rung; then each trial is compared with those of lower numbers, so that
        the decision does not depend on how many trials train at once.
        """
        finished = before[: len(before) // self._options.batch * self._options.batch]
        proposed = [trial.values for trial in before[len(finished) :]]
        trials = list(before)
        waiting: list[_Open] = []
        for number in range(len(before) + 1, last + 1):
            values = propose(self._space, finished, proposed, self._options.sampler, self._options.seed)
            proposed.append(values)
            trials.append(Trial(number, values, FAILED))
            try:
                config = self._space.config(values)
                waiting.append(_Open(config, rungs(config, halving=self._options.halving), trials[-1]))
            except FAILURES as error:
                trials[-1] = replace(trials[-1], message=str(error))
        rung = 0
        while waiting:
            begun = time.perf_counter()
            scores = self._scores(waiting, rung)
            seconds = (time.perf_counter() - begun) / len(waiting)
            going: list[_Open] = []
            for each in waiting:
                trial = self._after_rung(each, rung, scores[each.trial.number], trials)
                each.trial = trials[trial.number - 1] = replace(trial, seconds=trial.seconds + seconds)
                if not trial.state:
                    going.append(each)
            waiting, rung = going, rung + 1
        for trial in trials[len(before) :]:
            if trial.state != FAILED:  # these runs are not resumed
                for fold in range(1, self._options.folds + 1):
                    RunFolder(self.folder(trial.number, fold)).checkpoint_file.unlink(missing_ok=True)
        return trials[len(before) :]

    def _after_rung(
        self, each: _Open, rung: int, scores: Sequence[float | Exception], trials: Sequence[Trial]
    ) -> Trial:
        """The trial with the scores of a rung; its state is empty if it continues."""
        trial, epochs = each.trial, each.epochs[rung]
        failures = [score for score in scores if isinstance(score, Exception)]
        if failures:
            return replace(trial, state=FAILED, rungs=(), folds=(), epochs=0, message=str(failures[0]))
        mean = float(np.mean(scores))  # type: ignore[arg-type]
        state = ""
        if epochs == each.epochs[-1]:
            state = DONE
        elif not continues(mean, rung, trials[: trial.number - 1]):
            state = STOPPED
        folds = tuple(scores)
        return replace(trial, state=state, rungs=(*trial.rungs, mean), folds=folds, epochs=epochs)  # type: ignore[arg-type]

    def folder(self, number: int, fold: int) -> Path:
        """The run of a trial and a fold."""
        return self._out / "runs" / f"trial{number:04d}" / f"fold{fold}"

    def _scores(self, trials: Sequence[_Open], rung: int) -> dict[int, list[float | Exception]]:
        """Train all folds of some trials up to a rung; returns trial -> mean CCC of each fold, or its error.

        A score is stored beside the run: after an interruption, the run may have been trained beyond this rung.
        """
        options = self._options
        division: dict[str, Any] = {"folds": options.folds, "fold_splits": (options.train,), "device": options.device}
        scores: dict[tuple[int, int], float | Exception] = {}
        todo: list[tuple[tuple[int, int], TrainConfig, Path]] = []
        for each in trials:
            for fold in range(1, options.folds + 1):
                key = each.trial.number, fold
                file = self.folder(*key).with_name(f"fold{fold}-{each.epochs[rung]}.json")
                with suppress(ValueError, OSError):
                    scores[key] = float(json.loads(file.read_text("utf-8")))
                    continue
                config = replace(each.config, **division, fold=fold, epochs=each.epochs[rung])
                try:
                    todo.append((key, resolve(self._cache, config)[0], file))
                except FAILURES as error:
                    scores[key] = error
        for number, ended in self._pool.train([(config, self.folder(*key)) for key, config, _ in todo]):
            key, _, file = todo[number]
            if ended.error:
                scores[key] = VaflowError(ended.message)
            elif ended.score is None:
                problem = f"Fold {key[1]} cannot be scored"
                scores[key] = DataError(explain(problem, expected="labels of valence or arousal"))
            else:
                scores[key] = ended.score
                write_file(file, f"{json.dumps(ended.score)}\n")
        folds = range(1, options.folds + 1)
        return {each.trial.number: [scores[each.trial.number, fold] for fold in folds] for each in trials}

    def holdout(self, best: Trial) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
        """CCC of the winner's models on the held-out split, dimension -> one per inner fold; warnings about them."""
        scores: dict[str, list[float]] = {}
        warnings: dict[str, None] = {}
        for fold in range(1, self._options.folds + 1):
            report = evaluate_run(
                self.folder(best.number, fold),
                self._cache,
                self._options.holdout,
                device=self._options.device,
                allow_missing=self._options.allow_missing,
                fold_splits=TrainConfig.fold_splits,
            )
            warnings |= dict.fromkeys(report["warnings"])
            for name, value in report["ccc"].items():
                if value is not None:
                    scores.setdefault(name, []).append(value)
        return {name: tuple(values) for name, values in scores.items()}, tuple(warnings)


def write_results(
    cache: Cache,
    space: Space,
    out: Path,
    options: SearchOptions,
    trials: Sequence[Trial],
    best: Trial | None,
    holdout: Mapping[str, tuple[float, ...]],
    warnings: Sequence[str] = (),
) -> SearchResult:
    """Write all files of a search; returns its result."""
    files = {"csv": out / "trials.csv", "json": out / RESULT, "html": out / "search.html"}
    write_file(files["csv"], trials_csv(space, trials))
    streams: tuple[str, ...] = ()
    if best is not None:
        files["config"] = out / "best.toml"
        config = space.config(best.values)
        write_file(files["config"], to_toml(config))
        config, _ = resolve(cache, config)
        streams = (*config.visual, *config.audio)
    result = SearchResult(tuple(trials), best, holdout, importances(space, trials), files, tuple(warnings))
    write_file(files["json"], json.dumps(result.document(), indent=1) + "\n")
    page = render(
        "search.html",
        result=result,
        options=options,
        place=cache.place,
        settings=list(space.searched),
        holdout=[(name, float(np.mean(values)), min(values), max(values)) for name, values in holdout.items()],
        plot=Markup(plot(trials)),
        trials=sorted(trials, key=lambda trial: (trial.state != DONE, -np.nan_to_num(trial.score, nan=-9))),
        demonstration=random_encoders(sorted(streams)),
    )
    write_file(files["html"], page)
    return result


def plot(trials: Sequence[Trial]) -> str:
    """Score of every trial in order, and the best so far, as an SVG element."""
    scored = [trial for trial in trials if trial.rungs]
    if not scored:
        return ""
    low, high = (edge(trial.score for trial in scored) for edge in (min, max))
    spread = max(high - low, 0.01)
    low, high = low - 0.05 * spread, high + 0.05 * spread

    def place(number: float, score: float) -> tuple[str, str]:
        x = LEFT + (number - 0.5) / len(trials) * (WIDTH - LEFT - RIGHT)
        return f"{x:.1f}", f"{TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Mean CCC of every trial">']
    for tick in np.linspace(low, high, 5):
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{tick:.3f}</text>')
    best, points = -np.inf, []
    for trial in scored:
        if trial.state == DONE:
            best = max(best, trial.score)
            points.append(",".join(place(trial.number, best)))
    parts.append(f'<polyline class="series0" points="{" ".join(points)}"/>')
    for trial in scored:
        x, y = place(trial.number, trial.score)
        title = f"<title>trial {trial.number}: {trial.score:.3f}, {trial.state} after {trial.epochs} epochs</title>"
        kind = "mean" if trial.state == DONE else "seed"
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{4 if kind == "mean" else 3}">{title}</circle>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">trial</text>')
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class NestedResult:
    """Result of a nested search.

    Attributes:
        searches: the result of each outer fold's search.
        holdout: dimension -> CCC on each outer fold, mean of the winner's models.
        file: `nested.json`.
    """

    searches: tuple[SearchResult, ...]
    holdout: Mapping[str, tuple[float, ...]]
    file: Path

    def document(self) -> dict[str, Any]:
        """`nested.json`, which --json prints."""
        scores = {
            name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "folds": list(values)}
            for name, values in self.holdout.items()
        }
        searches = [search.document() for search in self.searches]
        return {"outer_folds": len(searches), "holdout_ccc": scores, "searches": searches}


def run_nested_search(
    cache: Cache, space: Space, trials: int, out: Path, options: SearchOptions, outer: int, **options_of_search: Any
) -> NestedResult:
    """Repeat a search on the other folds of each of `outer` outer folds, and score its winner on that fold.

    The mean over the outer folds estimates the whole procedure, selection included, on all clips of the default splits.

    Args:
        cache, space, trials, options: as of `run_search`; the splits of `options` are not used.
        out: the folder; search k is in `outer<k>`.
        options_of_search: further arguments of `run_search`.

    Raises:
        UsageError: as `run_search`; every trial of an outer fold failed.
    """
    make_folds(cache, TrainConfig.fold_splits, outer)
    searches: list[SearchResult] = []
    scores: dict[str, list[float]] = {}
    for fold in range(1, outer + 1):
        splits = replace(options, train=f"rest{fold}of{outer}", holdout=f"fold{fold}of{outer}")
        result = run_search(cache, space, trials, out / f"outer{fold}", splits, **options_of_search)
        if result.best is None:
            raise UsageError(explain(f"Every trial of outer fold {fold} failed", remedy=f"See {result.files['csv']}"))
        searches.append(result)
        for name, values in result.holdout.items():
            scores.setdefault(name, []).append(float(np.mean(values)))
    holdout = {name: tuple(values) for name, values in scores.items()}
    nested = NestedResult(tuple(searches), holdout, out / "nested.json")
    write_file(nested.file, json.dumps(nested.document(), indent=1) + "\n")
    return nested
