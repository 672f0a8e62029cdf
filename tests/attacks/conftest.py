"""Fixtures of the attack tests: commands are forked from one process that has imported everything."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for name in ("faults", "train", "datasets"):
    sys.path.insert(0, str(Path(__file__).parents[1] / name))

from lab import Lab, lab_in  # noqa: E402


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One process that forks commands, for the whole session."""
    with lab_in(tmp_path_factory.mktemp("lab")) as lab:
        yield lab
