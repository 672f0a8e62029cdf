"""Speed of two processes with --shard against one process, each on its own core.

`--shard` has nothing that processes share but the folder of the cache. So one process on one core is compared with two
on two: twice as fast is all there is to gain.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from vaflow.errors import VaflowError


def scaling(data: Path, folder: Path) -> float:
    """Speed-up of two processes over one.

    Raises:
        VaflowError: there are not two cores to be had, or a process failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise VaflowError("Two processes need two cores")
    alone = _seconds(data, folder / "one.cache", cores[:1])
    return alone / _seconds(data, folder / "two.cache", cores[:2])


def _seconds(data: Path, cache: Path, cores: list[int]) -> float:
    """Of the slowest of as many processes as there are cores; their start is part of it, as for anyone."""
    command = [sys.executable, "-m", "vaflow", "extract", str(data), "--out", str(cache)]
    command += ["--visual", "clip-tiny", "--audio", "ast-tiny", "--faces", "none", "--workers", "1", "--quiet"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    processes = [
        subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command, "--shard", f"{part}/{len(cores)}"],
            env=quiet,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part, core in enumerate(cores, 1)
    ]
    for process in processes:
        _, stderr = process.communicate()
        if process.returncode:
            raise VaflowError(f"A process ended with {process.returncode}: {stderr}")
    return time.perf_counter() - began
