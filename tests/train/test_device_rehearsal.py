"""Every head, fusion, temporal model, loss and gather on a fake GPU: mixed devices and synchronization fail.

`FakeTensorMode` propagates shapes and devices without data, so no GPU is needed; only `backward` cannot be rehearsed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_batches import AUDIO_STREAM, AUDIO_STREAM_2, VISUAL_STREAM, VISUAL_STREAM_2

from vaflow.train.batch import AUDIO, BINARY, CLASSES, Batch, ExtraTargets, StreamSpec, TargetSpec
from vaflow.train.builder import build_model
from vaflow.train.config import TrainConfig
from vaflow.train.heads.fusion import FUSION, POSITIONS
from vaflow.train.heads.model import NORMALIZE, VAModel
from vaflow.train.heads.temporal import TEMPORAL
from vaflow.train.losses import total_loss
from vaflow.train.together.stacked_models import StackedModels, stacked_batch
from vaflow.train.windows import StreamTable, WindowSet, drop_modality, gather_each

B, F, S, WINDOWS = 3, 4, 6, 10
MEL = StreamSpec("mel", AUDIO, 8, frames_per_step=2)
TARGETS = (TargetSpec("expression", CLASSES, ("a", "b")), TargetSpec("units", BINARY, ("x", "y", "z")))


class NoCopiesBetweenDevices(TorchDispatchMode):
    """Fail on device copies that synchronize or need pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if isinstance(source, Tensor) and source.device != result.device and source.ndim:
                raise AssertionError(f"copy of {[*source.shape]} from {source.device} to {result.device}")
        return result


@contextmanager
def pretended_gpu() -> Iterator[None]:
    with FakeTensorMode():
        yield


def windows_of(streams: tuple[StreamSpec, ...], device: str = "cuda") -> WindowSet:
    """A split on the fake GPU, laid out as by `load_split`."""
    tables = {}
    for stream in streams:
        steps = F if stream.kind != AUDIO else S
        rows, index = torch.zeros(20, stream.dim, device=device), torch.zeros(WINDOWS, steps, dtype=torch.int64)
        inside, time = torch.ones(WINDOWS, steps, dtype=torch.bool), torch.zeros(WINDOWS, steps)
        masks = (inside.to(device), time.to(device)) if stream.kind == AUDIO else (None, None)
        tables[stream.name] = StreamTable(rows, index.to(device), *masks)
    extra = {
        t.name: ExtraTargets(
            t.task,
            torch.zeros(WINDOWS, F, len(t.names), device=device),
            torch.ones(WINDOWS, F, len(t.names), dtype=torch.bool, device=device),
        )
        for t in TARGETS
    }
    return WindowSet(
        streams,
        tables,
        (),
        time=torch.zeros(F, device=device),
        sample_time=np.zeros((WINDOWS, F)),
        inside=torch.ones(WINDOWS, F, dtype=torch.bool, device=device),
        target=torch.zeros(WINDOWS, F, 2, device=device),
        labelled=torch.ones(WINDOWS, F, 2, dtype=torch.bool, device=device),
        extra=extra,
    )


def rehearse(streams: tuple[StreamSpec, ...], loss: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """Gather, drop a modality, run the model and compute the loss; nothing may leave the device."""
    with pretended_gpu():
        options = {"hidden": 8, "attention_heads": 2, **options}
        with torch.device("cuda"):
            model = VAModel(streams, torch.zeros(9, 6), targets=TARGETS, **options)
        windows, ids = windows_of(streams), torch.zeros(B, dtype=torch.int64, device="cuda")
        with NoCopiesBetweenDevices():
            batch = drop_modality(windows.gather(ids), streams, 0.5)
            check_device(batch)
            output = model(batch)
            total, parts = total_loss(output, batch, mse_weight=0.5, extra_weight=0.5, **(loss or {}))
    assert output.va.shape == (B, F, 2)
    assert {part.device.type for part in parts.values()} == {"cuda"}
    return total


def check_device(batch: Batch, device: str = "cuda") -> None:
    """All tensors of a batch are on the device."""
    for each in fields(batch):
        value = getattr(batch, each.name)
        tensors = value.values() if isinstance(value, dict) else [value]
        for tensor in tensors:
            tensor = tensor.value if isinstance(tensor, ExtraTargets) else tensor
            assert tensor.device.type == device, each.name


@pytest.mark.parametrize("temporal", TEMPORAL)
@pytest.mark.parametrize("fusion", FUSION)
def test_every_temporal_model_and_fusion(temporal, fusion):
    assert rehearse((VISUAL_STREAM, AUDIO_STREAM), temporal=temporal, fusion=fusion).device.type == "cuda"


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_normalisation_and_position(normalize, positions):
    assert (
        rehearse((VISUAL_STREAM, AUDIO_STREAM), normalize=normalize, attention_positions=positions).device.type
        == "cuda"
    )


@pytest.mark.parametrize(
    "streams",
    [
        (VISUAL_STREAM,),
        (AUDIO_STREAM,),
        (VISUAL_STREAM, VISUAL_STREAM_2, AUDIO_STREAM, AUDIO_STREAM_2),
        (VISUAL_STREAM, MEL),
        (AUDIO_STREAM, MEL),
    ],
)
@pytest.mark.parametrize("temporal", TEMPORAL)
def test_every_mix_of_streams(streams, temporal):
    assert rehearse(streams, temporal=temporal).device.type == "cuda"


@pytest.mark.parametrize("options", [{"layers": 2}, {"layers": 2, "dropout": 0.3}, {"per_direction": 3}])
@pytest.mark.parametrize("temporal", ["gru", "lstm"])
def test_every_recurrent_option(options, temporal):
    assert rehearse((VISUAL_STREAM, AUDIO_STREAM), temporal=temporal, temporal_options=options).device.type == "cuda"


@pytest.mark.parametrize("loss", [{}, {"hard": True}, {"kl_weight": 0.0}])
@pytest.mark.parametrize("options", [{"learnable_prototypes": True}, {"context": (2, 3)}])
def test_every_loss_and_prompt_head(loss, options):
    assert rehearse((VISUAL_STREAM, AUDIO_STREAM), loss, **options).device.type == "cuda"


BATCHED = [
    *({"temporal": temporal} for temporal in TEMPORAL),
    *({"fusion": fusion} for fusion in FUSION),
    *({"normalize": normalize} for normalize in NORMALIZE),
    *({"uncertainty": "variance", "nll_weight": 0.3}, {"region_labels": "hard"}, {"mse_weight": 0.5}),
]


@pytest.mark.parametrize("settings", BATCHED, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("runs", [(0, 1, 2), (0, 2)])
def test_every_head_trains_in_a_batch_of_runs(settings, runs, monkeypatch):
    """The gather, the stacked model and its losses on the meta device: pretended GPU tensors crash under `vmap`."""
    monkeypatch.setattr("vaflow.train.together.stacked_models.Generator", lambda device: torch.Generator())
    drop = {} if settings.get("temporal") == "transformer" else {"dropout": 0.3}
    config = TrainConfig(hidden=8, attention_heads=2, **{"dropout": 0.0, **drop, **settings})
    streams = (VISUAL_STREAM, AUDIO_STREAM)
    with torch.device("meta"):
        models = [build_model(config, streams, torch.zeros(9, 6), targets=TARGETS) for _ in range(3)]
    windows, ids = windows_of(streams, "meta"), torch.zeros(B, dtype=torch.int64, device="meta")
    stack = StackedModels(models, [config] * 3)
    with NoCopiesBetweenDevices():
        batch = stacked_batch(gather_each([windows] * len(runs), [ids] * len(runs)), len(runs))
        check_device(batch, "meta")
        losses, parts, parameters = stack.losses(batch, runs)
    assert losses.shape == (len(runs),)
    assert {value.device.type for value in (losses, *parts.values(), *parameters.values())} == {"meta"}


def test_the_device_check_detects_copies_and_synchronization():
    with pretended_gpu(), NoCopiesBetweenDevices():
        x = torch.zeros(3, device="cuda")
        with pytest.raises(AssertionError, match="copy of"):
            x.cpu()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(x.sum().item())
        with pytest.raises(RuntimeError, match="device"):
            x + nn.Parameter(torch.zeros(3))
