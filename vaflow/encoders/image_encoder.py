"""The forward pass that all image encoders share: normalise, run the network, return one float32 vector per image."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch

from vaflow.encoders.images import Image, Preprocessing


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context that an encoder's network runs in; float32 leaves the caller's context unchanged."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


class ImageEncoder:
    """A visual encoder around a network; see `vaflow.encoders.base.VisualEncoder`.

    Args:
        name: of the stream.
        module: [B, 3, S, S] normalised -> [B, dim], or [B, layers, dim] where `layers` is set.
        dim: length of the vector.
        preprocessing: from pixels to the network's input.
        identity: plain JSON of everything that changes the output.
        device, precision: where and how precisely to compute.
    """

    kind: ClassVar[str] = "visual"

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        dim: int,
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.dim = dim
        self.layers: tuple[int, ...] = ()
        self.precision = precision
        self.preparation = preprocessing.preparation
        self.image_size = self.preparation.size
        self.identity = dict(identity)
        self.device = torch.device(device)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self.parameter_count: int | None = sum(parameter.numel() for parameter in self.module.parameters())
        self._mean = torch.tensor(preprocessing.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=self.device).view(1, 3, 1, 1)

    def prepare(self, image: Image) -> Image:
        """RGB [H, W, 3] uint8 of any size -> [S, S, 3] uint8."""
        return self.preparation(image)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """As `encode`, with gradients: [B, S, S, 3] uint8 -> [B, dim] float32.

        Raises:
            ValueError: the images have another shape.
        """
        edge = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (edge, edge, 3):
            raise ValueError(f"{self.name}: expected images [B, {edge}, {edge}, 3], got {tuple(images.shape)}")
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        pixels = (pixels - self._mean) / self._std
        with autocast(self.device, self.precision):
            vectors: torch.Tensor = self.module(pixels)
        return vectors.to(torch.float32)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8, prepared, on any device -> [B, dim] or [B, layers, dim] float32 on the device."""
        return self.features(images)
