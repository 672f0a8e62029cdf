"""Concurrent and killed writers: committed items are complete, uncommitted ones do not exist."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cache_toys import arrays, assert_same, stream

from vaflow.cache import create_cache, open_cache
from vaflow.cache.maintenance import leftovers, verify
from vaflow.cache.schema import StoreName
from vaflow.cache.stores import STORES

KILLS = 6  # per store
WRITER = """
import sys, time
from pathlib import Path
from cache_toys import arrays, stream
from vaflow.cache import create_cache
path, store, seed, rounds, gate = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.001)
cache = create_cache(path, store=store)
info = stream("visual")
cache.declare(info)
for number in range(rounds):
    made = arrays(info, 4, seed=seed + number)
    record = cache.write("visual", f"item{number % 20}", made, source={"seed": seed + number})
    print(number, record.attempt, record.source["seed"], flush=True)
"""


def start(path: Path, store: str, *, seed: int, rounds: int, gate: Path) -> subprocess.Popen[str]:
    """A writer process that waits for the file `gate`."""
    folders = [str(Path(__file__).parent), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), store, str(seed), str(rounds), str(gate)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )


def assert_whole(path: Path) -> set[str]:
    """Assert that every item equals one writer's arrays; return the items."""
    cache = open_cache(path)
    assert verify(cache) == []
    items = {record.stem for record in (path / "records" / "visual").glob("item*.json")}
    for item in items:
        seed = cache.record("visual", item).source["seed"]
        assert_same(dict(cache.read("visual", item).arrays), arrays(stream("visual"), 4, seed=seed))
    return items


def test_two_writers_of_the_same_items_both_finish(tmp_path, store):
    path, gate = tmp_path / "cache", tmp_path / "go"
    writers = [start(path, store, seed=seed, rounds=20, gate=gate) for seed in (1000, 2000)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    gate.touch()
    stdout_lines = [writer.communicate(timeout=60)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert assert_whole(path) == {f"item{number}" for number in range(20)}
    assert leftovers(open_cache(path)) == []
    cache = open_cache(path)
    outcomes: dict[str, set[str]] = {}
    for lines in stdout_lines:
        assert len(lines) == 20
        for number, attempt, _ in map(str.split, lines):
            outcomes.setdefault(f"item{number}", set()).add(attempt)
    for item, attempts in outcomes.items():  # the final record was reported as committed to one writer
        assert cache.record("visual", item).attempt in attempts


def test_the_first_of_two_first_commits_wins(tmp_path, store: StoreName, monkeypatch):
    """Commit from a second writer between this writer's arrays and its record."""
    path = tmp_path / "cache"
    mine, other = create_cache(path, store=store), create_cache(path, store=store)
    info = stream("visual")
    mine.declare(info)
    inner = type(STORES[store]).write_attempt
    raced: list[str] = []

    def write_then_lose(self, folder, attempt, given):
        names = inner(self, folder, attempt, given)
        if not raced:
            raced.append(attempt)
            raced.append(other.write("visual", "clip", arrays(info, 4, seed=2)).attempt)
        return names

    monkeypatch.setattr(type(STORES[store]), "write_attempt", write_then_lose)
    record = mine.write("visual", "clip", arrays(info, 4, seed=1))
    assert record.attempt == raced[1]
    assert leftovers(mine) == []
    assert_same(dict(mine.read("visual", "clip").arrays), arrays(info, 4, seed=2))
    assert verify(mine) == []


def test_an_interrupt_after_the_commit_keeps_the_arrays(tmp_path, store, monkeypatch):
    path = tmp_path / "cache"
    cache = create_cache(path, store=store)
    info = stream("visual")
    cache.declare(info)
    real = os.link

    def link_then_interrupt(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", link_then_interrupt)
        cache.write("visual", "clip", arrays(info))
    assert_same(dict(cache.read("visual", "clip").arrays), arrays(info))
    assert verify(cache) == []


def kill_at_random(process: subprocess.Popen[str], rng: random.Random) -> list[str]:
    """Kill the writer after a short time; return its output lines."""
    assert process.stdout is not None
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stdout or []))
    reading.start()
    while len(lines) < 2 and process.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.25))
    process.send_signal(signal.SIGKILL)
    process.wait()
    reading.join()
    process.stdout.close()
    return [line for line in lines if line.endswith("\n") and line != "ready\n"]


def test_items_committed_before_a_kill_are_complete(tmp_path, store):
    """Write 20 items, then replace them; kill at random times."""
    path, gate = tmp_path / "cache", tmp_path / "go"
    gate.touch()
    rng = random.Random(store)
    committed: dict[str, int] = {}
    for kill in range(KILLS):
        process = start(path, store, seed=100_000 * (kill + 1), rounds=100_000, gate=gate)
        for line in kill_at_random(process, rng):
            number, _, seed = line.split()
            committed[f"item{int(number) % 20}"] = int(seed)
        items = assert_whole(path)
        assert items >= committed.keys()
        cache = open_cache(path)
        for item, known in committed.items():  # at most one write is committed but not yet printed
            assert cache.record("visual", item).source["seed"] >= known
    assert len(committed) > 1
    # Per kill: one attempt, the attempt it replaced, one temporary file.
    assert len(leftovers(open_cache(path))) <= 3 * KILLS


def test_everything_is_flushed_before_the_record_appears(tmp_path, store, monkeypatch):
    """Flush files, then directories, then the record, then its directory."""
    path = tmp_path / "cache"
    cache = create_cache(path, store=store)
    info = stream("visual")
    cache.declare(info)
    steps: list[tuple[str, Path]] = []
    real_link = os.link

    def note_flush(handle: int) -> None:
        steps.append(("flush", Path(f"/proc/self/fd/{handle}").readlink()))

    def note_link(source: Path, target: Path) -> None:
        steps.append(("link", Path(target)))
        real_link(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "link", note_link)
    record = cache.write("visual", "clip", arrays(info))
    record_path = cache.layout.record("visual", "clip")
    created = steps.index(("link", record_path))
    folder = cache.layout.item("visual", "clip")
    expected = {folder / name for name in record.files}
    expected |= {parent for name in expected for parent in name.parents if parent.is_relative_to(path / "visual")}
    flushed = [path_written for _, path_written in steps[:created]]
    assert expected <= set(flushed)
    last_file = max(flushed.index(folder / name) for name in record.files)
    for parent in {parent for name in record.files for parent in (folder / name).parents} & expected:
        assert last_file < len(flushed) - 1 - flushed[::-1].index(parent)  # folders after files
    assert flushed[-1].name.startswith(".tmp-")
    assert flushed[-1].parent == record_path.parent
    assert ("flush", record_path.parent) in steps[created:]


def test_threads_can_share_a_cache(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    info = stream("visual")
    cache.declare(info)
    work = [
        threading.Thread(
            target=lambda n=n: [cache.write("visual", f"{n}-{k}", arrays(info, 4, seed=k)) for k in range(5)]
        )
        for n in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert verify(cache) == []
    for n in range(4):
        for k in range(5):
            np.testing.assert_array_equal(
                cache.read("visual", f"{n}-{k}").embedding, arrays(info, 4, seed=k)["embedding"]
            )
