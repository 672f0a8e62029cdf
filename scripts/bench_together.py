"""Time a step of several runs: together, one after the other, and in a process each.

    python scripts/bench_together.py
    python scripts/bench_together.py --runs 8 --hidden 256 --device cuda

Builds the synthetic cache of `bench_train.py`. Prints CPU and wall-clock seconds per step of all runs and their ratio
to the step of one run: 8 runs that cost as much as one would be 1.0, 8 runs one after the other are 8.0. CPU seconds
depend little on other work on the machine. Torch uses one thread per process, as `vaflow ablate` does.

For two cores it prints the CPU seconds of a batch of half the runs, which `--jobs 2` trains on each core, and the bound
of the matrix products; `together_roofline` is the floor of a step of all runs, by its operations and bytes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import torch
from bench_train import GRID, OperationCosts, build_cache, step_and_bound

from vaflow.cache import open_cache
from vaflow.device import choose_device, keep_memory
from vaflow.train.config import TrainConfig
from vaflow.train.data import Data, load_split
from vaflow.train.heads import VAModel
from vaflow.train.inputs import Inputs, resolve
from vaflow.train.run_folder import build_model
from vaflow.train.stacked_loop import Member, take_step
from vaflow.train.stacked_models import StackedModels
from vaflow.train.training_loop import make_optimizer, seeded, train_step
from vaflow.train.windows import WindowSet, gather_each


def load(cache: Path, settings: TrainConfig) -> tuple[TrainConfig, Inputs, WindowSet]:
    """Resolved settings, inputs and the training split."""
    opened = open_cache(cache)
    config, inputs = resolve(opened, settings)
    return config, inputs, load_split(opened, "train", inputs.streams, config, device=choose_device(config.device))


def fresh(config: TrainConfig, inputs: Inputs, seed: int) -> VAModel:
    """A model in training mode."""
    with seeded(seed):
        return build_model(config, inputs.specs, inputs.prototypes).to(choose_device(config.device)).train()


def step_alone(config: TrainConfig, inputs: Inputs, windows: WindowSet, seed: int = 0) -> Callable[[int], object]:
    """A function that takes step k of one run."""
    model = fresh(config, inputs, seed)
    optimizer = make_optimizer(model, config)
    ids = list(windows.shuffled(config.batch_size, torch.Generator().manual_seed(seed)))
    return lambda k: train_step(model, optimizer, windows.gather(ids[k % (len(ids) - 1)]), config)


def step_together(config: TrainConfig, inputs: Inputs, windows: WindowSet, runs: int) -> Callable[[int], object]:
    """A function that takes step k of several runs."""
    data = Data(windows, windows)
    members = [Member(fresh(config, inputs, seed), replace(config, seed=seed), data) for seed in range(runs)]
    stack = StackedModels([member.model for member in members], [member.config for member in members], capture_after=1)
    ids = list(windows.shuffled(config.batch_size, torch.Generator().manual_seed(0)))[:-1]  # whole batches

    def step(k: int) -> object:
        batch = gather_each([windows] * runs, [ids[(k + run) % len(ids)] for run in range(runs)])
        return take_step(stack, members, range(runs), batch, k)

    return step


def seconds(step: Callable[[int], object], device: torch.device, steps: int) -> tuple[float, float]:
    """Medians of the CPU and the wall-clock seconds of a step."""
    cpu, wall = [], []
    for k in range(steps + 2):
        before = time.process_time(), time.perf_counter()
        step(k)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    return statistics.median(cpu[2:]), statistics.median(wall[2:])


def in_process(cache: Path, settings: TrainConfig, seed: int, steps: int) -> tuple[float, float]:
    """CPU and wall-clock seconds of a step of one run, in a process beside others."""
    torch.set_num_threads(1)
    keep_memory()
    config, inputs, windows = load(cache, settings)
    return seconds(step_alone(config, inputs, windows, seed), windows.device, steps)


def bench(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Time all three ways."""
    torch.set_num_threads(1)
    keep_memory()  # as training does
    settings = TrainConfig(hidden=args.hidden, temporal=args.temporal, device=args.device)
    build_cache(folder / "cache", -(-args.windows // len(GRID.starts(130.0))), 130.0)
    config, inputs, windows = load(folder / "cache", settings)
    load_before = os.getloadavg()[0]
    alone, together = [], []
    for _ in range(args.repeats):  # in turns: a busy machine then slows both alike
        alone.append(seconds(step_alone(config, inputs, windows), windows.device, args.steps))
        together.append(seconds(step_together(config, inputs, windows, args.runs), windows.device, args.steps))
    one, all_of_them = (tuple(statistics.median(x) for x in zip(*times, strict=True)) for times in (alone, together))
    result: dict[str, object] = {
        "device": str(windows.device),
        "load_average": round(load_before, 1),
        "runs": args.runs,
        "one_run_ms": {"cpu": round(1000 * one[0], 1), "wall": round(1000 * one[1], 1)},
        "together_ms": {"cpu": round(1000 * all_of_them[0], 1), "wall": round(1000 * all_of_them[1], 1)},
        "together_over_one_run": {
            "cpu": round(all_of_them[0] / one[0], 2),
            "wall": round(all_of_them[1] / one[1], 2),
        },
    }
    if windows.device.type == "cpu":  # a batch of half the runs on each of two cores, and what arithmetic allows
        half = seconds(step_together(config, inputs, windows, args.runs // 2), windows.device, args.steps)[0]
        bound = step_and_bound(windows, config, fresh(config, inputs, 0), 1)
        least = args.runs * float(str(bound["bound_ms"])) / 2000
        step, costs, steps = step_together(config, inputs, windows, args.runs), OperationCosts(), count(1)
        step(0)  # the next step is captured, and not measured either
        costs.measure(lambda: step(next(steps)), args.steps)
        flops = args.runs * float(str(bound["step_gflop"])) * 1e9
        rate = float(str(bound["matrix_gflop_per_second"])) * 1e9
        result["together_roofline"] = costs.roofline(flops, rate, all_of_them[0], 2**27)  # more than the cache
        result |= bound | {
            "two_cores_over_one_run": round(half / one[0], 2),
            "two_cores_one_by_one": round(args.runs / 2, 2),
            "two_cores_bound_over_one_run": round(least / one[0], 2),
        }
    if args.processes:
        with ProcessPoolExecutor(args.runs, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(in_process, folder / "cache", settings, k, args.steps) for k in range(args.runs)]
            beside = [job.result() for job in jobs]
        wall = statistics.median(times[1] for times in beside)
        result |= {"processes_ms": round(1000 * wall, 1), "processes_over_one_run": round(wall / one[1], 2)}
    return result


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--temporal", default="gru")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", action="store_true", help="also time a process per run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaflow-bench-") as folder:
        print(json.dumps(bench(args, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
