"""Runs that train together: their folders, locks, checks and final files."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.train.config import TrainConfig
from vaflow.train.session import Data, Session, new_model, reproducible
from vaflow.train.together.epochs import FAILURES, Member, fit_together
from vaflow.train.training import Result, is_finished, open_session


def train_together(
    cache: Cache, runs: Sequence[tuple[TrainConfig, Path]], data: Data, *, allow_missing: bool = False
) -> Iterator[tuple[int, Result | Exception]]:
    """Train or resume runs that can train together; with the files of `train_run` except figures.

    Args:
        cache: of the clips.
        runs: settings and directory of each.
        data: both splits, for the streams and windows of these runs.
        allow_missing: leave labelled validation clips without features out of the scores.

    Yields:
        The number of a run and its result or its error, in the order in which the runs end.
    """
    with ExitStack() as stack:
        members: list[Member] = []
        sessions: list[tuple[int, Session]] = []
        for number, (config, out) in enumerate(runs):
            try:
                session = open_session(stack, cache, config, out)
                session = replace(session, allow_missing=allow_missing, tensorboard=False, figures=False)
                session = replace(session, keep_checkpoint=False)
                if is_finished(session):
                    yield number, Result(session.folder.read_metrics(), was_done=True)
                    continue
                device = choose_device(session.config.device)
                session = stack.enter_context(reproducible(session, device)).begin(data)
                model = new_model(session.config, session.inputs, data, device)
                excluded = frozenset(session.unscored(data))
            except FAILURES as error:
                yield number, error
                continue
            members.append(Member(model, session.config, session.folder.checkpoint_file, excluded))
            sessions.append((number, session))
        for member, failure in fit_together(members, data.train, data.val) if members else ():
            number, session = sessions[members.index(member)]
            yield number, failure or _finish(session, member, data)


def _finish(session: Session, member: Member, data: Data) -> Result | Exception:
    """Write the final files of a run; returns the error if that fails."""
    try:
        member.model.load_state_dict(dict(member.progress.best))
        return Result(session.finish(member.model, member.progress, data))  # type: ignore[arg-type]
    except FAILURES as error:
        return error
