"""Training of several runs on one cache: in one batch where its steps measure faster, else one after the other.

The repeats of a run, one per seed, per fold of a cross-validation, or both, are trained so.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from vaflow.cache import Cache
from vaflow.device import choose_device, keep_memory
from vaflow.errors import UsageError, examples, explain
from vaflow.files import lock_folder, write_file
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.data import Data, LoadedSplits
from vaflow.train.inputs import resolve
from vaflow.train.losses import LOSS_SETTINGS
from vaflow.train.metrics import SCORES
from vaflow.train.run_folder import RunFolder
from vaflow.train.session import Session, new_model, reproducible
from vaflow.train.stacked_loop import FAILURES, Member, fit_together, take_step
from vaflow.train.stacked_models import StackedModels
from vaflow.train.train_run import Result, open_session, session_to_train, train_run
from vaflow.train.training_loop import make_optimizer, train_step
from vaflow.train.windows import gather_each

log = logging.getLogger(__name__)

MODES = ("auto", "always", "never")  # of --together
LIMIT = 8  # runs in a batch
REPEATS = 4  # timed steps of each way, after one that is not timed
WORTH_MEASURING = 200  # a run with fewer steps is not timed: it takes little longer than the measurement
GAIN = 0.95  # a batch must take at most this share of the time of its runs one after the other
OPEN_EPOCHS = 15  # assumed number of epochs with epochs=auto
# Settings that may differ between runs of a batch.
VARYING = {
    *("seed", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "epochs", "patience", "best", "prompts"),
    *("dropout", "modality_dropout", *LOSS_SETTINGS),
}
FOLD = {"fold", "train_split", "val_split"}  # likewise, in a cross-validation: folds share the loaded clips
T = TypeVar("T")


def check_mode(mode: str) -> str:
    """Return a value of --together, or raise UsageError."""
    if mode not in MODES:
        raise UsageError(explain("Unknown --together", got=mode, choices=MODES))
    return mode


@contextmanager
def one_thread(level: int) -> Iterator[None]:
    """Run torch with one thread and drop log messages below `level`.

    The heads are too small to gain from more threads, and the results do not depend on the number of processes.
    """
    logger, threads = logging.getLogger("vaflow"), torch.get_num_threads()
    before = logger.level
    torch.set_num_threads(1)
    logger.setLevel(level)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(before)


class Trainer:
    """Trains runs on one cache. The latest splits stay loaded; no figures and no event files are written.

    Args:
        cache: of the clips.
        together: "always" trains runs of one architecture in a batch, "never" one after the other; "auto" times both.
        allow_missing: leave labelled validation clips without features out of the scores.
        keep_checkpoint: keep the state after the last epoch, so that more epochs can continue from it.
        fresh: train runs again from the start.
        on_choice: called with a line about each batch that was timed.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        together: str = "auto",
        allow_missing: bool = False,
        keep_checkpoint: bool = False,
        fresh: bool = False,
        on_choice: Callable[[str], None] = log.info,
    ) -> None:
        self._cache, self._loaded = cache, LoadedSplits(cache)
        self._together, self._on_choice = check_mode(together), on_choice
        self._options: dict[str, Any] = {"allow_missing": allow_missing, "keep_checkpoint": keep_checkpoint}
        self._options |= {"tensorboard": False, "figures": False, "fresh": fresh}
        self._choices: dict[tuple[object, ...], Choice] = {}

    def train(self, runs: Sequence[tuple[TrainConfig, Path]]) -> Iterator[tuple[int, Result | Exception]]:
        """Train runs of one architecture, or a single run, or resume them.

        Runs that are left when the batch fails as a whole, for example for lack of memory, train one after the other.

        Args:
            runs: settings and directory of each.

        Yields:
            The number of a run and its result or its error, in the order in which the runs end.
        """
        waiting = dict(enumerate(runs))
        if len(runs) > 1 and self._together != "never":
            try:
                configs = [resolve(self._cache, config)[0] for config, _ in runs]
                data = [self._loaded.data(config) for config in configs]
                if self._together == "always" or self._faster(configs, data):
                    for number, result in self._train_together(runs, data):
                        del waiting[number]
                        yield number, result
            except FAILURES as error:
                log.warning("%d runs train one after the other: %s", len(waiting), error)
        for number, (config, out) in waiting.items():
            yield number, self._train_alone(config, out)

    def _faster(self, configs: Sequence[TrainConfig], data: Sequence[Data]) -> bool:
        """Whether a batch measures faster; batches of one architecture and size are timed once."""
        key = (architecture(configs[0]), len(configs))
        if key not in self._choices:
            self._choices[key] = choose(self._cache, configs, data)
            if self._choices[key].alone:
                self._on_choice(str(self._choices[key]))
        return self._choices[key].faster

    def _train_alone(self, config: TrainConfig, out: Path) -> Result | Exception:
        try:
            data = None
            done = RunFolder(out).done and not self._options["fresh"]
            if not (config.finetune or (done and not self._options["keep_checkpoint"])):
                data = self._loaded.data(resolve(self._cache, config)[0])
            return train_run(self._cache, config, out, data=data, **self._options)
        except FAILURES as error:
            return error

    def _train_together(
        self, runs: Sequence[tuple[TrainConfig, Path]], data: Sequence[Data]
    ) -> Iterator[tuple[int, Result | Exception]]:
        with ExitStack() as stack:
            members: list[Member] = []
            sessions: list[tuple[int, Session]] = []
            for number, ((config, out), splits) in enumerate(zip(runs, data, strict=True)):
                try:
                    opened = replace(open_session(stack, self._cache, config, out), **self._options)
                    session = session_to_train(opened)
                    if session is None:
                        yield number, Result(opened.folder.read_metrics(), was_done=True)
                        continue
                    device = choose_device(session.config.device)
                    session = stack.enter_context(reproducible(session, device))
                    model = new_model(session.config, session.inputs, splits, device)
                    session = session.begin(splits)
                    excluded = frozenset(session.unscored(splits))
                except FAILURES as error:
                    yield number, error
                    continue
                members.append(Member(model, session.config, splits, session.folder.checkpoint_file, excluded))
                sessions.append((number, session))
            for member, failure in fit_together(members):
                number, session = sessions[members.index(member)]
                try:
                    if failure is not None:
                        raise failure
                    member.model.load_state_dict(dict(member.progress.best))
                    finished = session.finish(member.model, member.progress, member.data)  # type: ignore[arg-type]
                except FAILURES as error:
                    yield number, error
                else:
                    yield number, Result(finished)


def can_train_together(config: TrainConfig) -> bool:
    """Whether runs of these resolved settings can train in a batch.

    Encoders and learned context vectors are not stacked. The attention of a Transformer draws its dropout masks
    inside PyTorch, where runs cannot have a generator each.
    """
    draws_masks = config.temporal == "transformer" and config.dropout > 0
    return not (config.finetune or config.prompt_context or draws_masks)


def batches_of(items: Sequence[T], config_of: Callable[[T], TrainConfig], processes: int = 1) -> list[list[T]]:
    """Divide runs into batches of one architecture, in their order; a run that fits no other is a batch of one.

    Args:
        items: runs.
        config_of: the resolved settings of a run.
        processes: number of batches that train at once: batches are made small enough to occupy all of them.
    """
    groups: dict[object, list[T]] = {}
    for number, item in enumerate(items):
        config = config_of(item)
        groups.setdefault(architecture(config) if can_train_together(config) else number, []).append(item)
    size = min(LIMIT, -(-len(items) // processes))
    counts = [(group, -(-len(group) // size)) for group in groups.values()]
    return [g[k * len(g) // count : (k + 1) * len(g) // count] for g, count in counts for k in range(count)]


def architecture(config: TrainConfig) -> tuple[object, ...]:
    """Key that is equal for runs that can train in one batch: the model, the data, and the terms of the loss."""
    varying = VARYING | FOLD if config.folds else VARYING
    fixed = tuple((name, value) for name, value in vars(config).items() if name not in varying)
    return (*fixed, config.kl_weight > 0, config.mse_weight > 0, config.nll_weight > 0)


@dataclass(frozen=True)
class Choice:
    """How a batch of runs is trained.

    Attributes:
        runs: how many.
        alone, together: seconds per step of all runs, one after the other and in a batch; 0: not measured.
        steps: of the longest run; an estimate where the number of epochs is open.
    """

    runs: int
    alone: float
    together: float
    steps: int

    @property
    def faster(self) -> bool:
        """Whether the batch is faster."""
        return 0 < self.together < GAIN * self.alone

    def __str__(self) -> str:
        seconds_by_mode = {"in one batch": self.together, "one after the other": self.alone}
        mode = "in one batch" if self.faster else "one after the other"
        times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in seconds_by_mode.items())
        minutes = self.steps * seconds_by_mode[mode] / 60
        return f"{self.runs} runs train {mode}: about {minutes:.1f} min (a step of all: {times})"


def choose(cache: Cache, configs: Sequence[TrainConfig], data: Sequence[Data]) -> Choice:
    """Time some steps of runs of one architecture both ways. No generator and no file is changed.

    Args:
        cache: of the clips.
        configs: resolved settings per run.
        data: both splits per run.
    """
    config, windows = configs[0], data[0].train
    per_epoch = max(-(-len(splits.train.trainable) // config.batch_size) for splits in data)
    steps = per_epoch * max(c.epochs if c.epochs != AUTO else OPEN_EPOCHS for c in configs)
    if steps < WORTH_MEASURING:
        return Choice(len(configs), 0.0, 0.0, steps)
    device = choose_device(config.device)
    keep_memory()
    inputs = resolve(cache, config)[1]
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        model = new_model(config, inputs, data[0], device).train()
        optimizer = make_optimizer(model, config)
        pairs = zip(configs, data, strict=True)
        members = [Member(new_model(c, inputs, splits, device), c, splits) for c, splits in pairs]
        stack = StackedModels([member.model for member in members], configs, capture_after=1)
        orders = [splits.train.shuffled(config.batch_size, torch.Generator().manual_seed(0)) for splits in data]
        ids = list(islice(zip(*map(cycle, orders), strict=False), REPEATS + 1))
        size = min(len(chosen) for step in ids for chosen in step)  # equal, also where an epoch is a step
        alone = _seconds(lambda k: train_step(model, optimizer, windows.gather(ids[k][0][:size]), config), device)
        runs = range(len(members))
        sets = [splits.train for splits in data]

        def step(k: int) -> object:
            return take_step(stack, members, runs, gather_each(sets, [chosen[:size] for chosen in ids[k]]), k)

        together = _seconds(step, device)
    return Choice(len(configs), alone * len(configs), together, steps)


def _seconds(step: Callable[[int], object], device: torch.device) -> float:
    """The fastest of some steps: other work on the machine only ever slows them down."""
    seconds = []
    for k in range(REPEATS + 1):
        begun = time.perf_counter()
        step(k)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


@dataclass(frozen=True)
class Repeats:
    """Outcome of several runs.

    Attributes:
        scores: name of each finished run -> CCC of valence, arousal and their mean; None where nothing is labelled.
        failures: name of each failed run -> its error.
    """

    scores: Mapping[str, Mapping[str, float | None]]
    failures: Mapping[str, Exception]

    @property
    def rejected(self) -> bool:
        """Whether no run was trained because of the settings or the directory."""
        return not self.scores and all(isinstance(error, UsageError) for error in self.failures.values())

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
    fresh: bool = False,
    level: int = logging.ERROR,
    on_run: Callable[[str, float | None], None] | None = None,
    on_choice: Callable[[str], None] = log.info,
) -> Repeats:
    """Train or resume runs in `out/NAME`, in batches where that measures faster; writes `repeats.json`.

    Args:
        runs: name -> settings.
        out: directory of the runs; not a run itself.
        fresh: train these runs again from the start; runs of other names stay.
        level: of the log lines of runs that are shown.
        on_run: called with the name and the mean CCC of each finished run.
        on_choice: called with a line about each batch that was timed.

    Raises:
        UsageError: settings that do not fit the cache; `out` is a run, or another process writes there.
    """
    RunFolder(out).refuse()
    scores: dict[str, Mapping[str, float | None]] = {}
    failures: dict[str, Exception] = {}
    warnings: dict[str, list[str]] = {}  # -> names of the runs
    resolved = [(name, resolve(cache, config)[0]) for name, config in runs.items()]
    trainer = Trainer(cache, together=together, allow_missing=allow_missing, fresh=fresh, on_choice=on_choice)
    results = out / "repeats.json"
    with lock_folder(out, "vaflow train"), one_thread(level):
        earlier = results.read_bytes() if results.is_file() else b""
        if fresh:
            results.unlink(missing_ok=True)  # its runs are deleted as soon as they start
        for batch in batches_of(resolved, lambda run: run[1]):
            for number, result in trainer.train([(config, out / name) for name, config in batch]):
                name = batch[number][0]
                if isinstance(result, Exception):
                    failures[name] = result
                    continue
                scores[name] = {key: result.metrics["ccc"][key] for key in SCORES}
                for warning in result.metrics["warnings"]:
                    warnings.setdefault(warning, []).append(name)
                if on_run is not None:
                    on_run(name, scores[name]["mean"])
        repeats = Repeats({name: scores[name] for name in runs if name in scores}, failures)
        if not repeats.rejected:
            write_file(results, json.dumps(repeats.document(), indent=1) + "\n")
        elif earlier:  # the results of an earlier command stay
            write_file(results, earlier)
    for warning, names in warnings.items():  # `one_thread` has dropped those of the runs
        log.warning("%s: %s", examples(names), warning)
    return repeats
