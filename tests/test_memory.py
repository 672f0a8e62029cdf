"""Memory of a process that trains."""

import platform
import resource

import pytest
import torch

from vaflow.device import keep_memory

BYTES, AT_ONCE, REPEATS, ROUNDS = 16 * 2**20, 4, 5, 5


def cleared_pages() -> int:
    """Pages that the system gives to this process while four tensors of 16 MB are made and freed repeatedly."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(REPEATS):
        [torch.ones(BYTES // 4) for _ in range(AT_ONCE)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set for glibc")
def test_freed_memory_is_used_again():
    keep_memory()
    pages = REPEATS * AT_ONCE * BYTES // resource.getpagesize()
    # The fewest of several rounds: the system may take memory back in between, and other threads get pages, too.
    assert min(cleared_pages() for _ in range(ROUNDS)) < pages / 10
