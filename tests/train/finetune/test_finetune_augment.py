"""Augmentation: constant within a clip, bounded changes."""

import numpy as np
import pytest
import torch

from vaflow.train.finetune import backbones as augment
from vaflow.train.finetune.backbones import (
    BANDS,
    COLOUR,
    FRAMES,
    SMALLEST_CROP,
    Augment,
    augment_images,
    augment_logmel,
)

EDGE = 32


def random_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, EDGE, EDGE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_frames_of_one_clip_share_their_augmentation() -> None:
    images = random_images(1).expand(6, -1, -1, -1)
    changed = Augment((0, 0, 0)).images(images, torch.tensor([4, 4, 9, 4, 9, 7]))
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[3])
    assert torch.equal(changed[2], changed[4])
    assert len({changed[k].numpy().tobytes() for k in (0, 2, 5)}) == 3


def test_augmentation_depends_on_step_and_clip_only() -> None:
    images = random_images(4)
    clips = torch.tensor([0, 1, 2, 3])
    whole = Augment((0, 1, 2)).images(images, clips)
    order = torch.tensor([2, 0, 3])
    assert torch.equal(Augment((0, 1, 2)).images(images[order], clips[order]), whole[order])
    assert not torch.equal(Augment((0, 1, 3)).images(images, clips), whole)


def test_augmentation_without_colour_is_a_flipped_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of its own coordinates shows the origin of every pixel."""
    monkeypatch.setattr(augment, "COLOUR", 0.0)
    ramp = torch.arange(EDGE, dtype=torch.float32) * 255 / (EDGE - 1)
    across, down = ramp.expand(EDGE, EDGE), ramp[:, None].expand(EDGE, EDGE)
    image = torch.stack([across, down, torch.zeros(EDGE, EDGE)], dim=-1).round().to(torch.uint8)[None]
    flips = 0
    for seed in range(60):
        changed = augment_images(image, torch.Generator().manual_seed(seed))[0].double().numpy()
        x, y = changed[..., 0].mean(axis=0), changed[..., 1].mean(axis=1)
        flipped = x[-1] < x[0]
        flips += flipped
        for axis in (x[::-1] if flipped else x, y):
            scale = (axis[-1] - axis[0]) / 255
            assert SMALLEST_CROP - 0.06 < scale < 1.02
            straight = np.linspace(axis[0], axis[-1], EDGE)
            assert np.abs(axis - straight).max() < 6  # neither bent nor turned
    assert 15 < flips < 45


def test_colour_changes_stay_within_their_limits() -> None:
    grey = torch.full((1, EDGE, EDGE, 3), 100, dtype=torch.uint8)
    means = [float(augment_images(grey, torch.Generator().manual_seed(k)).double().mean()) for k in range(40)]
    assert min(means) >= 100 * (1 - COLOUR) - 1
    assert max(means) <= 100 * (1 + COLOUR) + 1
    assert max(means) - min(means) > 20


def test_audio_augmentation_masks_one_band_and_one_span() -> None:
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(398, 128, generator=generator)
    widths, lengths = [], []
    for _ in range(50):
        changed = augment_logmel(mel, generator)
        blank = changed != mel
        bands, frames = blank.all(dim=0), blank.all(dim=1)
        assert torch.equal(blank, bands[None, :] | frames[:, None])
        torch.testing.assert_close(changed[blank], mel.mean().expand(int(blank.sum())))
        for strip in (bands, frames):
            masked = strip.nonzero().flatten()
            assert len(masked) == 0 or masked[-1] - masked[0] + 1 == len(masked)
        widths.append(int(bands.sum()))
        lengths.append(int(frames.sum()))
    assert max(widths) <= BANDS
    assert max(lengths) <= FRAMES
    assert max(widths) > BANDS / 2
    assert max(lengths) > FRAMES / 2


def test_every_audio_window_has_its_own_masks() -> None:
    mel = torch.randn(1, 398, 128, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    changed = Augment((0, 0, 0)).logmel(mel, torch.tensor([3, 5]))
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(changed[1], Augment((0, 0, 0)).logmel(mel[:1], torch.tensor([5]))[0])
