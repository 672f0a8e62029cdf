"""Run commands as real processes for fault injection; used by tests and `scripts/faults.py`."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaflow.cache import Cache, open_cache
from vaflow.cache.maintenance import verify

HERE = Path(__file__).parent
TINY = ["--visual", "clip-tiny", "--audio", "vggish-tiny", "--device", "cpu", "--faces", "none"]
SHORT = ["--window", "2", "--stride", "1", "--frames", "2", "--audio-steps", "4", "--image-batch", "4"]
EXTRACT = [*TINY, *SHORT, "--workers", "1"]
TWO_WORKERS = [*TINY, *SHORT, "--workers", "2"]
LIMIT = 120.0  # seconds after which a command hangs


@dataclass
class Ended:
    """Result of a command: exit code (negative: the signal that killed it) and its output."""

    code: int
    out: str
    err: str


class Process:
    """A running command in its own session."""

    def __init__(self, lab: "Lab", pid: int, out: Path, err: Path) -> None:
        self._lab, self.pid, self._out, self._err = lab, pid, out, err
        self._handle = os.pidfd_open(pid)  # readable when the command has ended: waiting costs no processor time
        self.code: int | None = None

    def running(self, wait: float = 0.0) -> bool:
        """Whether the command is still running, after at most `wait` seconds."""
        if self.code is None and select.select([self._handle], [], [], wait)[0]:
            self.code = self._lab.ask({"reap": self.pid})["code"]
            os.close(self._handle)
        return self.code is None

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the command, or to its session as a terminal does."""
        if self.running():
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for the command; kill it and raise if it exceeds the time limit."""
        if self.running(limit):
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"hangs: {self._err.read_text()[-2000:]}")
        assert self.code is not None
        return Ended(self.code, self._out.read_text(), self._err.read_text())

    def orphans(self, patience: float = 10.0) -> list[int]:
        """Processes of the session that remain some time after the command ended."""
        deadline = time.monotonic() + patience
        while (left := _session(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


def _session(leader: int) -> list[int]:
    """Living processes of a session, from /proc."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_end = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, session = name_end[2].split()[:4]
        if int(session) == leader and state != "Z":
            pids.append(int(stat.parent.name))
    return pids


def children_of(pid: int) -> list[int]:
    """Child processes of a command."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread or process has just ended
            for child in (task / "children").read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"spawn_main" in command:
                    pids.append(int(child))
    return pids


class Lab:
    """Start commands by forking a process that has imported everything (see `zygote.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0  # commands started
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._zygote = subprocess.Popen([sys.executable, str(HERE / "zygote.py")], env=env, **pipes)
        self._answer()

    def close(self) -> None:
        """Stop the forking process."""
        self._zygote.communicate()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the forking process."""
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._zygote.stdout is not None
        line = self._zygote.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, args: Sequence[object], before: str = "") -> Process:
        """Start `vaflow ARGS`, after the Python code `before` ran in its process."""
        self.started += 1
        out, err = (self.folder / f"{self.started}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch()
        job = {"args": [str(arg) for arg in args], "before": before, "out": str(out), "err": str(err)}
        return Process(self, self.ask({"run": job})["pid"], out, err)

    def run(self, args: Sequence[object], before: str = "") -> Ended:
        """Run a command and wait for it."""
        return self.start(args, before).wait()


@contextmanager
def lab_in(folder: Path) -> Iterator[Lab]:
    """Yield a lab and close it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder)
    try:
        yield lab
    finally:
        lab.close()


# Assertions


def attempts(cache: Path) -> dict[str, str]:
    """Record file -> attempt, of all committed items."""
    return {
        str(path.relative_to(cache)): json.loads(path.read_text())["attempt"]
        for path in cache.glob("records/*/*.json")
        if not path.name.startswith(".")
    }


def assert_same_cache(one: Path, other: Path) -> None:
    """Assert that both caches are complete and have equal streams, items, arrays and facts."""
    first, second = open_cache(one), open_cache(other)
    assert verify(first) == []
    assert verify(second) == []
    assert first.streams() == second.streams()
    assert _names(first) == _names(second)
    for stream, item in _names(first):
        a, b = first.read(stream, item), second.read(stream, item)
        assert dict(a.meta) == dict(b.meta), f"{stream}, {item}: {dict(a.meta)} is not {dict(b.meta)}"
        assert a.arrays.keys() == b.arrays.keys()
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[name], err_msg=f"{stream} {item} {name}", strict=True)


def _names(cache: Cache) -> list[tuple[str, str]]:
    return sorted((stream, item) for stream in cache.streams() for item in cache.items(stream=stream))


def assert_printed(ended: Ended, code: int, *words: str) -> None:
    """Assert the exit code, a message with these words, and no traceback."""
    assert ended.code == code, f"exit code {ended.code}, not {code}: {ended.err[-3000:]}"
    assert "Traceback" not in ended.err, ended.err[-3000:]
    for word in words:
        assert word in ended.err, f"{word!r} is not in: {ended.err[-3000:]}"


def until(process: Process, condition: Callable[[], bool], limit: float = LIMIT) -> None:
    """Wait for a condition; raise if the command ends first."""
    deadline = time.monotonic() + limit
    while not condition():
        assert process.running(), f"it ended before that: {process.wait()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
