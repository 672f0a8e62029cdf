"""Commands killed at random times: committed work stays, and the next run completes it."""

from pathlib import Path

import pytest
from kills import Tally, Target, campaign, conversion, extraction, merging, split_cache, training
from lab import Lab

KILLS = 2  # here; `scripts/faults.py` does 30 of each


def assert_clean(lab: Lab, target: Target, folder: Path, seed: int) -> None:
    tally = campaign(lab, target, folder, KILLS, seed)
    assert tally.clean, tally
    assert tally.kills >= KILLS


def test_extraction_resumes_after_random_kills(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    assert_clean(lab, extraction(media, whole), tmp_path, seed=1)


@pytest.mark.parametrize("store", ["zarr", pytest.param("hdf5", marks=pytest.mark.slow)])
def test_conversion_resumes_after_random_kills(lab: Lab, toys: Path, tmp_path: Path, store: str) -> None:
    assert_clean(lab, conversion(toys, store), tmp_path, seed=2)


def test_merge_resumes_after_random_kills(lab: Lab, toys: Path, tmp_path: Path) -> None:
    assert_clean(lab, merging(split_cache(toys, tmp_path), toys), tmp_path, seed=3)


def test_training_killed_at_random_moments_gives_the_same_weights(
    lab: Lab, toys: Path, whole_run: Path, tmp_path: Path
) -> None:
    assert_clean(lab, training(toys, whole_run), tmp_path, seed=4)


def test_the_item_count_detects_lost_items(lab: Lab, toys: Path, tmp_path: Path) -> None:
    """A conversion that restarts from scratch every time would be counted."""
    honest = conversion(toys, "zarr")
    serial = iter(range(1000))
    forgetful = Target(honest.name, honest.args, lambda out: {"item": next(serial)}, honest.check)
    tally: Tally = campaign(lab, forgetful, tmp_path, 1, seed=5)
    assert tally.redone > 0
    assert not tally.clean
