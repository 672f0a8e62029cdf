"""Memory of a process that trains."""

import platform
import resource

import pytest
import torch

from vaflow.device import keep_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set for glibc")
def test_freed_memory_is_used_again():
    keep_memory()
    torch.ones(4 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4 * 2**20)  # 16 MB
    pages = 20 * 16 * 2**20 // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10
