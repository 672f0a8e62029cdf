"""Clock jumps, concurrent writers, killed workers and lack of memory."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kills import SMALL, assert_same_run
from lab import EXTRACT, TWO_WORKERS, Lab, assert_printed, assert_same_cache, attempts, children_of, until

from vaflow.cache import open_cache
from vaflow.cache.maintenance import leftovers, verify

YEAR = 365 * 86400
JUMPS = f"from strikes import *; jump_clock({YEAR}); jump_file_times({YEAR})"


def test_extraction_tolerates_clock_jumps(lab: Lab, media: Path, whole: Path, tmp_path: Path) -> None:
    """Wall clock and file times jump by a year; killed and resumed in between."""
    out = tmp_path / "cache"
    args = ["extract", media, "--out", out, *EXTRACT]
    process = lab.start(args, JUMPS)
    until(process, lambda: len(attempts(out)) > 3)
    process.send(signal.SIGKILL)
    process.wait()
    kept = attempts(out)
    assert_printed(lab.run(args, JUMPS), 0)
    assert kept.items() <= attempts(out).items()
    assert_same_cache(out, whole)


def test_training_tolerates_clock_jumps(lab: Lab, toys: Path, whole_run: Path, tmp_path: Path) -> None:
    """Two processes with one seed write the same files, whatever the time."""
    assert_printed(lab.run(["train", toys, "--out", tmp_path / "jumping", *SMALL], JUMPS), 0)
    assert_same_run(tmp_path / "jumping", whole_run)


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
    args = ["extract", media, "--out", out, *TWO_WORKERS]
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


def out_of_memory(calls: range) -> str:
    """Code that makes these calls of the image encoder fail, by each kind of error in turn."""
    kinds = list(OUT_OF_MEMORY.values())
    strikes = [
        f"strike('vaflow.encoders.clip.ClipEncoder.encode', {call}, {kinds[number % len(kinds)]})"
        for number, call in enumerate(calls)
    ]
    return "\n".join(["import torch", "from strikes import *", *strikes])


def test_encoder_out_of_memory_is_reported(lab: Lab, media: Path, tmp_path: Path) -> None:
    """Every batch fails, the last one of a single row: no clip can be encoded."""
    out = tmp_path / "cache"
    always = out_of_memory(range(2, 41))  # the constructor encodes once
    process = lab.start(["extract", media, "--out", out, *EXTRACT], always)
    assert_printed(process.wait(), 1, "batches of 2", "batches of 1", "memory for a batch of one row")
    assert process.orphans() == []
    assert verify(open_cache(out)) == []
    assert open_cache(out).streams() == {}, "streams without clips are removed"


def test_an_out_of_memory_batch_is_split(lab: Lab, media: Path, tmp_path: Path) -> None:
    """Half the batch is tried after each kind of error, until it fits in memory, and the run continues."""
    out = tmp_path / "cache"
    ended = lab.run(["extract", media, "--out", out, *EXTRACT, "--image-batch", "8"], out_of_memory(range(2, 5)))
    assert_printed(ended, 0, *(f"using batches of {size}" for size in (4, 2, 1)))
    assert verify(open_cache(out)) == []


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_training_out_of_memory_is_reported(lab: Lab, toys: Path, tmp_path: Path, kind: str) -> None:
    fault = f"strike('vaflow.train.training_loop.train_step', 9, {OUT_OF_MEMORY[kind]})"
    ended = lab.run(["train", toys, "--out", tmp_path / "run", *SMALL], f"import torch\nfrom strikes import *\n{fault}")
    assert_printed(ended, 1, "memory", "--batch-size")
