"""The space of a search, its trials, how values are proposed, which trials stop early, and the log that resumes it.

A space is read from a TOML file: for every setting a fixed value, a list of choices, or a range.
"""

import csv
import io
import json
import math
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaflow.errors import CorruptError, UsageError, explain
from vaflow.files import append_line
from vaflow.settings import settings_of
from vaflow.train.config import AUTO, TrainConfig, coerce, merge
from vaflow.train.repeats import check_mode
from vaflow.train.training_loop import seed_from

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

RESERVED = ("folds", "fold", "fold_groups", "fold_splits", "train_split", "val_split", "finetune", "device", "init")
RANGE = {"low", "high", "log", "step"}
EXAMPLE = "lr = { low = 1e-5, high = 1e-3, log = true }"
FACTOR = 3  # one of this many trials continues at a rung, and the next rung has this many times the epochs
DONE, STOPPED, FAILED = "done", "stopped", "failed"
SAMPLERS = ("bayes", "random")


@dataclass(frozen=True)
class Choice:
    """A choice: values as `--set` writes them."""

    values: tuple[str, ...]

    def distribution(self) -> "BaseDistribution":
        """The distribution for Optuna."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Range:
    """A number between two limits.

    Attributes:
        low, high: the limits, both included.
        log: draw the logarithm uniformly.
        step: distance of two values; None: every number (integers: 1).
        whole: only integers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def distribution(self) -> "BaseDistribution":
        """The distribution for Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Space:
    """Searched settings, and settings that stay fixed.

    Attributes:
        fixed: setting -> value.
        searched: setting -> choice or range, in the order of the file.
    """

    fixed: Mapping[str, Any]
    searched: Mapping[str, Choice | Range]

    def config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The settings of a trial.

        Raises:
            UsageError: the values do not go together.
        """
        return merge(self.fixed, values)


def read_space(path: Path) -> Space:
    """Read a space from a TOML file.

    Raises:
        UsageError: the file cannot be read, is not TOML, or an entry does not fit its setting.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(explain(f"Cannot read the space {path}", got=error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(explain(f"{path} is not TOML", expected=f"lines such as `{EXAMPLE}`", got=error)) from error
    fixed: dict[str, Any] = {}
    searched: dict[str, Choice | Range] = {}
    if unknown := [key for key in document if key not in settings_of(TrainConfig)]:
        raise UsageError(explain(f"Unknown setting in {path}", got=unknown[0], choices=settings_of(TrainConfig)))
    for key, value in document.items():
        if key in RESERVED:
            raise UsageError(explain(f"{path}: {key} cannot be set in a search: the search sets it"))
        if isinstance(value, list):
            searched[key] = _choice(key, value)
        elif isinstance(value, dict):
            searched[key] = _range(key, value)
        else:
            fixed[key] = coerce(key, value)
    if not searched:
        raise UsageError(explain(f"{path} leaves nothing to search", expected=f"a list or a range, as `{EXAMPLE}`"))
    merge(fixed)
    return Space(fixed, searched)


def _choice(key: str, values: list[Any]) -> Choice:
    described = settings_of(TrainConfig)[key]
    typed = [coerce(key, value) for value in values]
    for value in typed:
        described.check(value)
    texts = [described.text(value) for value in typed]
    if len(set(texts)) < max(2, len(values)):
        raise UsageError(explain(f"{key} needs at least two different choices", got=values))
    return Choice(tuple(texts))


def _range(key: str, table: Mapping[str, Any]) -> Range:
    low, high = (coerce(key, table.get(limit)) for limit in ("low", "high"))
    described = settings_of(TrainConfig)[key]
    numeric = described.kind in (int, float) and None not in (low, high) and table.keys() <= RANGE
    log, step = table.get("log", False), table.get("step")
    stepped = step is None or (type(step) in (int, float) and math.isfinite(step) and step > 0 and not log)
    if not numeric or type(log) is not bool or not stepped or not low < high or (log and low <= 0):
        expected = f"low < high, log or step, as `{EXAMPLE}`"
        raise UsageError(explain(f"The range of {key} is not valid", expected=expected, got=table))
    for limit in (low, high):
        described.check(limit)
    return Range(low, high, log, step, described.kind is int)


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        number: counted from 1.
        state: "done" (all epochs), "stopped" (early) or "failed".
        rungs: mean CCC over the folds at each rung.
        folds: CCC of each fold at the last rung.
        message: why it failed; empty: it did not.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    epochs: int = 0
    rungs: tuple[float, ...] = ()
    folds: tuple[float, ...] = ()
    seconds: float = 0.0
    message: str = ""

    @property
    def score(self) -> float:
        """Mean CCC over the folds at the last rung; NaN if the trial failed."""
        return self.rungs[-1] if self.rungs else math.nan


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search beside its space.

    Attributes:
        sampler: "bayes" (TPE) or "random".
        folds: inner folds of the training split; a trial's score is the mean over them.
        train: split that the folds divide.
        holdout: split on which the winner is scored; no trial sees it.
        halving: stop trials early that are not among the best third.
        batch: number of trials that are proposed, and trained, at once.
        allow_missing: leave labelled clips without features out of the scores.
    """

    sampler: str = "bayes"
    folds: int = 3
    train: str = "train"
    holdout: str = "val"
    seed: int = 0
    halving: bool = True
    device: str = "auto"
    allow_missing: bool = False
    batch: int = 4
    together: str = "auto"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UsageError(explain("Unknown --sampler", got=self.sampler, choices=SAMPLERS))
        if self.folds < 2:
            raise UsageError(explain(f"--folds must be >= 2 (got {self.folds})"))
        if self.batch < 1:
            raise UsageError(explain(f"--batch must be >= 1 (got {self.batch})"))
        check_mode(self.together)
        if self.train == self.holdout:
            raise UsageError(explain("--holdout must be another split than --train", got=self.holdout))


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        trials: all finished trials, in order.
        best: the done trial with the highest score over the inner folds; None: all failed.
        holdout: metrics of the winner's models, one per inner fold, on the held-out split: dimension -> CCC of each.
        importance: setting -> share, largest first; empty with few trials.
        files: "csv", "json", "html", "config" (settings of the winner) -> path.
        warnings: about the scores on the held-out split.
    """

    trials: tuple[Trial, ...]
    best: Trial | None
    holdout: Mapping[str, tuple[float, ...]]
    importance: Mapping[str, float]
    files: Mapping[str, Path]
    warnings: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """`search.json`, which --json prints."""
        best = self.best
        winner = best and {"trial": best.number, "values": dict(best.values), "selected_ccc": best.score}
        return {
            "trials": len(self.trials),
            "states": {state: sum(t.state == state for t in self.trials) for state in (DONE, STOPPED, FAILED)},
            "best": winner,
            "holdout_ccc": {name: sum(values) / len(values) for name, values in self.holdout.items()},
            "warnings": list(self.warnings),
            "importance": dict(self.importance),
            "files": {kind: str(path) for kind, path in self.files.items()},
        }


@dataclass
class Log:
    """Finished trials, one JSON object per line of a file."""

    path: Path
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Log":
        """The log in a file; empty if there is none. A last line that a kill cut off is dropped.

        Raises:
            CorruptError: the file is damaged.
        """
        if not path.is_file():
            return cls(path)
        *lines, rest = path.read_text("utf-8").split("\n")
        if rest:
            path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        trials = []
        for number, line in enumerate(lines, 1):
            try:
                document = json.loads(line)
                rungs, folds = (tuple(map(float, document.pop(name))) for name in ("rungs", "folds"))
                trials.append(Trial(**document, rungs=rungs, folds=folds))
                if trials[-1].number != number:
                    raise ValueError(f"line {number} is trial {trials[-1].number}")
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise CorruptError(explain(f"{path} is damaged", got=error, remedy="Choose another --out")) from error
        return cls(path, trials)

    def add(self, trial: Trial) -> None:
        """Append a trial and flush the file."""
        append_line(self.path, json.dumps(asdict(trial)))
        self.trials.append(trial)


def trials_csv(space: Space, trials: Sequence[Trial]) -> str:
    """A row per trial, with the score of each fold."""
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


def rungs(config: TrainConfig, *, halving: bool) -> tuple[int, ...]:
    """Epochs at which a trial is compared, the last of them its end.

    A schedule over the whole run and `epochs=auto` have no meaning for a part of the epochs: such trials have one rung.
    """
    if not halving or config.epochs == AUTO or config.schedule != "constant":
        return (config.epochs,)
    steps = {config.epochs}
    epochs = config.epochs // FACTOR
    while epochs >= 1 and len(steps) < 3:
        steps.add(epochs)
        epochs //= FACTOR
    return tuple(sorted(steps))


def continues(score: float, rung: int, others: Sequence[Trial]) -> bool:
    """Whether a trial is in the best third at a rung, among the trials that reached it (asynchronous halving)."""
    scores = [score, *(trial.rungs[rung] for trial in others if len(trial.rungs) > rung)]
    return sorted(scores, reverse=True).index(score) < math.ceil(len(scores) / FACTOR)


def propose(
    space: Space, trials: Sequence[Trial], open_trials: Sequence[Mapping[str, Any]], sampler: str, seed: int
) -> dict[str, Any]:
    """Propose the values of the next trial; the same arguments give the same values, so resuming repeats them.

    Args:
        open_trials: values of the trials that are proposed at the same time: TPE keeps its distance from them.
    """
    study = optuna_study(space, trials, open_trials, sampler, seed)
    proposed = study.ask({name: kind.distribution() for name, kind in space.searched.items()}).params
    for name, kind in space.searched.items():
        if isinstance(kind, Range) and not kind.whole:  # rounded to four digits
            proposed[name] = min(kind.high, max(kind.low, float(f"{proposed[name]:.4g}")))
    return {name: proposed[name] for name in space.searched}


def optuna_study(
    space: Space, trials: Sequence[Trial], open_trials: Sequence[Mapping[str, Any]], sampler: str, seed: int
) -> "optuna.Study":
    """The trials as a study in memory: Optuna proposes values and measures importance, and stores nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    number = seed_from(seed, len(trials) + len(open_trials)) % 2**32
    if sampler == "random":
        chosen: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=number)
    else:
        with warnings.catch_warnings():  # constant_liar is marked as experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            chosen = optuna.samplers.TPESampler(seed=number, constant_liar=bool(open_trials))
    study = optuna.create_study(direction="maximize", sampler=chosen)
    distributions = {name: kind.distribution() for name, kind in space.searched.items()}
    states = {
        DONE: optuna.trial.TrialState.COMPLETE,
        STOPPED: optuna.trial.TrialState.PRUNED,
        FAILED: optuna.trial.TrialState.FAIL,
    }
    for trial in trials:
        values: dict[str, Any] = {"params": dict(trial.values), "intermediate_values": dict(enumerate(trial.rungs))}
        score, state = trial.score if trial.state == DONE else None, states[trial.state]
        study.add_trial(optuna.trial.create_trial(state=state, value=score, distributions=distributions, **values))
    for params in open_trials:
        running = optuna.trial.TrialState.RUNNING
        study.add_trial(optuna.trial.create_trial(state=running, params=dict(params), distributions=distributions))
    return study


def importances(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Importance of each setting (PED-ANOVA), largest first.

    Trials that stopped early count with their last score. Empty with fewer than four scored trials.
    """
    import optuna

    scored = [Trial(t.number, t.values, DONE, rungs=(t.score,)) for t in trials if t.rungs]
    if len(scored) < 4 or len({trial.score for trial in scored}) == 1:
        return {}
    study = optuna_study(space, scored, (), "random", 0)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return {
        name: float(share)
        for name, share in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }
