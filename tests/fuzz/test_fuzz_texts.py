"""Every text, document or array is read or rejected with one message."""

from pathlib import Path

import pytest
from fuzz_texts import Family, families, outcome_of
from hypothesis import HealthCheck, given, settings

ORDINARY, LONG = 50, 2000
FAMILIES = families()


def assert_all_read_or_rejected(family: Family, folder: Path, count: int) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(family.examples)
    def every(example: object) -> None:
        outcome_of(family.read, folder, example)

    every()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_texts_are_read_or_rejected(name: str, tmp_path: Path) -> None:
    assert_all_read_or_rejected(FAMILIES[name], tmp_path / "case", ORDINARY)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_thousands_of_texts_are_read_or_rejected(name: str, tmp_path: Path) -> None:
    assert_all_read_or_rejected(FAMILIES[name], tmp_path / "case", LONG)
