"""Training of a run: its first start, its continuation, and the comparison of its clips and settings with the start."""

import logging
import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import UsageError, explain
from vaflow.files import lock_folder
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.data import Data, check_has_clips, load_data
from vaflow.train.evaluate import outdated_warnings
from vaflow.train.folds import absolute_groups, split_items
from vaflow.train.inputs import resolve
from vaflow.train.run_folder import RunFolder
from vaflow.train.run_record import (
    ClipDigest,
    RunRecord,
    changed_settings,
    changes,
    check_splits_apart,
    clip_digests,
    new_record,
    shared_recordings,
    streams_read,
    to_json,
)
from vaflow.train.session import Session, new_model, reproducible
from vaflow.train.training_loop import fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The metrics of a run, and whether it was finished before."""

    metrics: dict[str, Any]
    was_done: bool = False


def train_run(
    cache: Cache,
    config: TrainConfig,
    out: Path,
    *,
    data: Data | None = None,
    weights: Mapping[str, Path] | None = None,
    allow_missing: bool = False,
    fresh: bool = False,
    tensorboard: bool = True,
    figures: bool = True,
    keep_checkpoint: bool = True,
    show: bool = False,
) -> Result:
    """Train a run, resume it, or train it longer.

    Args:
        config: settings; unset ones are resolved from the cache.
        out: directory of the run.
        data: both splits, if they are loaded already, for exactly these streams and windows.
        weights: with finetune: stream -> local weights of its encoder, instead of the hub's.
        allow_missing: leave labelled validation clips without features out of the scores.
        fresh: delete the run in `out` once the settings and the clips have been accepted.
        keep_checkpoint: keep the state after the last epoch, so that more epochs can continue from it.

    Raises:
        UsageError: settings; a directory of another run, or one that another process writes; other clips than at
            the first start; splits that share recordings.
        WeightsError, FingerprintError: with finetune: the cache's encoders cannot be loaded.
        DataError: features, labels or losses are unusable; the clips are named.
    """
    if weights and not config.finetune:
        raise UsageError(explain("--weights is only for fine-tuning", remedy="Add --finetune"))
    with ExitStack() as stack:
        session = open_session(stack, cache, config, out, fresh=fresh)
        session = replace(session, allow_missing=allow_missing, tensorboard=tensorboard, figures=figures)
        return _train(replace(session, show=show, keep_checkpoint=keep_checkpoint), data, weights or {})


def open_session(stack: ExitStack, cache: Cache, config: TrainConfig, out: Path, *, fresh: bool = False) -> Session:
    """Lock the directory of a run until `stack` closes, and resolve its settings; nothing is deleted yet.

    Raises:
        UsageError: settings; a directory of another run, or one that another process writes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not config.finetune:
        problem = f"{processes} processes (torchrun) are only for --finetune: each would train the same heads"
        raise UsageError(explain(problem, remedy="Run `vaflow train` without torchrun"))
    folder = RunFolder(Path(out))
    folder.make()
    if os.environ.get("RANK", "0") == "0":  # of several processes of one run, this one holds the lock
        stack.enter_context(lock_folder(folder.path, "vaflow train"))
    config, inputs = resolve(cache, config)
    return Session(cache, config, inputs, folder, new_record(cache, config, inputs, folder.path), fresh=fresh)


def _train(session: Session, data: Data | None, weights: Mapping[str, Path]) -> Result:
    cache, config, inputs, folder = session.cache, session.config, session.inputs, session.folder
    unfinished = session_to_train(session)
    if unfinished is None:
        return Result(folder.read_metrics(), was_done=True)
    session = unfinished
    if config.finetune:
        from vaflow.train.finetune import finetune

        return Result(finetune(session, weights))
    device = choose_device(config.device)
    with reproducible(session, device) as session:
        if data is None:
            data = load_data(cache, config, inputs, device=device, scratch=folder.path, show=session.show)
        model = new_model(config, inputs, data, device)  # first: settings that do not fit start no run
        session = session.begin(data)
        with session.reporting() as on_epoch:
            options = {"checkpoint": folder.checkpoint_file, "excluded": session.unscored(data)}
            progress = fit(model, data.train, data.val, config, on_epoch=on_epoch, **options)
        model.load_state_dict(dict(progress.best))
        return Result(session.finish(model, progress, data))


def session_to_train(session: Session) -> Session | None:
    """Compare the settings and the clips with those of the run's first start; returns None if nothing is left to train.

    Raises:
        UsageError: the settings or the clips differ, or the splits share recordings.
    """
    config, folder = session.config, session.folder
    old = None if session.fresh else folder.record()
    waits_longer = False
    if old is not None:
        waits_longer = AUTO == config.epochs == old.config.epochs and config.patience > old.config.patience
        more_epochs = config.epochs == AUTO or AUTO != old.config.epochs <= config.epochs
        longer = more_epochs and config.schedule == "constant" and folder.checkpoint_file.is_file()
        ignore = ["device", *(["epochs"] if longer else []), *(["patience"] if longer or not waits_longer else [])]
        check_unchanged(folder.path, old, session.record, ignore)
    clips = _checked_clips(session, old)
    if old is None:
        return replace(session, clips=to_json(clips))
    if folder.done and old.config.epochs == config.epochs and not waits_longer:
        return None
    return session


def check_unchanged(run: Path, old: RunRecord, new: RunRecord, ignore: Iterable[str]) -> None:
    """Check that a run is resumed with the settings and streams that it was started with.

    Raises:
        UsageError: something differs; every difference is named.
    """
    started = replace(old.config, fold_groups=absolute_groups(old.config.fold_groups))  # older versions: as typed
    changed = changed_settings(started, new.config, ignore)
    prints = {stream.name: stream.fingerprint for stream in old.streams}
    changed += [
        f"stream {stream.name}: made with other settings"
        for stream in new.streams
        if prints.get(stream.name, stream.fingerprint) != stream.fingerprint
    ]
    if old.prompts and old.prompts != new.prompts and old.config.prompts == new.config.prompts:
        changed.append(f"prompts {new.config.prompts!r}: other templates, descriptions or encoder")
    if changed:
        keep = f"--config {shlex.quote(str(run / 'config.toml'))}"
        remedy = f"Choose another --out, resume with its settings ({keep}), or train again with --fresh"
        raise UsageError(explain(f"{run} holds a run with other settings", got="; ".join(changed), remedy=remedy))


def _checked_clips(session: Session, old: RunRecord | None) -> dict[str, dict[str, ClipDigest]]:
    """Compare the clips with those of the run's first start, or check them at the first; returns their digests."""
    cache, config, folder = session.cache, session.config, session.folder
    check_has_clips(cache)
    known = streams_read(config, cache)
    splits = {
        split: clip_digests(cache, known, split_items(cache, split, config.fold_splits, config.fold_groups))
        for split in (config.train_split, config.val_split)
    }
    before = None if old is None else folder.read_clips()
    if before is not None:
        changed = changes(before, splits)
        if changed:
            problem = f"{cache.place} does not hold the clips that {folder.path} was started with"
            remedy = "Train again with --fresh, or choose another --out"
            raise UsageError(explain(problem, got="; ".join(changed), remedy=remedy))
    elif old is not None:
        log.warning("%s has no clips.json (older version): it is not known whether its clips changed", folder.path)
    else:
        if not config.shared_sources and config.train_split != config.val_split:
            check_splits_apart(splits[config.train_split], splits[config.val_split])
        for split, clips in splits.items():
            for warning in (*shared_recordings(split, clips), *outdated_warnings(cache, known, split, clips)):
                log.warning("%s", warning)
    return splits
