"""Clock jumps, concurrent writers, killed workers and lack of memory."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kills import SMALL, assert_same_run
from lab import EXTRACT, Lab, assert_printed, assert_same_cache, attempts, children_of, until

from vaflow.cache import open_cache
from vaflow.cache.verify import leftovers, verify

YEAR = 365 * 86400
JUMPS = f"from strikes import *; jump_clock({YEAR}); jump_file_times({YEAR})"


def test_extraction_tolerates_clock_jumps(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    """Wall clock and file times jump by a year; killed and resumed in between."""
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    process = lab.start(args, JUMPS)
    until(process, lambda: len(attempts(out)) > 6)
    process.send(signal.SIGKILL)
    process.wait()
    kept = attempts(out)
    assert_printed(lab.run(args, JUMPS), 0)
    assert kept.items() <= attempts(out).items()
    assert_same_cache(out, whole)


def test_training_tolerates_clock_jumps(lab: Lab, toys: Path, tmp_path: Path) -> None:
    assert_printed(lab.run(["train", toys, "--out", tmp_path / "plain", *SMALL]), 0)
    assert_printed(lab.run(["train", toys, "--out", tmp_path / "jumping", *SMALL], JUMPS), 0)
    assert_same_run(tmp_path / "jumping", tmp_path / "plain")


def test_two_runs_with_one_seed_write_identical_files(lab: Lab, toys: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert_printed(lab.run(["train", toys, "--out", tmp_path / name, *SMALL, "--seed", "7"]), 0)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_index_detects_changes_when_the_clock_goes_back(toys: Path, tmp_path: Path) -> None:
    """An open cache sees commits for any modification times of the record directories."""
    subprocess.run(["cp", "-a", toys, tmp_path / "cache"], check=True)
    cache = open_cache(tmp_path / "cache", writable=True)
    folder = cache.path / "records" / "labels"
    items = cache.items()
    for age in (YEAR, -YEAR, 0):
        cache.refresh_index()
        record, arrays = cache.committed("labels", items[0])
        cache.drop("labels", items[0])
        os.utime(folder, (time.time() - age, time.time() - age))
        assert open_cache(cache.path).items() == items[1:]
        cache.adopt(record, arrays)
        os.utime(folder, (time.time() - age - 1, time.time() - age - 1))
        assert open_cache(cache.path).items() == items


def test_two_concurrent_extractions_share_a_cache(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    both = [lab.start(args), lab.start(args)]
    for process in both:
        assert_printed(process.wait(), 0)
    assert_same_cache(out, whole)
    assert leftovers(open_cache(out)) == []


def test_clips_of_killed_workers_are_listed_as_failed(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    process = lab.start(args)

    def workers() -> list[int]:
        """Without the process that tracks multiprocessing's resources, which starts first."""
        commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children_of(process.pid)}
        return [child for child, command in commands.items() if b"spawn_main" in command]

    until(process, lambda: bool(workers()))
    victims = workers()
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    ended = process.wait()
    assert_printed(ended, 3, "SIGKILL", "failures.jsonl")
    listed = (out / "failures.jsonl").read_text().splitlines()
    assert 1 <= len(listed) <= len(victims)
    assert all("WorkerDied" in line for line in listed)
    assert verify(open_cache(out)) == []
    assert len(open_cache(out).items()) == len(open_cache(whole).items()) - len(listed)
    assert_printed(lab.run(args), 0)
    assert_same_cache(out, whole)


OUT_OF_MEMORY = {
    "GPU": "fail, torch.OutOfMemoryError, 'CUDA out of memory. Tried to allocate 20.00 MiB'",
    "CPU": "torch.empty, 1 << 46",
    "Python": "fail, MemoryError",
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_encoder_out_of_memory_is_reported(lab: Lab, media: Path, tmp_path: Path, kind: str) -> None:
    """Every batch fails: no clip can be encoded."""
    out = tmp_path / "cache"
    always = "\n".join(
        f"strike('vaflow.encoders.clip.ClipEncoder.encode', {n}, {OUT_OF_MEMORY[kind]})"
        for n in range(2, 40)  # the constructor encodes once
    )
    process = lab.start(["extract", media, "--out", out, *EXTRACT], f"import torch\nfrom strikes import *\n{always}")
    assert_printed(process.wait(), 1, "memory")
    assert process.orphans() == []
    assert verify(open_cache(out)) == []
    assert open_cache(out).items(stream="clip-tiny") == []


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_one_out_of_memory_batch_is_split(lab: Lab, media: Path, tmp_path: Path, kind: str) -> None:
    """Half the batch fits in memory, and the run continues."""
    out = tmp_path / "cache"
    fault = f"strike('vaflow.encoders.clip.ClipEncoder.encode', 2, {OUT_OF_MEMORY[kind]})"
    ended = lab.run(["extract", media, "--out", out, *EXTRACT], f"import torch\nfrom strikes import *\n{fault}")
    assert_printed(ended, 0, "using batches of 2")
    assert verify(open_cache(out)) == []


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_training_out_of_memory_is_reported(lab: Lab, toys: Path, tmp_path: Path, kind: str) -> None:
    fault = f"strike('vaflow.train.loop.train_step', 9, {OUT_OF_MEMORY[kind]})"
    ended = lab.run(["train", toys, "--out", tmp_path / "run", *SMALL], f"import torch\nfrom strikes import *\n{fault}")
    assert_printed(ended, 1, "memory", "--batch-size")
