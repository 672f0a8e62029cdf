"""An encoder that several tests of faces share: building it is the slow part."""

import pytest
import torch

from vaflow.encoders import build_encoder


@pytest.fixture(scope="session")
def tiny_clip() -> object:
    """The seeded CLIP, on the CPU with one thread: decoding processes need the other cores."""
    torch.set_num_threads(1)
    return build_encoder("clip-tiny")
