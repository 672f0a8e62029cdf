"""Commands in restricted environments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab

from vaflow.cli import main

TINY = ["--visual", "clip-tiny", "--audio", "none", "--faces", "none", "--device", "cpu", "--workers", "1"]
SMALL = ["--epochs", "1", "--set", "hidden=8", "--set", "val_split=train", "--audio", "none", "--device", "cpu"]

# torch asks the passwd database for the user's name, which fails in a container started with `--user 54321`.
WITHOUT_PASSWD_ENTRY = """
import pwd, sys
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from vaflow.cli import main
if __name__ == "__main__":
    then = sys.argv.index("then")
    sys.exit(main(sys.argv[1:then]) or main(sys.argv[then + 1 :]))
"""

STREAMS = [(0, "stdin"), (1, "stdout"), (2, "stderr")]
# A command started with `2>&-` finds this file number closed and `sys.stderr` None.
CLOSED = """
import os, sys
for number, name in {}:
    os.close(number)
    setattr(sys, name, None)
"""


@pytest.fixture(scope="module")
def cache(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("environment") / "cache"
    assert main(["extract", str(data), "--out", str(out), *TINY]) == 0
    return out


def test_a_user_without_a_passwd_entry_extracts_and_trains(data: Path, tmp_path: Path) -> None:
    names = ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in names} | {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    args = ["extract", data, "--out", "cache", *TINY, "then", "train", "cache", "--out", "run", *SMALL]
    command = [sys.executable, "-c", WITHOUT_PASSWD_ENTRY, *map(str, args)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "run", "tmp"]


@pytest.mark.parametrize("closed", [STREAMS[2:], STREAMS], ids=["stderr", "all"])
@pytest.mark.parametrize("command", ["check", "extract", "train"])
def test_commands_run_with_closed_standard_streams(
    lab: Lab, data: Path, cache: Path, tmp_path: Path, command: str, closed: list[tuple[int, str]]
) -> None:
    args = {
        "check": ["check", data],
        "extract": ["extract", data, "--out", tmp_path / "cache", *TINY],
        "train": ["train", cache, "--out", tmp_path / "run", *SMALL],
    }[command]
    ended = lab.run(args, CLOSED.format(closed))
    assert ended.code == 0, ended


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("name", "code"), [("cache", 0), ("missing", 2)])
def test_commands_start_with_closed_standard_streams(cache: Path, closed: str, name: str, code: int) -> None:
    line = " ".join([sys.executable, "-m", "vaflow", "cache", "info", str(cache.with_name(name)), closed])
    assert subprocess.run(line, shell=True, check=False, timeout=300).returncode == code, line


def test_a_missing_device_is_a_usage_error_in_every_command(
    data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (
        ["extract", str(data), "--out", str(tmp_path / "new"), *TINY[:-4], "--device", "cuda:99"],
        ["train", str(cache), "--out", str(tmp_path / "run"), *SMALL[:-2], "--device", "cuda:99"],
    ):
        assert main(args) == 2
        assert "no such GPU" in capsys.readouterr().err
