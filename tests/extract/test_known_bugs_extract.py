"""Regression tests for bugs of public code for this task, stage one; each asserts that its data would show the bug.

The data: a trial of a variable-frame-rate video; its crops and its annotation have gaps, and each of them says its own
number. The bugs of stage two are in `tests/train/test_known_bugs.py`.
"""

import numpy as np
import pytest
import torch
from coded_clips import NumberReader, label_of, numbers_of, uneven
from make_media import VideoTrack, draw_number, write_media
from PIL import Image

from vaflow.cache import Cache, open_cache
from vaflow.datasets import open_dataset
from vaflow.extract.config import ExtractConfig
from vaflow.extract.pipeline import extract_with

TIMES = np.array(uneven()) / 1000
FRAMES = len(TIMES)
NO_FACE = {2, 3, 4, 11, *range(20, 27)}  # frames without a crop
UNANNOTATED = {0, 1, 2, 15, FRAMES - 1}


class CountingReader(NumberReader):
    """Also records its input."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        bits = super().encode(images)
        self.shown += numbers_of(bits.numpy()).tolist()
        return bits


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, CountingReader]:
    root = tmp_path_factory.mktemp("bugs")
    (root / "raw_videos").mkdir()
    write_media(root / "raw_videos" / "talk.mp4", VideoTrack(tuple(np.rint(TIMES * 1000).astype(int))))
    crops = root / "cropped_aligned" / "talk"
    crops.mkdir(parents=True)
    for number in set(range(FRAMES)) - NO_FACE:
        Image.fromarray(draw_number(number, 112, 112)).save(crops / f"{number + 1:05d}.jpg", quality=95)
    labels = root / "VA_Set" / "Train_Set" / "talk.txt"
    labels.parent.mkdir(parents=True)
    rows = ["-5,-5" if k in UNANNOTATED else f"{label_of(k)},{-label_of(k)}" for k in range(FRAMES)]
    labels.write_text("\n".join(["valence,arousal", *rows]) + "\n")
    reader = CountingReader()
    config = ExtractConfig(
        visual=("numbers",), audio=(), window=2.0, stride=0.5, frames=20, device="cpu", workers=1, pixels=True
    )
    dataset = open_dataset(root, "affwild2")
    summary = extract_with(dataset, root / "cache", config, [reader], [], torch.device("cpu"))
    assert not summary.failures
    return open_cache(root / "cache"), reader


def test_bug_crops_read_by_position_instead_of_by_number(extracted: tuple[Cache, CountingReader]) -> None:
    """The k-th file is not frame k: after the first missing face, all later frames would be shifted."""
    visual = extracted[0].read("numbers", "talk")
    shown = numbers_of(visual.embedding)[visual.valid]
    np.testing.assert_array_equal(shown, visual.frame[visual.valid])
    by_position = np.array(sorted(set(range(FRAMES)) - NO_FACE))
    frames = visual.frame[visual.valid]
    frames = frames[frames < by_position.size]
    assert (by_position[frames] != frames).mean() > 0.5, "the bug would show here"


def test_bug_missing_faces_filled_with_black_and_no_mask(extracted: tuple[Cache, CountingReader]) -> None:
    cache, reader = extracted
    visual, pixels = cache.read("numbers", "talk"), cache.read("pixels", "talk")
    missing = np.isin(visual.frame, list(NO_FACE))
    assert missing.sum() >= 3, "the bug would show here"
    np.testing.assert_array_equal(visual.valid, ~missing)
    np.testing.assert_array_equal(pixels.valid, ~missing)
    assert all(pixels.images[k] == b"" for k in np.flatnonzero(missing))
    valid_count = int(visual.valid.sum())
    assert reader.shown[:valid_count] == visual.frame[visual.valid].tolist(), "a placeholder image was encoded"
    assert not any(reader.shown[valid_count:]), "padding rows of the last batch must be zeros and dropped"


def test_bug_frames_without_a_crop_dropped_from_the_labels(extracted: tuple[Cache, CountingReader]) -> None:
    labels = extracted[0].read("labels", "talk")
    assert len(labels.time) == FRAMES
    annotated = set(np.flatnonzero(labels.valid.all(1)).tolist())
    assert annotated == set(range(FRAMES)) - UNANNOTATED
    assert annotated & NO_FACE, "the bug would show here"


def test_bug_minus_five_kept_as_a_label(extracted: tuple[Cache, CountingReader]) -> None:
    labels = extracted[0].read("labels", "talk")
    for k in UNANNOTATED:
        assert not labels.valid[k].any() and np.isnan(labels.value[k]).all()
    assert np.nanmin(labels.value) >= -1


def test_bug_index_over_rate_on_a_variable_frame_rate(extracted: tuple[Cache, CountingReader]) -> None:
    cache, _ = extracted
    visual, labels = cache.read("numbers", "talk"), cache.read("labels", "talk")
    nearest = np.abs(TIMES[:, None] - visual.time).argmin(0)
    np.testing.assert_array_equal(visual.frame, nearest)
    np.testing.assert_allclose(labels.time, TIMES, atol=1e-3)
    rate = (FRAMES - 1) / (TIMES[-1] - TIMES[0])
    by_rate = np.clip(np.rint(visual.time * rate), 0, FRAMES - 1).astype(int)
    assert (by_rate != nearest).mean() > 0.5, "the bug would show here"


def test_bug_the_tail_of_a_video_dropped(extracted: tuple[Cache, CountingReader]) -> None:
    """Windows of 2 s with stride 0.5 s do not end with the clip; the rest must be sampled."""
    visual = extracted[0].read("numbers", "talk")
    duration = extracted[0].meta("talk")["duration"]
    assert 0 < duration - visual.time[-1] <= 0.1 + 1e-9
    whole_windows = 2.0 + 0.5 * np.floor((duration - 2.0) / 0.5)
    assert visual.time[-1] >= whole_windows, "the bug would show here"
