"""Measure whether runs train faster together or one after the other."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.train.config import AUTO, TrainConfig
from vaflow.train.inputs import resolve
from vaflow.train.loop import make_optimizer, train_step
from vaflow.train.session import Data, new_model
from vaflow.train.together.epochs import Member, gathered, take_step
from vaflow.train.together.stacked_models import StackedModels

REPEATS = 4  # steps of each kind that are timed, after one that is not
WORTH_MEASURING = 100  # steps of a run below which nothing is measured: they take less time than the measurement
GAIN = 0.95  # at most this share of the time alone


@dataclass(frozen=True)
class Choice:
    """How a batch of runs is trained.

    Attributes:
        runs: how many.
        alone, together: seconds per step of all of them, one after the other and together; 0: not measured.
        steps: of the longest run; an estimate where the number of epochs is open.
    """

    runs: int
    alone: float
    together: float
    steps: int

    @property
    def faster(self) -> bool:
        """Whether they train together."""
        return 0 < self.together < GAIN * self.alone

    def __str__(self) -> str:
        seconds_by_mode = {"together": self.together, "one after the other": self.alone}
        mode = "together" if self.faster else "one after the other"
        times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in seconds_by_mode.items())
        minutes = self.steps * seconds_by_mode[mode] / 60
        return f"{self.runs} runs train {mode}: about {minutes:.1f} min (a step of all: {times})"


def choose(cache: Cache, configs: Sequence[TrainConfig], data: Data) -> Choice:
    """Time some steps of runs that can train together, in both ways. No generator and no file is changed."""
    config = configs[0]
    per_epoch = -(-len(data.train.trainable) // config.batch_size)
    steps = per_epoch * max(c.epochs if c.epochs != AUTO else 15 for c in configs)
    if steps < WORTH_MEASURING:
        return Choice(len(configs), 0.0, 0.0, steps)
    device = choose_device(config.device)
    inputs = resolve(cache, config)[1]
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        models = [new_model(c, inputs, data, device) for c in (config, *configs)]
        single, optimizer = models[0].train(), make_optimizer(models[0], config)
        ids = list(islice(cycle(data.train.shuffled(config.batch_size, torch.Generator().manual_seed(0))), REPEATS + 1))
        members = [Member(model, c) for model, c in zip(models[1:], configs, strict=True)]
        stack = StackedModels(models[1:], configs)
        alone = _seconds(lambda k: train_step(single, optimizer, data.train.gather(ids[k]), config), device)
        together = _seconds(
            lambda k: take_step(
                stack, members, gathered(stack, members, data.train, [ids[k]] * len(members)), k, per_epoch
            ),
            device,
        )
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
