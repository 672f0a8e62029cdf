"""Cost of training on a generated cache: steps, loading, memory, and the usual way beside them.

    python scripts/bench_train.py
    python scripts/bench_train.py --clips 594
    python scripts/bench_train.py --device cuda

Builds a synthetic cache of realistic widths in a temporary folder (TMPDIR; 2 MB per clip), and prints ratios of one run
as JSON. The default is a tenth of Aff-Wild2 (59 clips of 170 s); `--clips 594` has its size (28 hours).

- step_over_bound: CPU time of a step over its matrix products at the rate of this machine, measured beside it;
- roofline: floating-point operations and bytes of a step, their floor on this machine, and the time they take;
- epoch_over_fixed_batch: steps of an epoch over the same steps on one batch in memory (1.0: data cost nothing);
- load_over_plain_read: loading the split over reading the bytes of the same files;
- memory_over_features: growth of the process while loading, over the bytes of the features;
- samples_over_dataloader: windows per second over a `DataLoader` of a file per window with `nn.GRU` and plain AdamW;
- inputs_over_dataloader: the same without the model, which leaves reading and collating.

Torch uses one thread. CPU seconds are measured where possible: other work on the machine affects them less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import LABELS, Array, StreamInfo
from vaflow.device import choose_device, keep_memory
from vaflow.timeline import Grid
from vaflow.train.batch import Batch
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.heads import temporal
from vaflow.train.inputs import Inputs, resolve
from vaflow.train.run_folder import build_model
from vaflow.train.training_loop import make_optimizer, seeded, train_step
from vaflow.train.windows import WindowSet

GRID, STEPS, FPS = Grid(), 20, 30
VISUAL_DIM, AUDIO_DIM = 512, 768
TURN = 8  # steps
WAYS = (True, False)  # by vaflow; by a `DataLoader` and `nn.GRU`


def build_cache(path: Path, clips: int, seconds: float) -> Cache:
    """A cache of training clips with random features and labels everywhere."""
    cache = create_cache(path)
    identity = {"sampling": {"window": GRID.window, "stride": GRID.stride, "frames": GRID.frames, "audio_steps": STEPS}}
    cache.declare(StreamInfo("clip-vit-b16", "visual", VISUAL_DIM, "float16", {"encoder": "random", **identity}))
    cache.declare(StreamInfo("ast", "audio", AUDIO_DIM, "float16", {"encoder": "random", **identity}))
    cache.declare(StreamInfo("clip-vit-b16.text", "text", VISUAL_DIM, "float32", {"encoder": "random"}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    rng = np.random.default_rng(0)
    template = rng.normal(size=(3, 9, VISUAL_DIM)).astype(np.float32)
    cache.write("clip-vit-b16.text", "default", {"embedding": template.mean(axis=0), "template": template})
    start = GRID.seconds(GRID.starts(seconds))
    times = {"clip-vit-b16": GRID.sample_times(seconds)}
    times["ast"] = start[:, None] + (np.arange(STEPS) + 0.58) * GRID.window / STEPS
    size = max(times["ast"].size * AUDIO_DIM, times["clip-vit-b16"].size * VISUAL_DIM)
    noise = rng.standard_normal(size + clips, dtype=np.float32).astype(np.float16)
    clock = np.arange(int(seconds * FPS)) / FPS
    for number in range(clips):
        item = f"clip{number:04d}"
        for name, time_, dim in (("clip-vit-b16", times["clip-vit-b16"], VISUAL_DIM), ("ast", times["ast"], AUDIO_DIM)):
            embedding = noise[number : number + time_.size * dim].reshape(*time_.shape, dim)
            arrays: dict[str, Array] = {"embedding": embedding, "time": time_, "valid": np.ones(time_.shape, bool)}
            cache.write(name, item, arrays | ({"start": start} if name == "ast" else {}))
        value = np.sin(clock[:, None] * rng.uniform(0.1, 1, size=2)).astype(np.float32)
        labels: dict[str, Array] = {"time": clock, "value": value, "valid": np.ones(value.shape, bool)}
        cache.write(LABELS, item, labels, meta={"split": "train", "group": item, "duration": seconds})
    return cache


def two_epochs(windows: WindowSet, config: TrainConfig, model: torch.nn.Module, steps: int) -> tuple[float, float]:
    """Seconds of the first steps of an epoch, and of as many on one batch in memory; on a CPU, CPU seconds.

    The two take turns every few steps, each first in every other turn: a busy machine then slows both alike.
    """
    model.train()
    optimizer = make_optimizer(model, config)
    batches = list(windows.shuffled(config.batch_size, torch.Generator().manual_seed(0)))[:steps]
    held = windows.gather(batches[0])
    seconds = {"epoch": 0.0, "fixed": 0.0}
    for first in range(0, len(batches), TURN):
        turn = batches[first : first + TURN]
        for kind in ("epoch", "fixed") if first // TURN % 2 else ("fixed", "epoch"):
            _wait(windows.device)
            clock = time.process_time if windows.device.type == "cpu" else time.perf_counter
            begun = clock()
            for ids in turn:
                train_step(model, optimizer, held if kind == "fixed" else windows.gather(ids), config)
            _wait(windows.device)
            seconds[kind] += clock() - begun
    return seconds["epoch"], seconds["fixed"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Build, load, and measure."""
    torch.set_num_threads(1)
    keep_memory()  # as training does
    cache = build_cache(folder / "cache", args.clips, args.clip_seconds)
    device = choose_device(args.device)
    settings = TrainConfig(batch_size=args.batch_size, hidden=args.hidden, device=args.device)
    config, inputs = resolve(cache, settings)
    loading = load_costs(cache, config, inputs, device, 0 if args.mapped else None)
    windows = load_split(cache, "train", inputs.streams, config, device=device, budget=0 if args.mapped else None)
    model = fresh(config, inputs, device)
    two_epochs(windows, config, model, 2 * TURN)  # warm up
    pairs = [two_epochs(windows, config, model, args.steps) for _ in range(args.repeats)]
    epoch, fixed = (statistics.median(times) for times in zip(*pairs, strict=True))
    result: dict[str, object] = {
        "device": str(device),
        "load_average": round(os.getloadavg()[0], 1),
        "windows": len(windows),
        **loading,
        "epoch_seconds": round(epoch, 3),
        "fixed_batch_seconds": round(fixed, 3),
        "epoch_over_fixed_batch": round(statistics.median(one / other for one, other in pairs), 4),
    }
    if device.type == "cpu":
        result |= step_and_bound(windows, config, model, args.repeats)
        result |= reference(windows, config, inputs, folder / "windows", args.repeats)
    return result


def fresh(config: TrainConfig, inputs: Inputs, device: torch.device) -> nn.Module:
    """A model in training mode."""
    with seeded(0):
        return build_model(config, inputs.specs, inputs.prototypes).to(device).train()


def load_costs(
    cache: Cache, config: TrainConfig, inputs: Inputs, device: torch.device, budget: int | None
) -> dict[str, object]:
    """Loading against a plain read of the same files, and the growth of the process against the bytes of features."""
    files = [path for path in Path(cache.place).rglob("*") if path.is_file()]

    def read_all() -> None:
        for path in files:
            path.read_bytes()

    plain, plain_wall = min(cpu_and_wall(read_all) for _ in range(2))
    stored = sum(path.stat().st_size for path in files)
    before = resident_bytes()
    held: list[WindowSet] = []
    seconds, wall = cpu_and_wall(
        lambda: held.append(load_split(cache, "train", inputs.streams, config, device=device, budget=budget))
    )
    tables = held[0].tables.values()
    features = sum(table.rows.numel() * table.rows.element_size() for table in tables)
    return {
        "load_cpu_seconds": round(seconds, 2),
        "load_wall_seconds": round(wall, 2),
        "plain_read_cpu_seconds": round(plain, 2),
        "plain_read_wall_seconds": round(plain_wall, 2),
        "cache_megabytes": round(stored / 1e6),
        "feature_megabytes": round(features / 1e6),
        "load_megabytes_per_cpu_second": round(stored / seconds / 1e6),
        "load_over_plain_read": round(seconds / plain, 1),
        "memory_over_features": round((resident_bytes() - before) / features, 2),
    }


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_and_wall(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def step_and_bound(windows: WindowSet, config: TrainConfig, model: nn.Module, repeats: int) -> dict[str, object]:
    """CPU milliseconds of a step and of its floating-point operations at the machine's matrix rate.

    Both are the fastest of several, taken in turns.
    """
    optimizer = make_optimizer(model, config)
    batch = windows.gather(windows.trainable[: config.batch_size])
    in_place = {
        torch.ops.aten.baddbmm_: lambda _, one, other, **options: 2 * prod(one) * other[-1]
    }  # not known to torch
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        train_step(model, optimizer, batch, config)
    factor = torch.randn(512, 512)
    steps, products = [], []
    for _ in range(10 * repeats):
        steps.append(cpu_and_wall(lambda: train_step(model, optimizer, batch, config))[0])
        products.append(cpu_and_wall(lambda: [factor @ factor for _ in range(10)])[0] / 10)
    rate = 2 * 512**3 / min(products)
    bound = counter.get_total_flops() / rate
    costs = OperationCosts()
    costs.measure(lambda: train_step(model, optimizer, batch, config), 10 * repeats)
    return {
        "roofline": costs.roofline(counter.get_total_flops(), rate, min(steps)),
        "step_gflop": round(counter.get_total_flops() / 1e9, 2),
        "matrix_gflop_per_second": round(rate / 1e9, 1),
        "step_cpu_ms": round(1000 * min(steps), 1),
        "bound_ms": round(1000 * bound, 1),
        "step_over_bound": round(min(steps) / bound, 2),
    }


PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product")  # prefixes of operators with matrix products


class OperationCosts(TorchDispatchMode):
    """The fastest CPU time of each operator call of a step, and the bytes that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.seconds: dict[int, float] = {}
        self.bytes: dict[int, int] = {}
        self.products: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator."""
        begun = time.process_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.process_time() - begun
        number, self.number = self.number, self.number + 1
        self.seconds[number] = min(seconds, self.seconds.get(number, seconds))
        if func._schema.name.removeprefix("aten::").startswith(PRODUCTS):
            self.products.add(number)
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        tensors = [] if view else [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.bytes[number] = sum(x.numel() * x.element_size() for x in tensors)
        return result

    def measure(self, take_step: Callable[[], object], times: int) -> None:
        """Take some steps; the first one, which may allocate the optimizer's state, is not measured."""
        take_step()
        for _ in range(times):
            self.number = 0
            with self:
                take_step()

    def roofline(self, flops: float, rate: float, step: float, operand: int = 2**20) -> dict[str, object]:
        """Floors and CPU milliseconds of products and of all other operators.

        Args:
            flops: of a step.
            rate: of matrix products, per second.
            step: CPU seconds.
            operand: bytes of the tensors with which the memory is measured; 1 MB fits in the cache of a core.
        """
        one, other, out = (torch.randn(operand // 4) for _ in range(3))
        speed = 3 * operand / min(cpu_and_wall(lambda: torch.add(one, other, out=out))[0] for _ in range(50))
        others = self.seconds.keys() - self.products
        products, rest = (sum(self.seconds[k] for k in numbers) for numbers in (self.products, others))
        size = sum(self.bytes[k] for k in others)
        return {
            "operators": len(self.seconds),
            "product_floor_ms": round(1000 * flops / rate, 1),
            "product_ms": round(1000 * products, 1),
            "other_megabytes": round(size / 1e6),
            "memory_gigabytes_per_second": round(speed / 1e9, 1),
            "other_floor_ms": round(1000 * size / speed, 1),
            "other_ms": round(1000 * rest, 1),
            "between_operators_ms": round(1000 * (step - products - rest), 1),
            "step_over_floor": round(step / (flops / rate + size / speed), 2),
        }


class WindowFiles(Dataset[dict[str, Tensor]]):
    """One NumPy file per window, as many public implementations store their features."""

    def __init__(self, folder: Path, windows: WindowSet, ids: Tensor) -> None:
        folder.mkdir()
        self.files = []
        for k in ids.tolist():
            batch = windows.gather(torch.tensor([k]))
            arrays = {f"features {name}": x[0].half().numpy() for name, x in batch.features.items()}
            self.files.append(folder / f"{k}.npz")
            np.savez(self.files[-1], target=batch.target[0].numpy(), **arrays)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        with np.load(self.files[number]) as file:
            return {name: torch.as_tensor(file[name]) for name in file.files}


def reference(windows: WindowSet, config: TrainConfig, inputs: Inputs, folder: Path, repeats: int) -> dict[str, object]:
    """Windows per second against a `DataLoader` over files, the same heads with `nn.GRU`, and plain AdamW."""
    ids = windows.trainable[: 10 * config.batch_size]
    loader = DataLoader(WindowFiles(folder, windows, ids), batch_size=config.batch_size, shuffle=True)
    masks = windows.gather(ids[: config.batch_size])

    def batches() -> Iterator[Batch]:
        for loaded in loader:
            features = {name: loaded[f"features {name}"].float() for name in masks.features}
            yield replace(masks, features=features, target=loaded["target"])

    def epoch(use_vaflow: bool) -> None:
        for batch in map(windows.gather, ids.split(config.batch_size)) if use_vaflow else batches():
            train_step(model, optimizer, batch, config)

    def inputs_only(use_vaflow: bool) -> None:
        for _ in map(windows.gather, ids.split(config.batch_size)) if use_vaflow else batches():
            pass

    loading = {way: min(cpu_and_wall(lambda way=way: inputs_only(way))[0] for _ in range(repeats + 1)) for way in WAYS}  # type: ignore[misc]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    fast = temporal.run_recurrent
    for _ in range(repeats):
        for use_vaflow in WAYS:
            model = fresh(config, inputs, windows.device)
            plain = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
            optimizer = make_optimizer(model, config) if use_vaflow else plain
            temporal.run_recurrent = fast if use_vaflow else packed_recurrent  # type: ignore[assignment]
            epoch(use_vaflow)
            seconds[use_vaflow].append(cpu_and_wall(lambda use_vaflow=use_vaflow: epoch(use_vaflow))[0])  # type: ignore[misc]
    temporal.run_recurrent = fast
    one, other = (len(ids) / min(seconds[use_vaflow]) for use_vaflow in (True, False))
    return {
        "windows_per_cpu_second": round(one, 1),
        "dataloader_windows_per_cpu_second": round(other, 1),
        "samples_over_dataloader": round(one / other, 2),
        "input_windows_per_cpu_second": round(len(ids) / loading[True]),
        "dataloader_input_windows_per_cpu_second": round(len(ids) / loading[False]),
        "inputs_over_dataloader": round(loading[False] / loading[True], 1),
    }


def packed_recurrent(
    cells: Sequence[nn.GRU], sequences: Sequence[Tensor], insides: Sequence[Tensor], dropout: object = None
) -> list[Tensor]:
    """Each branch by `nn.GRU` over packed sequences."""
    outputs = []
    for cell, x, inside in zip(cells, sequences, insides, strict=True):
        packed = pack_padded_sequence(x, inside.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
        outputs.append(pad_packed_sequence(cell(packed)[0], batch_first=True, total_length=x.shape[1])[0])
    return outputs


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=59, help="number of clips (Aff-Wild2: 594)")
    parser.add_argument("--clip-seconds", type=float, default=170.0, help="length of every clip (Aff-Wild2's mean)")
    parser.add_argument("--steps", type=int, default=64, help="most steps of an epoch that are timed")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mapped", action="store_true", help="read features from a memory-mapped scratch file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaflow-bench-") as folder:
        print(json.dumps(bench(args, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
