"""Fixtures of GPU tests. Without a GPU they are skipped; VAFLOW_TEST_GPU=cpu runs them on the CPU."""

import os
from pathlib import Path

import pytest
import torch
from affwild2_tree import build_affwild2


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device."""
    name = os.environ.get("VAFLOW_TEST_GPU", "cuda")
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return name


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Aff-Wild2 tree with crops, so that no face is detected."""
    return build_affwild2(tmp_path_factory.mktemp("gpu")).root
