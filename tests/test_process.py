"""Child processes, and the environment that a command starts in."""

import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from vaflow.device import choose_device
from vaflow.errors import UsageError
from vaflow.process import ChildProcess


def echo(pipe: Connection, greeting: str) -> None:
    pipe.send((greeting, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
    pipe.recv()


def test_a_child_ignores_signals_to_its_group_and_is_killed_by_its_parent() -> None:
    child = ChildProcess(echo, ("hello",), name="echo")
    assert child.pipe.recv() == ("hello", signal.SIG_IGN, signal.SIG_IGN)
    child.kill()
    assert child.ending == "signal SIGKILL"
    with pytest.raises(EOFError):
        child.pipe.recv()


def test_a_child_reports_its_result() -> None:
    child = ChildProcess(echo, ("hello",), name="echo")
    child.pipe.recv()
    child.pipe.send(None)
    child.join()
    assert child.ending == "exit code 0"


def test_a_child_exits_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, time
            from vaflow.process import ChildProcess
            def work(pipe):
                pipe.send(os.getpid())
                time.sleep(3600)
            if __name__ == "__main__":
                child = ChildProcess(work, name="sleeper")
                print(child.pipe.recv(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split():
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} outlived its parent")


@pytest.mark.parametrize("name", ["cuda:99", "cuda:-1", "gpu", "", "meta"])
def test_a_missing_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"device|GPU"):
        choose_device(name)
