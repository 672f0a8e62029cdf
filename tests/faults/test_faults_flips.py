"""Single flipped bits: a sample of those tested by `scripts/faults.py flips`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))

from flips import committed_files, every_flip, is_detected, tiny_cache

STEP = 211  # a prime, so that every bit position occurs


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_a_flipped_bit_is_detected_anywhere(tmp_path: Path, store: str) -> None:
    tried, lost = every_flip(tmp_path / "cache", store, step=STEP)
    bits = 8 * sum(file.stat().st_size for file in committed_files(tmp_path / "cache"))
    assert tried >= bits // STEP
    assert lost == []


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_an_intact_cache_has_no_problems(tmp_path: Path, store: str) -> None:
    assert not is_detected(tiny_cache(tmp_path / "cache", store))
