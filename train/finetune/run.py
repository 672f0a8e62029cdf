"""A fine-tuning run: as `vaflow.train.training` does for heads, with the backbones in the loop.

Validation encodes the split anew after every epoch, without augmentation, in float32, stored as the cache stores
features. So its scores are those that heads would get on a cache extracted with the tuned encoders.

Devices, precision and processes, by Lightning Fabric. `torchrun` starts the processes; alone, there is one.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import FingerprintError, UsageError, explain
from vaflow.train import training
from vaflow.train.config import TrainConfig
from vaflow.train.evaluate import check_complete, failed_items, predict_clips
from vaflow.train.finetune.backbones import (
    Backbone,
    build_backbones,
    choose_trained,
    load_tuned,
    recompute,
    save_backbones,
    tunable,
)
from vaflow.train.finetune.data import Source, check_sources, load_sources
from vaflow.train.finetune.model import TunedModel, encode_split
from vaflow.train.finetune.step import Tuning, make_optimizer, train_epoch
from vaflow.train.heads.model import VAModel, count_parameters
from vaflow.train.inputs import Inputs, check_same
from vaflow.train.loop import Progress, run_epochs
from vaflow.train.reporting import describe
from vaflow.train.runs import RunFolder, RunRecord, load_run
from vaflow.train.windows import WindowSet

PRECISION: Mapping[str, Literal["32-true", "bf16-mixed"]] = {"float32": "32-true", "bfloat16": "bf16-mixed"}


@contextmanager
def processes(config: TrainConfig) -> Iterator[Any]:
    """A launched Fabric; meanwhile the log of all processes but the first says warnings only.

    Processes stay connected until they end: a second connection would meet what the first one left.

    Raises:
        UsageError: the device is not there.
    """
    from lightning_fabric import Fabric

    device = choose_device(config.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    alone = [device.index or 0] if device.type == "cuda" else 1
    fabric = Fabric(
        accelerator=device.type,
        devices=alone if world == 1 else local,
        num_nodes=1 if world == 1 else world // local,
        # A batch may have no picture or no sound at all on one process: then that backbone is not used there.
        strategy="auto" if world == 1 else "ddp_find_unused_parameters_true",
        precision=PRECISION[_precision(config, device)],
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


def _precision(config: TrainConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


log = logging.getLogger(__name__)

HEADS = "heads."  # what the names of their tensors in a `TunedModel` begin with


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Attributes:
        cache, config, inputs: resolved.
        folder: of the run; record: what it says so far.
        allow_missing, tensorboard, pictures, show: as of `vaflow.train.training.train_run`.
    """

    cache: Cache
    config: TrainConfig
    inputs: Inputs
    folder: RunFolder
    record: RunRecord
    allow_missing: bool = False
    tensorboard: bool = True
    pictures: bool = True
    show: bool = False


def finetune(job: Job, weights: Mapping[str, Path]) -> dict[str, Any]:
    """Train, or go on with, the run; returns its metrics.

    Args:
        job: what is trained.
        weights: stream -> local weights of its encoder, instead of the hub's.

    Raises:
        UsageError: the cache does not hold what the backbones read, or settings do not go together.
        FingerprintError: the encoders, or the run to begin with, are not those of the cache.
        WeightsError: an encoder's weights cannot be had.
        DataError: clips, labels or losses are unusable; the clips are named.
    """
    chosen = tunable(job.inputs.streams)
    check_sources(job.cache, chosen)
    with processes(job.config) as fabric:
        main = fabric.is_global_zero
        job = replace(job, show=job.show and main, tensorboard=job.tensorboard and main)
        backbones = build_backbones(chosen, weights, fabric.device)
        data = training.load_data(
            job.cache, job.config, job.inputs, device=fabric.device, scratch=job.folder.path, show=job.show
        )
        job = _begin(job, data, write=main)
        sources = [load_sources(job.cache, part, backbones, job.folder.path) for part in (data.train, data.val)]
        heads = _first_heads(job, data, fabric.device)
        model = TunedModel(heads, backbones)
        progress = _fit(job, fabric, model, data, sources[0], sources[1])
        val = _encode(fabric, data.val, sources[1], backbones)
        if main:
            _finish(job, heads, backbones, progress, replace(data, val=val))
        fabric.barrier()
        return job.folder.read_metrics()


def _begin(job: Job, data: training.Data, *, write: bool) -> Job:
    """Check what is loaded against the folder, and say in it what is done."""
    check_complete(data.val, failed_items(job.cache, job.config.val_split, job.config.fold_splits), job.allow_missing)
    record = replace(job.record, data=training.counts(job.config, data))
    training.check_data(job.folder, job.folder.record(), record)
    if write:
        job.folder.write_record(record)
    describe(job.config, data.train, data.val)
    return replace(job, record=record)


def _first_heads(job: Job, data: training.Data, device: Any) -> VAModel:
    """Fresh heads, or those of the run that `init` names."""
    heads = training.new_model(job.config, job.inputs, data, device)
    if not job.config.init:
        return heads
    other = load_run(Path(job.config.init), device)
    if other.record.tuned:
        raise UsageError(
            explain(
                f"{job.config.init} was fine-tuned: its heads belong to its own encoders",
                expected="a run of `vaflow train` without --finetune",
            )
        )
    check_same(other.record.streams, job.cache)
    try:
        heads.load_state_dict(other.model.state_dict())
    except RuntimeError as error:
        raise UsageError(
            explain(
                f"The heads of {job.config.init} have another form",
                expected="the same streams and model settings as this run's",
                got=str(error).splitlines()[-1].strip(),
                remedy=f"Take its settings: --config {Path(job.config.init) / 'config.toml'}",
            )
        ) from error
    return heads


def _fit(
    job: Job,
    fabric: Any,
    model: TunedModel,
    data: training.Data,
    train_sources: Mapping[str, Source],
    val_sources: Mapping[str, Source],
) -> Progress:
    trained: list[nn.Parameter] = []
    for backbone in model.backbones:
        trained += choose_trained(backbone, job.config.finetune_blocks)
        if job.config.checkpointing:
            recompute(backbone)
    heads = count_parameters(model.heads)
    log.info("%.1f million parameters learn, %.1f of them in backbones", *(_millions(heads, trained)))
    optimizer = make_optimizer(model, trained, job.config)
    wrapped, _ = fabric.setup(model, optimizer)
    tuning = Tuning(fabric, model, wrapped, optimizer, data.train, train_sources, job.config)
    with training.telling(job.folder, job.config, tensorboard=job.tensorboard, show=job.show) as on_epoch:
        progress = run_epochs(
            model,
            optimizer,
            job.config,
            lambda epoch: train_epoch(tuning, epoch),
            lambda: predict_clips(model.heads, _encode(fabric, data.val, val_sources, model.backbones)),
            checkpoint=job.folder.checkpoint_file,
            write=fabric.is_global_zero,
            on_epoch=on_epoch,
        )
    model.load_state_dict(dict(progress.best))
    return progress


def _millions(heads: int, trained: Sequence[nn.Parameter]) -> tuple[float, float]:
    backbones = sum(parameter.numel() for parameter in trained)
    return (heads + backbones) / 1e6, backbones / 1e6


def _encode(fabric: Any, windows: WindowSet, sources: Mapping[str, Source], backbones: Sequence[Backbone]) -> WindowSet:
    """Each process encodes its part of a split, and gets the whole."""

    def combine(rows: Tensor) -> Tensor:
        if fabric.world_size == 1:
            return rows
        summed: Tensor = fabric.all_reduce(rows.to(fabric.device), reduce_op="sum")
        return summed.to(rows.device)

    return encode_split(windows, sources, backbones, rank=fabric.global_rank, ranks=fabric.world_size, combine=combine)


def _finish(job: Job, heads: VAModel, backbones: Sequence[Backbone], progress: Progress, data: training.Data) -> None:
    """Write the encoders, what they make, and then what every run has."""
    tuned = save_backbones(backbones, job.folder.encoders, job.cache)
    job.folder.write_record(replace(job.record, tuned=tuned))
    own = {name.removeprefix(HEADS): tensor for name, tensor in progress.best.items() if name.startswith(HEADS)}
    training.finish(
        job.folder,
        job.cache,
        job.config,
        heads,
        replace(progress, best=own),
        data,
        job.allow_missing,
        job.pictures,
    )


def tuned_windows(run: Path, record: RunRecord, cache: Cache, windows: WindowSet) -> WindowSet:
    """The clips of a cache with features that a fine-tuned run's own encoders make of its pixels and log-Mel.

    Args:
        run: the run's folder.
        record: what it says.
        cache: where the clips are.
        windows: the clips with the features of the encoders that the run began with.

    Raises:
        UsageError: the cache does not hold what the encoders read.
        WeightsError: the run's encoders are missing or damaged.
        DataError: a clip lacks its pixels or log-Mel.
    """
    check_sources(cache, record.tuned)
    backbones = load_tuned(RunFolder(Path(run)).encoders, record.tuned, windows.device)
    return encode_split(windows, load_sources(cache, windows, backbones), backbones)


def made_by_run(record: RunRecord, cache: Cache) -> bool:
    """Whether a cache's streams are those that a fine-tuned run's own encoders make."""
    try:
        check_same(record.wanted, cache)
    except FingerprintError:
        return False
    return True
