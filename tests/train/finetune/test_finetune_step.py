"""Gradients of one step equal the plain composition for any split of the batch and any number of processes."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_process import CONFIG, gradients
from finetune_ready import SETTINGS, Loaded, tuning
from lab import Lab, assert_printed

from vaflow.cache import Cache, open_cache
from vaflow.files import read_tensors
from vaflow.train.config import TrainConfig
from vaflow.train.finetune import processes
from vaflow.train.finetune.backbones import Backbone
from vaflow.train.finetune.step import Tuning, divide, read_share, train_epoch, train_step
from vaflow.train.losses import total_loss
from vaflow.train.train_run import train_run
from vaflow.train.windows import ahead

NUMBERS = (0, 0, 0)
PLAIN = replace(SETTINGS, dropout=0.0)


@pytest.fixture(scope="module")
def fabric() -> Iterator[Any]:
    with processes(SETTINGS) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_step(pixels_cache: Cache, fabric: Any) -> tuple[Tuning, torch.Tensor]:
    """A step without augmentation, and its losses; read-only for tests."""
    torch.set_num_threads(1)
    return step(pixels_cache, fabric, PLAIN)


def step(cache: Cache, fabric: Any, config: TrainConfig, windows: int = 3) -> tuple[Tuning, torch.Tensor]:
    """A step on the first windows; the gradients stay in the model."""
    work = tuning(Loaded(cache, config), fabric, config.finetune_blocks)
    return work, train_step(work, read_share(work, torch.arange(windows), NUMBERS), NUMBERS)


def assert_same_update(one: Tuning, other: Tuning) -> None:
    theirs = dict(other.model.named_parameters())
    compared = 0
    for name, parameter in one.model.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-5 + 1e-4 * scale)
            compared += 1
    assert compared > 40


def row_of(rows: dict[int, torch.Tensor], row: int, backbone: Backbone) -> torch.Tensor:
    if row == 0:
        return torch.zeros(backbone.stream.dim)
    return rows[(row - 1) // backbone.per_unit][(row - 1) % backbone.per_unit]


def test_gradients_equal_the_plain_composition(
    pixels_cache: Cache, fabric: Any, plain_step: tuple[Tuning, torch.Tensor]
) -> None:
    """Reference: encode every input, look up rows, run heads and loss, and backpropagate without sharing."""
    work, losses = plain_step
    plain = tuning(Loaded(pixels_cache, PLAIN), fabric)
    windows = plain.windows
    batch = windows.gather(torch.arange(3))
    features = {}
    for backbone in plain.model.backbones:
        name = backbone.stream.name
        index = windows.tables[name].index[:3].long()
        units = (torch.unique(index[index > 0]) - 1) // backbone.per_unit
        encoded = {unit: plain.sources[name].read(torch.tensor([unit])) for unit in set(units.tolist())}
        rows = {unit: backbone.features(image) for unit, image in encoded.items()}
        features[name] = torch.stack([torch.stack([row_of(rows, r, backbone) for r in w]) for w in index.tolist()])
    loss, parts = total_loss(plain.model.heads(replace(batch, features=features)), batch, kl_weight=0.2)
    loss.backward()
    assert_same_update(plain, work)
    torch.testing.assert_close(losses[:3], torch.stack([parts[name] for name in ("total", "ccc", "kl")]))


CHANGES = [
    {"accumulate": 3},
    pytest.param({"checkpointing": True}, marks=pytest.mark.slow),  # test_finetune_features does it, too
    pytest.param({"accumulate": 9, "augment": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("change", CHANGES)
def test_memory_saving_changes_no_gradient(
    pixels_cache: Cache, fabric: Any, plain_step: tuple[Tuning, torch.Tensor], change: dict
) -> None:
    augmented = change.get("augment", False)
    whole, losses = step(pixels_cache, fabric, replace(PLAIN, augment=True)) if augmented else plain_step
    parts, theirs = step(pixels_cache, fabric, replace(PLAIN, **change))
    assert_same_update(whole, parts)
    torch.testing.assert_close(theirs, losses, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_same_in_both_passes(pixels_cache: Cache, fabric: Any) -> None:
    """If the first part contains the whole batch, splitting must not matter even with dropout."""
    config = replace(SETTINGS, dropout=0.5, modality_dropout=0.5)
    one = tuning(Loaded(pixels_cache, config), fabric)
    share = read_share(one, torch.arange(3), NUMBERS)
    train_step(one, share, NUMBERS)
    two = tuning(Loaded(pixels_cache, config), fabric)
    ids, real = share.ids.repeat(2), torch.cat([share.real, ~share.real])
    train_step(two, replace(share, ids=ids, real=real, parts=share.parts * 2), NUMBERS)
    assert_same_update(one, two)


def test_frozen_backbones_are_unchanged_and_heads_are_trained(pixels_cache: Cache, fabric: Any) -> None:
    work, _ = step(pixels_cache, fabric, replace(PLAIN, finetune_blocks=0))
    assert all(p.grad is None for p in work.model.networks.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in work.model.heads.parameters())
    assert [group["lr"] for group in work.optimizer.param_groups] == [1e-3]


def test_parameter_groups_have_separate_rates_and_one_schedule(pixels_cache: Cache, fabric: Any) -> None:
    work = tuning(Loaded(pixels_cache, replace(PLAIN, warmup=2.0)), fabric)
    assert [group["lr"] for group in work.optimizer.param_groups] == [1e-3, 1e-4]
    assert {group["weight_decay"] for group in work.optimizer.param_groups} == {PLAIN.weight_decay}
    row = train_epoch(work, 0)  # half of the warm-up
    assert [group["lr"] for group in work.optimizer.param_groups] == pytest.approx([5e-4, 5e-5])
    assert row["lr"] == pytest.approx(5e-4)
    assert row["loss_total"] > 0
    assert not any(network.training for network in work.model.networks)


@pytest.mark.parametrize(("count", "processes", "parts"), [(5, 2, 2), (16, 2, 1), (1, 3, 2), (7, 1, 7)])
def test_a_batch_is_split_completely(count: int, processes: int, parts: int) -> None:
    ids = torch.arange(10, 10 + count)
    divided, real = divide(ids, processes, parts)
    assert divided.shape == real.shape == (processes, parts, -(-count // (processes * parts)))
    assert divided[real].tolist() == ids.tolist()


def test_prefetching_keeps_order_and_propagates_errors() -> None:
    assert list(ahead(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16]
    results = ahead(lambda x: 1 // x, [1, 0])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


# What `torchrun --nproc-per-node 2` sets and runs.
PROCESS = """
import os, sys
os.environ.update(RANK="{0}", LOCAL_RANK="{0}", GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="{1}", TORCHELASTIC_RUN_ID="none")
sys.path.insert(0, {2!r})
import finetune_process
from pathlib import Path
finetune_process.main(Path({3!r}), Path({4!r}))
sys.exit()
"""


def process_arguments(cache: Cache, out: Path) -> list[tuple[object, ...]]:
    """Rank, free port, folder of the program, cache and output of each process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [(rank, port, str(Path(__file__).parent), str(cache.path), str(out)) for rank in range(2)]


def test_two_processes_compute_the_gradients_of_one(lab: Lab, pixels_cache: Cache, tmp_path: Path) -> None:
    launched = [lab.start([], PROCESS.format(*arguments)) for arguments in process_arguments(pixels_cache, tmp_path)]
    for process in launched:
        assert_printed(process.wait(), 0)
    theirs, _ = read_tensors(tmp_path / "gradients.safetensors")
    mine = gradients(pixels_cache.path)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * scale, msg=name)
    alone = train_run(
        open_cache(pixels_cache.path), replace(CONFIG, epochs=1), tmp_path / "alone", tensorboard=False, figures=False
    )
    both = train_run(open_cache(pixels_cache.path), replace(CONFIG, epochs=1), tmp_path / "run")
    assert both.was_done
    assert both.metrics["ccc"]["mean"] == pytest.approx(alone.metrics["ccc"]["mean"], abs=0.02)
