"""A fine-tuning run: training of the heads and the backbones, on one process or several.

After every epoch, validation encodes the split again, without augmentation, in float32, rounded to the stored dtype.
Its scores therefore equal those on a cache extracted with the tuned encoders. Lightning Fabric selects devices and
precision; `torchrun` starts several processes.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.train.config import TrainConfig
from vaflow.train.data import Data, load_data
from vaflow.train.finetune.backbones import (
    Backbone,
    Source,
    build_backbones,
    check_sources,
    choose_trained,
    load_sources,
    recompute,
    save_backbones,
    saved_weights,
    tunable,
)
from vaflow.train.finetune.step import TunedModel, Tuning, encode_split, make_optimizer, train_epoch
from vaflow.train.heads import VAModel, count_parameters
from vaflow.train.inputs import check_same
from vaflow.train.run_folder import RunFolder, load_run
from vaflow.train.run_record import RunRecord
from vaflow.train.session import Session, new_model, reproducible
from vaflow.train.traces import predict_clips
from vaflow.train.training_loop import Progress, run_epochs
from vaflow.train.windows import WindowSet

log = logging.getLogger(__name__)

PRECISION: Mapping[str, Literal["32-true", "bf16-mixed"]] = {"float32": "32-true", "bfloat16": "bf16-mixed"}
VARIANCE = "variance."  # prefix of the tensors of a variance head
HEADS = "heads."  # prefix of the heads' tensors in a `TunedModel`


@contextmanager
def processes(config: TrainConfig) -> Iterator[Any]:
    """Launch Fabric; inside, all processes but the first log warnings only.

    Processes stay connected until they exit, because a second connection would receive messages of the first.

    Raises:
        UsageError: the device is not available.
    """
    from lightning_fabric import Fabric

    device = choose_device(config.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    alone = [device.index or 0] if device.type == "cuda" else 1
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    fabric = Fabric(
        accelerator=device.type,
        devices=alone if world == 1 else local,
        num_nodes=1 if world == 1 else world // local,
        # A process can receive a batch without images or without audio, which leaves a backbone unused.
        strategy="auto" if world == 1 else "ddp_find_unused_parameters_true",
        precision=PRECISION[precision],
    )
    fabric.launch()
    quiet = logging.getLogger("vaflow")
    level = quiet.level
    if not fabric.is_global_zero:
        quiet.setLevel(logging.WARNING)
    try:
        yield fabric
    finally:
        quiet.setLevel(level)


def finetune(session: Session, weights: Mapping[str, Path]) -> dict[str, Any]:
    """Train or resume a run with its encoders; returns its metrics.

    Args:
        weights: stream name -> local weights of its encoder, instead of the hub's.

    Raises:
        UsageError: the cache does not hold the encoders' inputs, or settings do not go together.
        FingerprintError: the encoders, or the run of `init`, are not those of the cache.
        WeightsError: an encoder's weights cannot be loaded.
        DataError: clips, labels or losses are unusable; the clips are named.
    """
    chosen = tunable(session.inputs.streams)
    cache, config, inputs, folder = session.cache, session.config, session.inputs, session.folder
    check_sources(cache, chosen)
    with processes(config) as fabric, reproducible(session, fabric.device) as session:
        main = fabric.is_global_zero
        session = replace(session, show=session.show and main, tensorboard=session.tensorboard and main)
        session = replace(session, keep_checkpoint=False)  # the checkpoint has four times the size of the encoders
        backbones = build_backbones(chosen, weights, fabric.device)
        data = load_data(cache, config, inputs, device=fabric.device, scratch=folder.path, show=session.show)
        heads = _first_heads(session, data, fabric.device)
        session = session.begin(data, write=main)
        sources = [load_sources(cache, part, backbones, folder.path) for part in (data.train, data.val)]
        model = TunedModel(heads, backbones)
        progress = _fit(session, fabric, model, data, sources[0], sources[1])
        encoded = replace(data, val=_encode(fabric, data.val, sources[1], backbones))
        if config.uncertainty != "none":  # distances to the training features require the tuned encoders
            encoded = replace(encoded, train=_encode(fabric, data.train, sources[0], backbones))
        if main:
            tuned = save_backbones(backbones, folder.encoders, cache)
            folder.write_record(replace(session.record, tuned=tuned))
            kept = {name: tensor for name, tensor in progress.best.items() if name.startswith(HEADS)}
            best = {name.removeprefix(HEADS): tensor for name, tensor in kept.items()}
            session.finish(heads, replace(progress, best=best), encoded)
        fabric.barrier()
        return folder.read_metrics()


def _first_heads(session: Session, data: Data, device: Any) -> VAModel:
    """Return new heads, or those of the run named by `init`."""
    heads = new_model(session.config, session.inputs, data, device)
    if not session.config.init:
        return heads
    other = load_run(Path(session.config.init), device)
    if other.record.tuned:
        problem = f"init={session.config.init} is a fine-tuned run, whose heads require its encoders"
        raise UsageError(explain(problem, expected="a run of `vaflow train` without --finetune"))
    check_same(other.record.streams, session.cache)
    try:
        fresh = {name: tensor for name, tensor in heads.state_dict().items() if name.startswith(VARIANCE)}
        trained = other.model.state_dict().items()
        kept = {name: tensor for name, tensor in trained if not name.startswith(VARIANCE) or name in fresh}
        heads.load_state_dict(fresh | kept)  # one of both runs may have no variance head
    except RuntimeError as error:
        problem = f"The heads of {session.config.init} have other shapes"
        expected = "the same streams and model settings as this run's"
        got = str(error).splitlines()[-1].strip()
        remedy = f"Use its settings: --config {Path(session.config.init) / 'config.toml'}"
        raise UsageError(explain(problem, expected=expected, got=got, remedy=remedy)) from error
    return heads


def _fit(
    session: Session,
    fabric: Any,
    model: TunedModel,
    data: Data,
    train_sources: Mapping[str, Source],
    val_sources: Mapping[str, Source],
) -> Progress:
    config = session.config
    trained: list[nn.Parameter] = []
    for backbone in model.backbones:
        trained += choose_trained(backbone, config.finetune_blocks)
        if config.checkpointing:
            recompute(backbone)
    in_encoders = sum(parameter.numel() for parameter in trained)
    total = count_parameters(model.heads) + in_encoders
    log.info("%.1f million trainable parameters, %.1f of them in encoders", total / 1e6, in_encoders / 1e6)
    optimizer = make_optimizer(model, trained, config)
    wrapped, _ = fabric.setup(model, optimizer)
    tuning = Tuning(fabric, model, wrapped, optimizer, data.train, train_sources, config)
    with session.reporting() as on_epoch:
        progress = run_epochs(
            model,
            optimizer,
            config,
            lambda epoch: train_epoch(tuning, epoch),
            lambda: predict_clips(model.heads, _encode(fabric, data.val, val_sources, model.backbones)),
            steps_per_epoch=-(-len(data.train.trainable) // config.batch_size),
            checkpoint=session.folder.checkpoint_file,
            write=fabric.is_global_zero,
            on_epoch=on_epoch,
            excluded=session.unscored(data),
        )
    model.load_state_dict(dict(progress.best))
    return progress


def _encode(fabric: Any, windows: WindowSet, sources: Mapping[str, Source], backbones: Sequence[Backbone]) -> WindowSet:
    """Encode a split, with one share per process; return the whole split."""

    def combine(rows: Tensor) -> Tensor:
        if fabric.world_size == 1:
            return rows
        summed: Tensor = fabric.all_reduce(rows.to(fabric.device), reduce_op="sum")
        return summed.to(rows.device)

    return encode_split(windows, sources, backbones, rank=fabric.global_rank, ranks=fabric.world_size, combine=combine)


def tuned_windows(run: Path, record: RunRecord, cache: Cache, windows: WindowSet) -> WindowSet:
    """Encode the pixels and log-Mel of some clips with the encoders of a fine-tuned run.

    Args:
        windows: the clips with the features of the original encoders.

    Raises:
        UsageError: the cache lacks the inputs of the encoders.
        WeightsError: the run's encoders are missing or damaged.
        DataError: a clip lacks its pixels or log-Mel.
    """
    check_sources(cache, record.tuned)
    weights = saved_weights(RunFolder(Path(run)).encoders, record.tuned)
    backbones = build_backbones(record.tuned, weights, windows.device)
    return encode_split(windows, load_sources(cache, windows, backbones), backbones)


def made_by_run(record: RunRecord, cache: Cache) -> bool:
    """Whether a cache was extracted with the encoders of a fine-tuned run."""
    try:
        check_same(record.head_streams, cache)
    except FingerprintError:
        return False
    return True
