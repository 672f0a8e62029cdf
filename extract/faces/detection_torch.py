"""CenterFace in torch: the network of `detection.py` with the same weights, for batches of images on any device.
Experimental: never run on a GPU.

MobileNetV2 without its classifier, a pyramid that adds its last maps of each size from the coarsest to the finest, and
four heads on a grid of 4 x 4 pixels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaflow.device import InParts, Stopwatch, forbid_tf32
from vaflow.errors import WeightsError, explain
from vaflow.extract.faces.detection import MIN_SCORE, Cells, model_path

BATCH = {"cpu": 1, "cuda": 16}  # images; on a CPU, single images take less than half the time of batches of eight
QUESTION = 16  # images of one size that a worker sends at once, at most
_FIRST = (32, 16)  # of CenterFace: channels before the stages
_STAGES = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))  # channels, blocks, stride
_WIDENING = 6  # factor by which a block widens its input
_LAST_OF_SIZE = (0, 1, 3)  # stages whose maps the pyramid adds, besides the last stage's
_PYRAMID = 24  # channels
_HEADS = (1, 2, 2, 10)  # channels: heat map, size, offset, landmarks
_EPSILON = 1e-3  # of batch normalisation, as the file has it


class TorchDetector:
    """Detects the cells in which faces are centred. Every batch has the same size, the last one padded with black.

    On a GPU it uses its own stream of high priority, so that it does not wait behind a large batch of an encoder.

    Args:
        batch: images per batch; 0 chooses by device.

    Attributes:
        device_seconds: seconds of work of the device.

    Raises:
        WeightsError: the network's file is not installed, or contains another network.
    """

    def __init__(self, device: torch.device, batch: int = 0) -> None:
        if device.type == "cuda":
            forbid_tf32()
        self.device = device
        self._batch = batch or BATCH[device.type]
        self._room = torch.zeros(0, dtype=torch.uint8)
        self.device_seconds = 0.0
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._grid = InParts(load_centerface().to(device), device, self._batch)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # until the weights are copied

    @torch.inference_mode()
    def detect(self, images: Sequence[NDArray[np.uint8]]) -> tuple[Cells, ...]:
        """The likely cells of each image [H, W, 3] RGB; all have one size, whose edges are multiples of 32.

        Raises:
            VaflowError: a single image does not fit into the device's memory.
        """
        batch = self._filled(images)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            work = Stopwatch(self.device)
            grid = self._grid(batch.to(self.device, non_blocking=True))[: len(images)]
            likely = grid[:, 0] > MIN_SCORE
            places, values = likely.nonzero(), grid.permute(0, 2, 3, 1)[likely]  # both ordered by image, row, column
            work.stop()
            rows, columns = places.cpu().numpy(), values.cpu().numpy()
        self.device_seconds += work.seconds
        ends = np.searchsorted(rows[:, 0], np.arange(len(images) + 1))
        return tuple(Cells(rows[a:b, 1:].copy(), np.ascontiguousarray(columns[a:b].T)) for a, b in pairwise(ends))

    def _filled(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """[N, H, W, 3], N a multiple of the batch. The memory is reused: its first use costs more than the copy."""
        count = -(-len(images) // self._batch) * self._batch
        size = count * images[0].size
        if len(self._room) < size:
            self._room = torch.zeros(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        batch = self._room[:size].view(count, *images[0].shape)
        for place, image in zip(batch, images, strict=False):
            place.copy_(torch.from_numpy(image))
        batch[len(images) :] = 0
        return batch


def load_centerface() -> "CenterFaceNetwork":
    """The network with its weights, on the CPU.

    Raises:
        WeightsError: the file is not installed, or contains another network.
    """
    network = CenterFaceNetwork().eval().requires_grad_(False)
    ours = [module for module in network.modules() if hasattr(module, "weight")]
    stored = centerface_weights()
    try:
        for module, values in zip(ours, stored, strict=True):
            for parameter, value in zip(_parameters(module), values, strict=True):
                if parameter.shape != value.shape:
                    raise ValueError(f"{value.shape} for {tuple(parameter.shape)}")
                parameter.copy_(torch.from_numpy(value))
    except ValueError as error:
        problem = "The face detector's file contains another network"
        raise WeightsError(explain(problem, got=error, remedy="Use --detector opencv")) from error
    return network


def centerface_weights() -> list[tuple[NDArray[np.float32], ...]]:
    """Weights of every layer that has any, in the order of computation. OpenCV reads the file."""
    import cv2

    # OpenCV 5's new engine does not expose them; earlier versions have one engine.
    classic = getattr(cv2.dnn, "ENGINE_CLASSIC", None)
    net = cv2.dnn.readNetFromONNX(str(model_path()), **({} if classic is None else {"engine": classic}))
    layers = [net.getLayer(name).blobs for name in net.getLayerNames()]
    return [tuple(blobs) for blobs in layers if blobs]


def _parameters(module: Any) -> list[Tensor]:
    """Parameters of a module, in the order in which OpenCV returns them."""
    if isinstance(module, nn.BatchNorm2d):
        return [module.running_mean, module.running_var, module.weight, module.bias]  # type: ignore[list-item]
    return [module.weight] if module.bias is None else [module.weight, module.bias]


class CenterFaceNetwork(nn.Module):
    """CenterFace. Modules are defined, and their weights read, in the order in which the file computes them."""

    def __init__(self) -> None:
        super().__init__()
        first, width = _FIRST
        self.stem = nn.Sequential(*_conv(3, first, 3, stride=2), *_conv(first, first, 3, groups=first))
        self.stem.append(nn.Conv2d(first, width, 1))
        self.stages = nn.ModuleList()
        for channels, blocks, stride in _STAGES:
            rest = [_Block(channels, channels, 1) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(_Block(width, channels, stride), *rest))
            width = channels
        self.top = nn.Sequential(*_conv(width, _PYRAMID, 1))
        self.up = nn.ModuleList(_Up(_STAGES[stage][0]) for stage in reversed(_LAST_OF_SIZE))
        self.neck = nn.Sequential(*_conv(_PYRAMID, _PYRAMID, 3))
        self.heads = nn.ModuleList(nn.Conv2d(_PYRAMID, channels, 1) for channels in _HEADS)

    def forward(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 RGB -> [B, 15, H / 4, W / 4]: heat map, size, offset and landmarks of every cell."""
        x = self.stem(images.permute(0, 3, 1, 2).float())
        sides = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _LAST_OF_SIZE:
                sides.append(x)
        x = self.top(x)
        for up in self.up:
            x = up(x, sides.pop())
        x = self.neck(x)
        heat, *others = (head(x) for head in self.heads)
        return torch.cat([heat.sigmoid(), *others], dim=1)


class _Block(nn.Module):
    """MobileNetV2's: widen, look around, narrow; added to its input where that has the same shape."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = _WIDENING * width
        self.layers = nn.Sequential(*_conv(width, wide, 1), *_conv(wide, wide, 3, stride=stride, groups=wide))
        self.layers.append(nn.Conv2d(wide, channels, 1))
        self.adds = stride == 1 and width == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class _Up(nn.Module):
    """One step of the pyramid: maps twice as fine, and those of a stage added."""

    def __init__(self, side: int) -> None:
        super().__init__()
        finer = nn.ConvTranspose2d(_PYRAMID, _PYRAMID, 2, 2, bias=False)
        self.finer = nn.Sequential(finer, nn.BatchNorm2d(_PYRAMID, eps=_EPSILON), nn.ReLU())
        self.side = nn.Sequential(*_conv(side, _PYRAMID, 1))

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return self.finer(x) + self.side(side)


def _conv(width: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width, channels, kernel, stride, kernel // 2, groups=groups), nn.ReLU()
