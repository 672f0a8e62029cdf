"""Compute gradients of one step, or train a run, in one or more processes.

Usage: finetune_process.py CACHE OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from finetune_ready import SETTINGS, Loaded, tuning
from torch import Tensor

from vaflow.cache import open_cache
from vaflow.files import write_tensors
from vaflow.train.finetune import processes
from vaflow.train.finetune.step import read_share, train_step
from vaflow.train.train_run import train_run

CONFIG = replace(SETTINGS, dropout=0.0, augment=True, accumulate=2)
WINDOWS = 5  # of the batch: not a multiple of the divisor


def gradients(cache: Path) -> dict[str, Tensor]:
    """Gradients of the whole batch by parameter, with the losses under "losses"."""
    with processes(CONFIG) as fabric:
        ready = Loaded(open_cache(cache), CONFIG)
        work = tuning(ready, fabric)
        numbers = (0, 0, 0)
        losses = train_step(work, read_share(work, torch.arange(WINDOWS), numbers), numbers)
        by_name = {name: p.grad.clone() for name, p in work.model.named_parameters() if p.grad is not None}
        return by_name | {"losses": losses}


def main(cache: Path, out: Path) -> None:
    torch.set_num_threads(1)
    computed = gradients(cache)
    train_run(open_cache(cache), replace(CONFIG, epochs=1), out / "run", tensorboard=False, figures=False)
    write_tensors(out / "gradients.safetensors", computed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
