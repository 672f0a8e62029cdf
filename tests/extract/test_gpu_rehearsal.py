"""Batchers on a fake GPU: no synchronization, no mixed devices, overlapping batches.

FakeTensorMode runs shapes and devices without a GPU. What makes the host wait for the device (`.item()`, `nonzero`,
a blocking copy to the host) fails here. The torch face detector is not rehearsed: its caller waits for its answer.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vaflow.encoders import build_encoder
from vaflow.extract.config import ExtractConfig
from vaflow.extract.encoding import FixedBatcher, make_encoders

CUDA = torch.device("cuda")


class NoBlockingCopies(TorchDispatchMode):
    """Raise on a device copy that blocks the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self.check(args[0].device, result.device, kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            self.check(args[1].device, args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return result

    @staticmethod
    def check(source: torch.device, target: torch.device, non_blocking: bool) -> None:
        if source.type != target.type and not non_blocking:
            raise AssertionError(f"a blocking copy from {source} to {target}")


class Event:
    """A CUDA event that records when it is recorded and synchronized."""

    log: list[tuple[str, int]]
    made = 0

    def __init__(self, **_: object) -> None:
        self.number = Event.made
        Event.made += 1

    def record(self, stream: object = None) -> None:
        Event.log.append(("record", self.number))

    def synchronize(self) -> None:
        Event.log.append(("wait", self.number))

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


def move(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """`Module.to` without swapping parameters, which tensors of shapes only do not allow."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(value.detach().to(device, dtype), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    return module


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors on a device named cuda; stand-ins for pinned memory, streams and events."""
    for name in ("clip-tiny", "ast-tiny", "resnet-tiny", "vggish-tiny"):
        build_encoder(name)  # fills the caches of libraries with real tensors, which later tests use as well
    Event.log, Event.made = [], 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(FakeTensor, "numpy", lambda self: np.zeros(self.shape, np.float32), raising=False)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize(
    ("visual", "audio", "shape", "dtype"),
    [
        ("clip-tiny", None, (224, 224, 3), np.uint8),
        ("resnet-tiny", None, (224, 224, 3), np.uint8),
        (None, "ast-tiny", (998, 128), np.float32),
        (None, "vggish-tiny", (96, 64), np.float32),
    ],
)
def test_an_encoder_runs_without_hidden_synchronization(
    pretended_gpu: None, visual: str | None, audio: str | None, shape: tuple[int, ...], dtype: type
) -> None:
    built = build_encoder(visual or audio or "", device="cuda")
    config = ExtractConfig(
        visual=(visual,) if visual else (), audio=(audio,) if audio else (), image_batch=2, window_batch=2
    )
    encoders = make_encoders(config, CUDA, [built] if visual else [], [built] if audio else [])  # type: ignore[list-item]
    (batcher,) = encoders.batchers.values()
    results: list[Any] = []
    with NoBlockingCopies():
        for _ in range(5):
            batcher.add(np.zeros(shape, dtype), results.append)
        batcher.flush()
    assert len(results) == 5


def test_results_are_fetched_after_the_next_batch_is_launched(pretended_gpu: None) -> None:
    batcher = FixedBatcher(lambda batch: batch.float() * 2, 1, CUDA)
    delivered: list[int] = []

    def record(number: int, _: object) -> None:
        delivered.append(number)

    for number in range(3):
        batcher.add(np.zeros(4, np.uint8), partial(record, number))
        assert delivered == list(range(number)), "the batch that was just launched is still in flight"
    batcher.flush()
    assert delivered == [0, 1, 2]
    first_end, second_end = 1, 3  # every batch records an event before and one behind its copy
    waits = [number for kind, number in Event.log if kind == "wait"]
    assert Event.log.index(("record", second_end)) < Event.log.index(("wait", first_end))
    assert list(dict.fromkeys(waits)) == [first_end, second_end, 5], "each batch waits for its own end only"


@pytest.mark.parametrize(
    ("encode", "error"),
    [
        (lambda batch: batch.float() * batch.sum().item(), DataDependentOutputException),
        (lambda batch: batch.float()[batch.nonzero()[:, 0]], DynamicOutputShapeException),
        (lambda batch: batch.float() + torch.ones(4), RuntimeError),
        (lambda batch: batch.cpu().float(), AssertionError),
        (lambda batch: batch + torch.arange(4).to(CUDA), AssertionError),
    ],
    ids=["item", "nonzero", "mixed devices", "copy to the host", "table copied at every call"],
)
def test_hidden_synchronization_and_mixed_devices_are_detected(pretended_gpu: None, encode: Any, error: type) -> None:
    batcher = FixedBatcher(partial(encode), 2, CUDA)
    with pytest.raises(error), NoBlockingCopies():
        for _ in range(2):
            batcher.add(np.zeros(4, np.uint8), lambda _: None)
