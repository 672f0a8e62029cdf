"""Augmentation of face images and log-Mel that keeps the expression.

All images of one clip in one batch get the same change: each window stays consistent, and frames that windows share are
still encoded once. The random numbers depend on the step and the clip only, not on the reading order or on the number
of processes.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import torch
from torch import Tensor

from vaflow.train.loop import seed_from

THREADS = min(8, cpu_count() or 1)
FLIPPED = 0.5  # share of clips
SMALLEST_CROP = 0.9  # fraction of the edge; the crops are already tight around the face
COLOUR = 0.2  # brightness, contrast and saturation are multiplied by 1 - COLOUR .. 1 + COLOUR
BANDS, FRAMES = 24, 100  # widest log-Mel strips that are masked: of 128 bands, of time (100 frames: 1 s)


@dataclass(frozen=True)
class Augment:
    """Augmentation of one training step.

    Attributes:
        numbers: seed, epoch and step, which seed the random numbers.
    """

    numbers: tuple[int, ...]

    def images(self, images: Tensor, clips: Tensor) -> Tensor:
        """Augment images [U, S, S, 3] uint8 of the clips [U]; same shape."""
        changed = torch.empty_like(images)

        def augment_clip(clip: int) -> None:
            of_clip = clips == clip
            changed[of_clip] = augment_images(images[of_clip], self._generator(0, clip))

        with ThreadPoolExecutor(THREADS) as pool:  # torch's operators release the interpreter lock
            list(pool.map(augment_clip, torch.unique(clips).tolist()))
        return changed

    def logmel(self, logmel: Tensor, units: Tensor) -> Tensor:
        """Mask a strip of bands and a strip of time in each window [U, frames, bands] of the units [U]; same shape."""
        generators = [self._generator(1, unit) for unit in units.tolist()]
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(augment_logmel, logmel, generators)))

    def _generator(self, *more: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(*self.numbers, *more))


def augment_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply the same flip, crop and colours to all images of a clip.

    Args:
        images: [U, S, S, 3] uint8.
        generator: source of the random numbers.

    Returns:
        [U, S, S, 3] uint8.
    """
    from torchvision.transforms.v2 import functional

    draw = torch.rand(7, generator=generator).tolist()
    edge = images.shape[1]
    size = round(edge * (SMALLEST_CROP + (1 - SMALLEST_CROP) * draw[1]))
    top, left = (round((edge - size) * share) for share in draw[2:4])
    channels = images.permute(0, 3, 1, 2)
    if draw[0] < FLIPPED:
        channels = functional.horizontal_flip(channels)
    channels = functional.resized_crop(channels, top, left, size, size, [edge, edge], antialias=True)
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for change, share in zip(changes, draw[4:], strict=True):
        channels = change(channels, 1 + COLOUR * (2 * share - 1))
    return channels.permute(0, 2, 3, 1)


def augment_logmel(logmel: Tensor, generator: torch.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019, arXiv 1904.08779) without time warping; masked strips take the window's mean.

    Args:
        logmel: [frames, bands].
        generator: source of the random numbers.

    Returns:
        [frames, bands].
    """
    draw = torch.rand(4, generator=generator).tolist()
    changed, mean = logmel.clone(), logmel.mean()
    frames, bands = logmel.shape
    width, length = int(draw[0] * (min(BANDS, bands) + 1)), int(draw[1] * (min(FRAMES, frames) + 1))
    low, begin = int(draw[2] * (bands - width + 1)), int(draw[3] * (frames - length + 1))
    changed[:, low : low + width] = mean
    changed[begin : begin + length] = mean
    return changed
