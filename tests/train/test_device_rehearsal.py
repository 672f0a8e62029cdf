"""Every head, fusion, temporal model, loss and gather on a fake GPU: mixed devices and synchronization fail.

`FakeTensorMode` propagates shapes and devices without data, so no GPU is needed; only `backward` cannot be rehearsed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_batches import AUDIO_STREAM, AUDIO_STREAM_2, VISUAL_STREAM, VISUAL_STREAM_2

from vaflow.train.batch import AUDIO, BINARY, CLASSES, Batch, ExtraTargets, StreamSpec, TargetSpec, drop_modality
from vaflow.train.config import TrainConfig
from vaflow.train.heads import NORMALIZE, VAModel
from vaflow.train.heads.fusion import FUSION, POSITIONS
from vaflow.train.heads.temporal import TEMPORAL
from vaflow.train.losses import total_loss
from vaflow.train.run_folder import build_model
from vaflow.train.stacked_models import StackedModels, stacked_batch
from vaflow.train.windows import Prefetcher, StreamTable, WindowSet, gather_each, tensors_of

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


@pytest.mark.parametrize(
    "options", [*({"temporal": name} for name in TEMPORAL), *({"fusion": name} for name in FUSION)]
)
def test_every_temporal_model_and_fusion(options):
    assert rehearse((VISUAL_STREAM, AUDIO_STREAM), **options).device.type == "cuda"


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
@pytest.mark.parametrize("temporal", ["gru", "tcn"])  # recurrent models of several streams run together, others do not
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


@pytest.mark.parametrize(
    ("settings", "runs"),
    [(settings, (0, 1, 2)) for settings in BATCHED] + [({"temporal": temporal}, (0, 2)) for temporal in TEMPORAL],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_every_head_trains_in_a_batch_of_runs(settings, runs, monkeypatch):
    """The gather, the stacked model and its losses on the meta device: pretended GPU tensors crash under `vmap`."""
    monkeypatch.setattr("vaflow.train.stacked_models.Generator", lambda device: torch.Generator())
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


class OnlyPinnedCopies(TorchDispatchMode):
    """Fail on copies to another device that wait: from pageable memory, or not declared as `non_blocking`."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.UntypedStorage] = []
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and (kwargs or {}).get("pin_memory"):
            self.pinned.append(result.untyped_storage())
        if func is torch.ops.aten._to_copy.default and args[0].device != result.device:
            storage = args[0].untyped_storage()._cdata
            assert any(storage == pinned._cdata for pinned in self.pinned), f"{[*args[0].shape]} is not page-locked"
            assert (kwargs or {}).get("non_blocking"), f"the copy of {[*args[0].shape]} waits"
            self.copied += 1
        return result


class RecordedStream:
    """A CUDA stream that records the calls."""

    calls: list[str]

    def __init__(self, name: object = "side") -> None:
        self.device, self.name = torch.device("cuda"), "main" if name == "main" else "side"

    def wait_stream(self, other: "RecordedStream") -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.calls.append(f"event of {self.name}")
        return "event"

    def wait_event(self, event: str) -> None:
        self.calls.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None:
        self.calls.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.calls.append(f"leave {self.name}")


def test_rows_in_host_memory_are_copied_ahead_through_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is gathered on a stream of its own, and the stream of the step waits for it; no thread does."""
    calls: list[str] = []
    monkeypatch.setattr(RecordedStream, "calls", calls, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", RecordedStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: RecordedStream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    held: list[Tensor] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: held.append(tensor))
    streams = (VISUAL_STREAM, AUDIO_STREAM)
    with pretended_gpu():
        windows = windows_of(streams)
        on_device = windows.tables[AUDIO_STREAM.name]
        in_memory = {name: replace(t, rows=t.rows.cpu(), index=t.index.cpu()) for name, t in windows.tables.items()}
        windows = replace(windows, tables=in_memory | {AUDIO_STREAM.name: on_device})  # one of the two streams fits
        with torch.device("cuda"):
            model = VAModel(streams, torch.zeros(9, 6), hidden=8, attention_heads=2)
        prefetcher = Prefetcher[Tensor](windows)
        ids = torch.zeros(B, dtype=torch.int64)
        with OnlyPinnedCopies() as copies:
            source = prefetcher.read(ids)
            batch = prefetcher.take(*source)
            check_device(batch)
            assert model(batch).va.shape == (B, F, 2)
    assert copies.copied > 0
    assert calls == [
        "side waits for main",
        *("enter side", "leave side", "event of side"),
        "main waits for event",
    ]
    assert len(held) == sum(1 for _ in tensors_of(vars(batch)))
    assert any(tensor is batch.features[VISUAL_STREAM.name] for tensor in held)


def test_the_device_check_detects_copies_and_synchronization():
    with pretended_gpu(), NoCopiesBetweenDevices():
        x = torch.zeros(3, device="cuda")
        with pytest.raises(AssertionError, match="copy of"):
            x.cpu()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(x.sum().item())
        with pytest.raises(RuntimeError, match="device"):
            x + nn.Parameter(torch.zeros(3))
