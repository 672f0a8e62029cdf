"""Commands in restricted environments."""

import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab

from vaflow.cli import main

TINY = ["--visual", "clip-tiny", "--audio", "none", "--faces", "none", "--device", "cpu", "--workers", "1"]
SMALL = ["--epochs", "1", "--set", "hidden=8", "--set", "val_split=train", "--audio", "none", "--device", "cpu"]

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
