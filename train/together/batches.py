"""Which runs train in one batch, and whether they are faster that way: steps of both ways are timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TypeVar

import torch

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.loop import make_optimizer, train_step
from vaflow.train.session import Data, new_model
from vaflow.train.together.epochs import Member, take_step
from vaflow.train.together.stacked_models import StackedModels

LIMIT = 8  # runs in a batch
REPEATS = 4  # timed steps of each way, after one that is not timed
WORTH_MEASURING = 200  # a run with fewer steps is not timed: it takes little longer than the measurement
GAIN = 0.95  # a batch must take at most this share of the time of its runs one after the other
OPEN_EPOCHS = 15  # assumed number of epochs with epochs=auto

# Settings that may differ between runs of a batch.
VARYING = {
    *("seed", "lr", "weight_decay", "schedule", "warmup", "clip_norm", "epochs", "patience", "best", "prompts"),
    *(
        "kl_weight",
        "mse_weight",
        "ccc_weight",
        "extra_weight",
        "nll_weight",
        "centers",
        "sigma",
        "dropout",
        "modality_dropout",
    ),
}
FOLD = {"fold", "train_split", "val_split"}  # likewise, in a cross-validation: folds share the loaded clips
T = TypeVar("T")


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
    inputs = resolve(cache, config)[1]
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        model = new_model(config, inputs, data[0], device).train()
        optimizer = make_optimizer(model, config)
        pairs = zip(configs, data, strict=True)
        members = [Member(new_model(c, inputs, splits, device), c, splits) for c, splits in pairs]
        stack = StackedModels([member.model for member in members], configs)
        orders = [splits.train.shuffled(config.batch_size, torch.Generator().manual_seed(0)) for splits in data]
        ids = list(islice(zip(*map(cycle, orders), strict=False), REPEATS + 1))
        size = min(len(chosen) for step in ids for chosen in step)  # equal, also where an epoch is a step
        alone = _seconds(lambda k: train_step(model, optimizer, windows.gather(ids[k][0][:size]), config), device)
        runs = range(len(members))
        together = _seconds(lambda k: take_step(stack, members, runs, [chosen[:size] for chosen in ids[k]], k), device)
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
