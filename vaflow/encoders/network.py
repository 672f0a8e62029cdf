"""What encoders share around their networks: the forward pass of images, windows and examples of audio, layers."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.base import LayerChoice, Request, Segments, TokenGrid, step_centres, whole_window
from vaflow.encoders.preprocessing import HOP, RATE, Image, Prepared, Preprocessing
from vaflow.errors import UsageError, explain


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context that an encoder's network runs in; float32 leaves the caller's context unchanged."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def chosen_layers(choice: LayerChoice, states: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Return the outputs of the chosen layers: their mean, or stacked along a new `axis`, or the only one."""
    layers = torch.stack(list(states), dim=axis)
    if choice.layers == "mean":
        return layers.mean(dim=axis)
    return layers if choice.stacked else layers.select(axis, 0)


class WindowEncoder:
    """An audio encoder that reads a whole window as one segment, and averages its tokens in each step.

    Raises:
        UsageError: the name asks for another pooling.
    """

    kind: ClassVar[str] = "audio"

    def __init__(self, request: Request, choice: LayerChoice) -> None:
        if choice.pooling not in ("", "mean"):
            problem = f"{request.name} is an audio model: its tokens are averaged in each step"
            raise UsageError(explain(problem, expected="pool=mean", got=f"pool={choice.pooling}"))
        self.name, self.precision, self.device = request.name, request.precision, torch.device(request.device)
        self.choice = choice
        self._pooling: dict[tuple[float, int], torch.Tensor] = {}  # on the device, one per shape

    def tokens(self, window: float) -> TokenGrid:
        """Return where the tokens of a window are."""
        raise NotImplementedError

    def segments(self, window: float, steps: int) -> Segments:
        """Return one segment with all rows of the window."""
        return whole_window(window)

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the mean centre of each step's tokens.

        Raises:
            UsageError: a step would have no token.
        """
        return self.tokens(window).step_times(window, steps)

    def pooling(self, window: float, steps: int) -> torch.Tensor:
        """Return [steps, tokens] on the device: the matrix that averages each step's tokens. Raises as `step_times`."""
        key = (float(window), steps)
        if key not in self._pooling:
            matrix = torch.from_numpy(self.tokens(window).pooling(window, steps))
            self._pooling[key] = matrix.to(self.device, non_blocking=True)
        return self._pooling[key]


class ExampleEncoder:
    """An audio encoder that reads one example around every step.

    Attributes:
        example: frames of an example, at a hop of 10 ms; middle: seconds from its start to its middle.
    """

    kind: ClassVar[str] = "audio"
    example: int
    middle: Fraction

    def segments(self, window: float, steps: int) -> Segments:
        """Return one example per step, whose middle is within 5 ms of the step's."""
        hop = Fraction(HOP, RATE)
        times = step_centres(window, steps)
        return Segments(tuple(floor((time - self.middle) / hop + Fraction(1, 2)) for time in times), self.example)

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: (k + 1/2) window / steps."""
        return np.array([float(time) for time in step_centres(window, steps)])


class ImageEncoder:
    """A visual encoder around a network; see `vaflow.encoders.base.VisualEncoder`.

    Args:
        module: [B, 3, S, S] normalised -> [B, dim], or [B, layers, dim] where `layers` is set.
        preprocessing: from pixels to the network's input.
        identity: plain JSON of everything else that changes the output.
        layers: numbers of the layers, if each image has a vector of each.
    """

    kind: ClassVar[str] = "visual"

    def __init__(
        self,
        request: Request,
        module: torch.nn.Module,
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        layers: tuple[int, ...] = (),
    ) -> None:
        self.name, self.precision, self.layers = request.name, request.precision, layers
        self.preparation = preprocessing.preparation
        self.image_size = self.preparation.size
        self.identity = request.identity(identity, layers)
        self.device = torch.device(request.device)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self.parameter_count: int | None = sum(parameter.numel() for parameter in self.module.parameters())
        self._mean = torch.tensor(preprocessing.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=self.device).view(1, 3, 1, 1)
        blank = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8)
        self.dim = int(self.encode(blank).shape[-1])

    def prepare(self, image: Image) -> Prepared:
        """RGB [H, W, 3] uint8 of any size -> [S, S, 3] uint8, or float32 in 0..1: `preparation.dtype`."""
        return self.preparation(image)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """As `encode`, with gradients: [B, S, S, 3] prepared -> [B, dim] float32.

        Raises:
            ValueError: the images have another shape.
        """
        edge = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (edge, edge, 3):
            raise ValueError(f"{self.name}: expected images [B, {edge}, {edge}, 3], got {tuple(images.shape)}")
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32)
        pixels = pixels if images.is_floating_point() else pixels / 255
        pixels = (pixels - self._mean) / self._std
        with autocast(self.device, self.precision):
            vectors: torch.Tensor = self.module(pixels)
        return vectors.to(torch.float32)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] prepared, on any device -> [B, dim] or [B, layers, dim] float32 on the device."""
        return self.features(images)


class BlockOutputs(torch.nn.Module):
    """Outputs of chosen blocks of a vision transformer: [B, 3, S, S] -> [B, dim] or [B, layers, dim].

    Args:
        blocks: its blocks in order, each [B, tokens, dim] -> [B, tokens, dim].
        numbers: of the layers; 0 is the first block's input.
        choice: layers and pooling; pooling "cls" or "mean".
        special: tokens before those of the patches.

    Raises:
        TypeError: a block's output is not [B, tokens, dim].
    """

    def __init__(
        self,
        network: torch.nn.Module,
        blocks: Sequence[torch.nn.Module],
        numbers: Sequence[int],
        choice: LayerChoice,
        special: int,
    ) -> None:
        super().__init__()
        self.network = network
        self._blocks, self._numbers = tuple(blocks), tuple(numbers)  # in a tuple modules are not registered twice
        self._choice, self._special = choice, special

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] normalised -> [B, dim] or, for several layers, [B, layers, dim]."""
        states: dict[int, torch.Tensor] = {}

        def keep(number: int, tokens: Any) -> None:
            if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
                raise TypeError("a block's output is not [B, tokens, dim]")
            cls = self._choice.pooling == "cls"
            states[number] = tokens[:, 0] if cls else tokens[:, self._special :].mean(dim=1)

        hooks = [
            self._blocks[number - 1].register_forward_hook(lambda _, __, output, number=number: keep(number, output))
            for number in self._numbers
            if number
        ]
        if 0 in self._numbers:
            hooks.append(self._blocks[0].register_forward_pre_hook(lambda _, inputs: keep(0, inputs[0])))
        try:
            self.network(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return chosen_layers(self._choice, [states[number] for number in self._numbers], 1)


def encode_blocks(
    request: Request,
    network: torch.nn.Module,
    blocks: Sequence[torch.nn.Module] | None,
    special: int,
    class_token: bool,
    choice: LayerChoice,
    preprocessing: Preprocessing,
    identity: Mapping[str, Any],
) -> ImageEncoder:
    """Return an encoder of chosen blocks of a vision transformer.

    Args:
        blocks: as for `BlockOutputs`; None: the network has none.
        special: number of tokens before the patches'; class_token: whether the first one is a class token.
        choice: layers and pooling; pooling defaults to "cls" with a class token, else "mean".

    Raises:
        UsageError: the network has no such layers or pooling.
    """
    if not blocks:
        problem = f"{request.name} is not a transformer: it has no layers to choose"
        raise UsageError(explain(problem, got=f"@{choice.layers}"))
    pooling = choice.pooling or ("cls" if class_token else "mean")
    if choice.layers == "last" or pooling not in ("mean", *(("cls",) if class_token else ())):
        choices = ["cls", "mean"] if class_token else ["mean"]
        got = f"@{choice.layers},pool={pooling}"
        expected = "@N,pool=POOLING; the output of the network has its own pooling" if choice.layers == "last" else None
        raise UsageError(explain(f"{request.name} has no such pooling", expected=expected, got=got, choices=choices))
    numbers = choice.numbers(request.name, len(blocks))
    module = BlockOutputs(network, blocks, numbers, replace(choice, pooling=pooling), special)
    settings = {**identity, "output": "outputs of blocks", "blocks": choice.layers, "pooling": pooling}
    try:
        return ImageEncoder(request, module, preprocessing, settings, numbers if choice.stacked else ())
    except (TypeError, RuntimeError) as error:  # blocks of a convolutional network, or of different widths
        problem = f"{request.name} is not a transformer with layers of one width"
        raise UsageError(explain(problem, got=f"@{choice.layers}", remedy="Remove the layers from the name")) from error
