"""The training loop: reference step, determinism, resumption, non-finite values."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache
from torch import nn

from vaflow.cache import Cache
from vaflow.device import choose_device
from vaflow.errors import CorruptError, DataError
from vaflow.files import write_tensors
from vaflow.train.config import TrainConfig
from vaflow.train.data import load_split
from vaflow.train.inputs import Inputs, resolve
from vaflow.train.losses import total_loss
from vaflow.train.run_folder import build_model
from vaflow.train.scores import score
from vaflow.train.traces import predict_clips
from vaflow.train.training_loop import Progress, Row, adamw, fit, lr_factor, make_optimizer, seeded, train_step
from vaflow.train.windows import StreamTable, WindowSet

CONFIG = TrainConfig(hidden=16, lr=3e-3, batch_size=8, epochs=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[TrainConfig, Inputs, WindowSet, WindowSet]:
    cache: Cache = make_cache(tmp_path_factory.mktemp("loop") / "cache", Toy(seconds=(8, 14)))
    config, inputs = resolve(cache, CONFIG)
    train, val = (load_split(cache, split, inputs.streams, config) for split in ("train", "val"))
    return config, inputs, train, val


def fresh(config: TrainConfig, inputs: Inputs) -> nn.Module:
    with seeded(config.seed):
        return build_model(config, inputs.specs, inputs.prototypes)


def trained(loaded, checkpoint: Path | None = None, on_epoch=None, **settings) -> tuple[nn.Module, Progress]:
    config, inputs, train, val = loaded
    config = TrainConfig(**{**config.__dict__, **settings})
    model = fresh(config, inputs)
    return model, fit(model, train, val, config, checkpoint=checkpoint, on_epoch=on_epoch)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_equal_seeds_give_equal_weights(loaded) -> None:
    one, _ = trained(loaded)
    torch.rand(3)  # random numbers drawn by other code must change nothing
    two, _ = trained(loaded)
    other, _ = trained(loaded, seed=1)
    assert same(one.state_dict(), two.state_dict())
    assert not same(one.state_dict(), other.state_dict())


def test_prefetched_features_train_the_same_weights(tmp_path: Path) -> None:
    """A random order of windows, with dropout of modalities: bit for bit as in memory."""
    cache = make_cache(tmp_path / "cache", Toy(seconds=(8, 14)))
    config, inputs = resolve(cache, replace(CONFIG, epochs=2, modality_dropout=0.3))
    weights = []
    for budget in (None, 0):
        threads: set[str] = set()
        train, val = (
            load_split(cache, split, inputs.streams, config, budget=budget, scratch=tmp_path)
            for split in ("train", "val")
        )

        def gather(ids, read=train.gather, threads=threads):
            threads.add(threading.current_thread().name)
            return read(ids)

        train.gather = gather  # type: ignore[method-assign]
        model = fresh(config, inputs)
        fit(model, train, val, config)
        weights.append(model.state_dict())
        assert train.off_device == (budget == 0)
        assert (threads == {threading.main_thread().name}) == (budget is None)
    assert same(*weights)


def test_training_does_not_change_global_random_state(loaded) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    trained(loaded, epochs=1)
    assert torch.equal(torch.rand(2), expected)


def test_a_resumed_training_equals_an_uninterrupted_one(loaded, tmp_path: Path) -> None:
    def stop_after_two(row: Row) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(loaded, checkpoint, stop_after_two)
    losses: list[float] = []
    resumed, progress = trained(loaded, checkpoint, lambda row: losses.append(row["epoch"]))
    whole, expected = trained(loaded)
    assert losses == [3, 4]
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(dict(progress.best), dict(expected.best))
    assert (progress.best_epoch, progress.best_score) == (expected.best_epoch, expected.best_score)
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in progress.history]
    assert timeless == [{k: v for k, v in row.items() if "seconds" not in k} for row in expected.history]


def test_a_damaged_checkpoint_is_refused(loaded, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    trained(loaded, checkpoint, epochs=1)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CorruptError, match="damaged"):
        trained(loaded, checkpoint)


def test_the_best_epoch_is_kept(loaded) -> None:
    config, inputs, _, val = loaded
    _, progress = trained(loaded, epochs=6)
    means = [row["val_ccc_mean"] for row in progress.history]
    assert progress.best_epoch == 1 + int(np.argmax(means))
    model = fresh(config, inputs)
    model.load_state_dict(dict(progress.best))
    assert score(predict_clips(model, val))[2] == pytest.approx(max(means), abs=1e-12)
    assert max(means) > 0.6  # the toy task is learnable


def test_one_optimizer_step_equals_the_reference(loaded) -> None:
    """Reference AdamW in NumPy terms, with autograd for the gradient only."""
    config, inputs, train, _ = loaded
    config = TrainConfig(**{**config.__dict__, "dropout": 0.0, "weight_decay": 0.1})
    batch = train.gather(train.trainable[:8])
    model, twin = fresh(config, inputs), fresh(config, inputs)
    numbers = train_step(model, make_optimizer(model, config), batch, config)
    loss, parts = total_loss(twin(batch), batch)
    loss.backward()
    grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert numbers[:3].tolist() == pytest.approx([loss.item(), parts["ccc"].item(), parts["kl"].item()])
    assert float(numbers[-1]) == pytest.approx(np.sqrt(sum(float(g.square().sum()) for g in grads.values())), rel=1e-5)
    after = dict(model.named_parameters())
    for name, before in twin.named_parameters():
        if name in grads:
            g = grads[name].double()
            expected = before.detach().double() * (1 - config.lr * 0.1) - config.lr * g / (g.abs() + 1e-8)
            np.testing.assert_allclose(after[name].detach().numpy(), expected.numpy(), atol=2e-6)


def test_the_optimizer_equals_pytorch(tmp_path: Path) -> None:
    """The same bits, with two learning rates, a gradient that comes late, and a saved and restored state."""
    config = TrainConfig(weight_decay=0.1)
    start = [torch.randn(3, 2), torch.randn(4), torch.randn(2)]
    ours, theirs = ([nn.Parameter(values.clone()) for values in start] for _ in range(2))
    optimizer = adamw([(ours[:2], 1e-2), (ours[2:], 1e-3)], config)
    groups = [{"params": theirs[:2], "lr": 1e-2}, {"params": theirs[2:], "lr": 1e-3}]
    reference = torch.optim.AdamW(groups, weight_decay=0.1, fused=True)
    for step in range(6):
        for pair in list(zip(ours, theirs, strict=True))[: 3 if step > 1 else 2]:
            gradient = torch.randn_like(pair[0])
            for parameter in pair:
                parameter.grad = gradient.clone()
        optimizer.step()
        reference.step()
        assert all(map(torch.equal, ours, theirs))
        if step == 3:
            state = optimizer.state_dict()
            tensors = {f"{k}/{name}": x for k, entry in state["state"].items() for name, x in entry.items()}
            write_tensors(tmp_path / "state", tensors)  # refuses tensors that share memory
            optimizer = adamw([(ours[:2], 1e-2), (ours[2:], 1e-3)], config)
            optimizer.load_state_dict(state)


def test_clipping_bounds_the_gradient_not_the_report(loaded) -> None:
    config, inputs, train, _ = loaded
    config = TrainConfig(**{**config.__dict__, "clip_norm": 0.01})
    model = fresh(config, inputs)
    numbers = train_step(model, make_optimizer(model, config), train.gather(train.trainable[:8]), config)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(numbers[-1]) > 0.01 and float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("warmup", [0.0, 1.5])
def test_learning_rate_schedules_equal_their_formula(warmup: float) -> None:
    steps, config = 10, TrainConfig(epochs=4, schedule="cosine", warmup=warmup)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    warm = int(warmup * steps)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * 4 - warm)
    for step in range(steps * 4):
        if step < warm:
            assert lr_factor(config, step, steps) == pytest.approx((step + 1) / warm)
            continue
        assert lr_factor(config, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        oracle.step()
    assert lr_factor(TrainConfig(), 123, steps) == 1.0


def poison(windows: WindowSet, item: str) -> WindowSet:
    """NaN in every row that one clip reads."""
    clip = next(clip for clip in windows.clips if clip.item == item)
    table = windows.tables[VISUAL]
    rows = table.rows.clone()
    read = table.index[clip.first : clip.last].unique().long()
    rows[read[read > 0]] = torch.nan
    return replace(windows, tables={**windows.tables, VISUAL: StreamTable(rows, table.index)})


def test_a_non_finite_loss_names_the_clips(loaded) -> None:
    config, inputs, train, val = loaded
    bad = poison(train, "train3")
    with pytest.raises(DataError, match=r"windows of .*train3") as caught:
        fit(fresh(config, inputs), bad, val, config)
    assert "clip_norm" in str(caught.value)


def test_disabled_streams_are_not_read(loaded) -> None:
    """NaN in a stream that every window masks changes nothing."""
    config, inputs, train, val = loaded
    hidden = frozenset({AUDIO})
    model = fresh(config, inputs)
    clean = fit(model, train.without(hidden), val.without(hidden), TrainConfig(**{**config.__dict__, "epochs": 1}))
    table = train.tables[AUDIO]
    rows = torch.full_like(table.rows, torch.nan)
    rows[0] = 0
    masked = StreamTable(rows, torch.zeros_like(table.index), table.inside, table.time)
    dirty = replace(train, tables={**train.tables, AUDIO: masked})
    model = fresh(config, inputs)
    other = fit(model, dirty, val.without(hidden), TrainConfig(**{**config.__dict__, "epochs": 1}))
    assert same(dict(clean.best), dict(other.best))


def test_device_names_are_resolved() -> None:
    assert choose_device("cpu").type == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected
    with pytest.raises(ValueError, match="no such GPU"):
        choose_device("cuda:99")
