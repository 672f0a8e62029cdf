"""Prepare a cache for fine-tuning as a run does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import Json
from vaflow.train.config import TrainConfig
from vaflow.train.data import Data, load_data
from vaflow.train.finetune.backbones import Backbone, Source, build_backbones, choose_trained, load_sources, tunable
from vaflow.train.finetune.step import TunedModel, Tuning, make_optimizer
from vaflow.train.inputs import Inputs, resolve
from vaflow.train.run_folder import build_model
from vaflow.train.training_loop import seeded

SETTINGS = TrainConfig(
    finetune=True, hidden=16, epochs=2, batch_size=2, lr=1e-3, backbone_lr=1e-4, device="cpu", augment=False
)


class Loaded:
    """A cache prepared for fine-tuning with some settings, with new backbones."""

    def __init__(self, cache: Cache, config: TrainConfig) -> None:
        self.cache = cache
        self.config: TrainConfig
        self.inputs: Inputs
        self.config, self.inputs = resolve(cache, config)
        self.data: Data = load_data(cache, self.config, self.inputs)
        streams = tunable(self.inputs.streams)
        self.backbones: tuple[Backbone, ...] = build_backbones(streams, {}, torch.device("cpu"))
        self.sources: dict[str, Source] = load_sources(cache, self.data.train, self.backbones)


def copied(cache: Cache, path: Path, *, leave: tuple[str, str] = ("", ""), **identities: Json | None) -> Cache:
    """Copy the streams of the clips to another cache with changed identities; None drops a stream.

    Args:
        cache: what to copy.
        path: where to.
        leave: stream and item that stay out.
        identities: stream -> what its identity says instead.
    """
    other = create_cache(path)
    for name, info in cache.streams().items():
        changed = identities.get(name, {})
        if changed is None:
            continue
        other.declare(replace(info, identity=info.identity | changed))
        for item in cache.items() if info.kind != "text" else cache.items(stream=name):
            if (name, item) != leave and cache.has(name, item):
                record = cache.record(name, item)
                other.write(name, item, cache.read(name, item).arrays, source=record.source, meta=record.meta)
    return other


def tuning(ready: Loaded, fabric: Any, blocks: int | None = None) -> Tuning:
    """Everything for one step, with seeded heads."""
    with seeded(ready.config.seed):
        heads = build_model(ready.config, ready.inputs.specs, ready.inputs.prototypes)
    model = TunedModel(heads, ready.backbones).train()
    trained = [parameter for backbone in ready.backbones for parameter in choose_trained(backbone, blocks)]
    optimizer = make_optimizer(model, trained, ready.config)
    wrapped, _ = fabric.setup(model, optimizer)
    return Tuning(fabric, model, wrapped, optimizer, ready.data.train, ready.sources, ready.config)
