"""Training of runs on one cache: in one batch where that measures faster, else one after the other."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.train.config import TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.runs import RunFolder
from vaflow.train.session import Data, LoadedSplits, Session, new_model, reproducible
from vaflow.train.together.batches import Choice, architecture, choose
from vaflow.train.together.epochs import FAILURES, Member, fit_together
from vaflow.train.training import Result, is_finished, open_session, train_run

log = logging.getLogger(__name__)

MODES = ("auto", "always", "never")  # of --together


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
    """Trains runs on one cache. The latest splits stay loaded; no pictures and no event files are written.

    Args:
        cache: of the clips.
        together: "always" trains runs of one architecture in a batch, "never" one after the other; "auto" times both.
        allow_missing: leave labelled validation clips without features out of the scores.
        keep_checkpoint: keep the state after the last epoch, so that more epochs can continue from it.
        on_choice: called with a line about each batch that was timed.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        together: str = "auto",
        allow_missing: bool = False,
        keep_checkpoint: bool = False,
        on_choice: Callable[[str], None] = log.info,
    ) -> None:
        self._cache, self._loaded = cache, LoadedSplits(cache)
        self._together, self._on_choice = check_mode(together), on_choice
        self._allow_missing, self._keep_checkpoint = allow_missing, keep_checkpoint
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
            if not (config.finetune or (RunFolder(out).done and not self._keep_checkpoint)):
                data = self._loaded.data(resolve(self._cache, config)[0])
            return train_run(
                self._cache,
                config,
                out,
                data=data,
                allow_missing=self._allow_missing,
                tensorboard=False,
                figures=False,
                keep_checkpoint=self._keep_checkpoint,
            )
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
                    session = replace(
                        open_session(stack, self._cache, config, out),
                        allow_missing=self._allow_missing,
                        tensorboard=False,
                        figures=False,
                        keep_checkpoint=self._keep_checkpoint,
                    )
                    if is_finished(session):
                        yield number, Result(session.folder.read_metrics(), was_done=True)
                        continue
                    device = choose_device(session.config.device)
                    session = stack.enter_context(reproducible(session, device)).begin(splits)
                    model = new_model(session.config, session.inputs, splits, device)
                    excluded = frozenset(session.unscored(splits))
                except FAILURES as error:
                    yield number, error
                    continue
                members.append(Member(model, session.config, splits, session.folder.checkpoint_file, excluded))
                sessions.append((number, session))
            for member, failure in fit_together(members):
                number, session = sessions[members.index(member)]
                yield number, failure or _finish(session, member)


def _finish(session: Session, member: Member) -> Result | Exception:
    """Write the final files of a run; returns the error if that fails."""
    try:
        member.model.load_state_dict(dict(member.progress.best))
        return Result(session.finish(member.model, member.progress, member.data))  # type: ignore[arg-type]
    except FAILURES as error:
        return error
