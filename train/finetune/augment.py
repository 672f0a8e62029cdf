"""Changes of pictures and sound in training that leave a face a face and its expression what it is.

All pictures of one clip in one batch get the same change, so every window is consistent in itself, and frames that
windows share are still encoded once. What is drawn follows from the step and the clip alone: not from the order in
which clips are read, nor from how a batch is divided among processes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vaflow.train.loop import seed_from

FLIPPED = 0.5  # share of clips
SMALLEST_CROP = 0.9  # share of the edge: crops are tight around the face already
COLOUR = 0.2  # brightness, contrast and saturation are multiplied with 1 - COLOUR .. 1 + COLOUR
BANDS, FRAMES = 24, 100  # of log-Mel: the widest strips that are blanked, of 128 bands and of time (100: 1 s)


@dataclass(frozen=True)
class Augment:
    """The changes of one training step.

    Attributes:
        numbers: what randomness follows from: seed, epoch, step.
    """

    numbers: tuple[int, ...]

    def pictures(self, images: Tensor, clips: Tensor) -> Tensor:
        """[U, S, S, 3] uint8 and [U] the clip of each -> [U, S, S, 3] uint8."""
        changed = torch.empty_like(images)
        for clip in torch.unique(clips).tolist():
            own = clips == clip
            changed[own] = change_pictures(images[own], self._generator(0, clip))
        return changed

    def sounds(self, logmel: Tensor, units: Tensor) -> Tensor:
        """[U, frames, bands] and [U] which window each is -> the same, each with a strip of bands and of time blank."""
        return torch.stack(
            [change_sound(mel, self._generator(1, unit)) for mel, unit in zip(logmel, units.tolist(), strict=True)]
        )

    def _generator(self, *more: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(*self.numbers, *more))


def change_pictures(images: Tensor, generator: torch.Generator) -> Tensor:
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


def change_sound(logmel: Tensor, generator: torch.Generator) -> Tensor:
    """SpecAugment (Park et al. 2019, arXiv 1904.08779) without its warping; strips take the window's mean.

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
